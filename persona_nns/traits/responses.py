"""Answers given under contrastive system prompts, as rows of a JSONL file.

A row is ``{"pair": …, "question_id": …, "label": "pos"|"neg", "system": …, "question": …,
"response": …}``; the system prompt stands there in full.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from persona_nns.errors import UsageError
from persona_nns.prompts.files import read_jsonl, suffix_of
from persona_nns.traits.trait import LABELS, Label

_SUFFIXES = (".jsonl", ".jsonl.gz")
_SHAPE = '{"pair": 0, "question_id": 0, "label": "pos", "system": …, "question": …, "response": …}'
_TEXTS = ("system", "question", "response")
_NUMBERS = ("pair", "question_id")


@dataclass(frozen=True)
class Response:
    """One answer.

    Attributes:
        pair: which instruction pair the system prompt is of.
        question_id: which question.
        label: ``pos`` under the instruction that asks for the trait, ``neg`` under the other.
        system: the system prompt, verbatim; may be empty.
        question: what was asked.
        response: what the model said.
    """

    pair: int
    question_id: int
    label: Label
    system: str
    question: str
    response: str


def is_rows_file(source: str | Path) -> bool:
    """Whether answers are to be read from a file, and not from a store.

    Raises:
        UsageError: it is a file in another format.
    """
    path = Path(source).expanduser()
    named = "://" not in str(source) and suffix_of(source) not in ("", ".zarr")
    if not path.is_file() and (path.exists() or not named):
        return False
    _check_format(source)
    return True


def read_responses(file: str | Path) -> list[Response]:
    """Read the rows of a JSONL file, which may be gzipped.

    Raises:
        UsageError: it cannot be read, or a row lacks something.
    """
    _check_format(file)
    rows = [
        _row(f"line {row.number} of {str(file)!r}", row.values)
        for row in read_jsonl(file, "The responses")
    ]
    if not rows:
        raise UsageError(f"The file {str(file)!r} holds no responses.")
    return rows


def _check_format(file: str | Path) -> None:
    if suffix_of(file) not in _SUFFIXES:
        raise UsageError(
            f"Answers are read from a {' or '.join(_SUFFIXES)} file (a row {_SHAPE}) or, by "
            f"trait_vectors, from a store; {str(file)!r} is neither."
        )


def check_labels(rows: Sequence[Response], source: str) -> None:
    """See that there are rows of both labels.

    Raises:
        UsageError: one label has none.
    """
    for label in LABELS:
        if not any(row.label == label for row in rows):
            raise UsageError(
                f"The responses {source!r} have no row with the label {label!r}; a vector is the "
                "difference of 'pos' and 'neg'."
            )


def _row(place: str, data: Mapping[str, Any]) -> Response:
    keys = (*_NUMBERS, "label", *_TEXTS)
    if missing := [key for key in keys if key not in data]:
        raise UsageError(f"A row lacks {', '.join(missing)}: {place}.")
    for key in _NUMBERS:
        if not isinstance(data[key], int) or isinstance(data[key], bool):
            raise UsageError(f"{key!r} is {data[key]!r} and not a whole number: {place}.")
    for key in _TEXTS:
        if not isinstance(data[key], str):
            raise UsageError(f"{key!r} is {data[key]!r} and not a text: {place}.")
    if not data["response"]:
        raise UsageError(f"The response is empty: {place}.")
    if data["label"] not in LABELS:
        raise UsageError(f"The label is {data['label']!r}, not 'pos' or 'neg': {place}.")
    return Response(**{key: cast(Any, data[key]) for key in keys})
