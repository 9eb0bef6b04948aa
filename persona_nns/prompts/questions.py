"""Multiple-choice questions: the bundled ones, MMLU, or a file with the same columns.

A question has four choices and the index of the right one. A file has the columns ``question``,
``choices`` and ``answer`` (0 to 3), and may have ``subject``: MMLU's own names.
"""

import ast
import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
)

from persona_nns.errors import PersonaError, UsageError, one_line

BUNDLED = "bundled"
LETTERS = ("A", "B", "C", "D")
INSTRUCTION = "answer this multiple-choice question with one letter only."
_COLUMNS = ("question", "choices", "answer")
_MMLU = "cais/mmlu"


@dataclass(frozen=True)
class Question:
    """One question; ``answer`` is the index of the right choice."""

    question: str
    choices: tuple[str, str, str, str]
    answer: int
    subject: str = ""

    @property
    def task(self) -> str:
        """What a persona is asked to do: instruction, question and lettered choices."""
        lettered = zip(LETTERS, self.choices, strict=True)
        choices = "\n".join(f"{letter}. {text}" for letter, text in lettered)
        return f"{INSTRUCTION}\n\n{self.question}\n{choices}"


class _Row(BaseModel):
    """What a row may hold; columns beyond these are not looked at."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    question: Annotated[str, StringConstraints(min_length=1)]
    choices: Annotated[list[str], Field(min_length=4, max_length=4)]
    answer: Annotated[int, Field(ge=0, le=3)]
    subject: str = ""

    @field_validator("answer", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("it has to be the index of a choice")
        return value


def load_questions(source: str | Path) -> tuple[Question, ...]:
    """Load multiple-choice questions, in their order.

    Args:
        source: ``bundled``; ``mmlu`` or ``mmlu:subject`` (its test split, through the package
            ``datasets``); or the path of a ``.jsonl``, ``.csv`` or ``.parquet`` file. In a CSV
            file ``choices`` is a list as JSON or Python writes it.

    Raises:
        UsageError: unknown source, unreadable file, missing column, or a row that is no question
            of four choices.
        PersonaError: MMLU could not be loaded.
    """
    if source == BUNDLED:
        file = resources.files("persona_nns.organism") / "questions.jsonl"
        return _check(_parse_jsonl(file.read_text(encoding="utf-8"), BUNDLED), BUNDLED)
    name, _, subject = str(source).partition(":")
    if name == "mmlu":
        return _check(_read_mmlu(subject or "all"), str(source))
    return _check(_read_file(Path(source).expanduser()), str(source))


def name_questions(source: str | Path) -> str:
    """A short name of a source, fit for a group of a store: ``mmlu-anatomy``."""
    text = str(source)
    return text.replace(":", "-") if text.startswith(("mmlu:", BUNDLED)) else Path(text).stem


def _read_mmlu(subject: str) -> list[Mapping[str, Any]]:
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise UsageError(
            "MMLU needs the package 'datasets' (pip install 'persona-nns[mmlu]'); or give the "
            "path of a JSONL, CSV or parquet file with the same columns."
        ) from error
    try:
        return list(datasets.load_dataset(_MMLU, subject, split="test"))
    except Exception as error:  # whatever the hub, the network or the builder raises
        raise PersonaError(
            f"The MMLU subject {subject!r} could not be loaded: {one_line(error)}"
        ) from error


def _read_file(path: Path) -> list[Mapping[str, Any]]:
    readers = {".jsonl": _parse_jsonl, ".csv": _parse_csv}
    try:
        if path.suffix in readers:
            # Line ends stay as they are: one inside a quoted field is part of a prompt.
            with path.open(encoding="utf-8-sig", newline="") as stream:
                return readers[path.suffix](stream.read(), str(path))
        if path.suffix == ".parquet":
            return _read_parquet(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The question file {str(path)!r} cannot be read: {error}.") from error
    raise UsageError(
        f"Unknown questions {str(path)!r}; use 'bundled', 'mmlu', 'mmlu:subject', or a .jsonl, "
        ".csv or .parquet file."
    )


def _parse_jsonl(text: str, source: str) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"Line {number} of {source!r} is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise UsageError(f"Line {number} of {source!r} is no JSON object.")
        rows.append(row)
    return rows


def _parse_csv(text: str, source: str) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    try:
        read = list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise UsageError(f"The question file {source!r} is no CSV file: {error}.") from error
    for number, row in enumerate(read, start=1):
        choices = row.get("choices")
        if choices is None:
            rows.append(row)
            continue
        try:
            rows.append({**row, "choices": _parse_list(choices)})
        except (ValueError, SyntaxError) as error:
            raise UsageError(
                f"Row {number} of {source!r}: choices is {choices!r}, which is no list such as "
                '["a", "b", "c", "d"].'
            ) from error
    return rows


def _parse_list(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return ast.literal_eval(text)


def _read_parquet(path: Path) -> list[Mapping[str, Any]]:
    try:
        pyarrow = import_module("pyarrow")
        parquet = import_module("pyarrow.parquet")
    except ImportError as error:
        raise UsageError(
            "Parquet files need the package 'pyarrow' (pip install 'persona-nns[mmlu]')."
        ) from error
    try:
        return parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise UsageError(
            f"The question file {str(path)!r} is no parquet file: {one_line(error)}"
        ) from error


def _check(rows: Iterable[Mapping[str, Any]], source: str) -> tuple[Question, ...]:
    questions: list[Question] = []
    for number, row in enumerate(rows, start=1):
        for column in _COLUMNS:
            if row.get(column) is None:
                raise UsageError(
                    f"Row {number} of {source!r} has no {column!r}; the columns are question, "
                    "choices, answer (0 to 3) and, optionally, subject."
                )
        known = {name: row[name] for name in (*_COLUMNS, "subject") if row.get(name) is not None}
        try:
            checked = _Row.model_validate(known)
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(map(str, problem["loc"]))
            raise UsageError(
                f"Row {number} of {source!r}: {place} is {problem['input']!r}: {problem['msg']}."
            ) from error
        a, b, c, d = checked.choices
        questions.append(Question(checked.question, (a, b, c, d), checked.answer, checked.subject))
    if not questions:
        raise UsageError(f"There are no questions in {source!r}.")
    return tuple(questions)
