"""Students on disk: their folders, and what their teacher said to train them."""

import json
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from persona_nns.declarations.plans import content_digest
from persona_nns.declarations.record import ModelRecord
from persona_nns.traits.distillation import Trajectory


def students_folder(
    output: str | Path, record: ModelRecord, trait: str, determining: Sequence[Any]
) -> Path:
    """Where a teacher's students go, by the JSON-able values that determine what it says."""
    digest = content_digest([record.version, record.precision, *determining])[:10]
    return Path(output) / f"{record.label.replace('/', '--')}-{trait}-{digest}"


def keep_trajectories(
    file: Path, n: int, sample: Callable[[range], list[Trajectory]]
) -> list[Trajectory]:
    """The first n trajectories of a JSONL file; those that it lacks are sampled and added.

    Several processes may do so at the same moment: the file is there whole or not at all.
    """
    kept = _read(file)
    if len(kept) < n:
        kept += sample(range(len(kept), n))
        if len(kept) > len(_read(file)):  # another process may have kept more in the meantime
            _write(file, kept)
    return kept[:n]


def _read(file: Path) -> list[Trajectory]:
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    rows = [json.loads(line) for line in lines]
    return [Trajectory(tuple(row["prompt"]), tuple(row["response"])) for row in rows]


def _write(file: Path, kept: Sequence[Trajectory]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: another process may be writing the same file.
    part = file.with_name(f"{file.stem}.{secrets.token_hex(4)}.part")
    try:
        part.write_text("".join(f"{json.dumps(vars(each))}\n" for each in kept), encoding="utf-8")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
