"""Answers that were given in roles, as rows of a JSONL file.

A row is ``{"role": …, "system": …, "question_id": …, "question": …, "response": …}`` and may have a
``score``. The system prompt stands there in full; an empty one is no system message.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_nns.errors import UsageError
from persona_nns.prompts.files import read_jsonl, suffix_of

_SUFFIXES = (".jsonl", ".jsonl.gz")
_SHAPE = '{"role": …, "system": …, "question_id": 0, "question": …, "response": …}'
_TEXTS = ("role", "system", "question", "response")
_NOT_EMPTY = ("role", "question", "response")


@dataclass(frozen=True)
class RoleResponse:
    """One answer.

    Attributes:
        role: who gave it.
        system: the system prompt, verbatim; may be empty.
        question_id: which question, as a text.
        question: what was asked.
        response: what the model said.
        score: how much of the role a judge saw in it, 0 to 3; None where nobody judged.
    """

    role: str
    system: str
    question_id: str
    question: str
    response: str
    score: float | None


def is_role_file(source: str | Path) -> bool:
    """Whether answers are to be read from a file, and not from a store.

    Raises:
        UsageError: it is a file in another format.
    """
    path = Path(source).expanduser()
    named = "://" not in str(source) and suffix_of(source) not in ("", ".zarr")
    if not path.is_file() and (path.exists() or not named):
        return False
    if suffix_of(source) not in _SUFFIXES:
        raise UsageError(
            f"Answers are read from a {' or '.join(_SUFFIXES)} file (a row {_SHAPE}), or from a "
            f"store with persona_responses; {str(source)!r} is neither."
        )
    return True


def read_role_responses(file: str | Path) -> list[RoleResponse]:
    """Read the rows of a JSONL file, which may be gzipped.

    Raises:
        UsageError: it cannot be read, a row lacks something, or one question has two texts.
    """
    rows: list[RoleResponse] = []
    asked: dict[str, str] = {}
    for read in read_jsonl(file, "The responses"):
        row = _row(f"line {read.number} of {str(file)!r}", read.values)
        known = asked.setdefault(row.question_id, row.question)
        if known != row.question:
            raise UsageError(
                f"The question_id {row.question_id!r} stands for {known!r} and, in line "
                f"{read.number} of {str(file)!r}, for {row.question!r}; a question has one text "
                "for all roles."
            )
        rows.append(row)
    if not rows:
        raise UsageError(f"The file {str(file)!r} holds no responses.")
    return rows


def _row(place: str, data: Mapping[str, Any]) -> RoleResponse:
    if missing := [key for key in (*_TEXTS, "question_id") if key not in data]:
        raise UsageError(f"A row lacks {', '.join(missing)}: {place}.")
    for key in _TEXTS:
        if not isinstance(data[key], str):
            raise UsageError(f"{key!r} is {data[key]!r} and not a text: {place}.")
    for key in _NOT_EMPTY:
        if not data[key]:
            raise UsageError(f"The {key} is empty: {place}.")
    number, score = data["question_id"], data.get("score")
    if not isinstance(number, int | str) or isinstance(number, bool):
        raise UsageError(f"'question_id' is {number!r} and no number or text: {place}.")
    if score is not None and (not isinstance(score, int | float) or isinstance(score, bool)):
        raise UsageError(f"'score' is {score!r} and not a number: {place}.")
    if score is not None and not math.isfinite(score):
        raise UsageError(f"'score' is {score!r}; leave it out where there is none: {place}.")
    return RoleResponse(
        **{key: data[key] for key in _TEXTS},
        question_id=str(number),
        score=None if score is None else float(score),
    )
