"""Answers given under contrastive system prompts, as rows of a JSONL file.

A row is ``{"pair": …, "question_id": …, "label": "pos"|"neg", "system": …, "question": …,
"response": …}``; the system prompt stands there in full.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from persona_nns.errors import UsageError
from persona_nns.traits.trait import LABELS, Label

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


def read_responses(file: str | Path) -> list[Response]:
    """Read the rows of a JSONL file.

    Raises:
        UsageError: it cannot be read, or a row lacks something.
    """
    path = Path(file).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The responses {str(file)!r} cannot be read: {error}.") from error
    rows = [
        _row(f"line {number} of {str(file)!r}", line)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not rows:
        raise UsageError(f"The file {str(file)!r} holds no responses.")
    return rows


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


def _row(place: str, line: str) -> Response:
    try:
        data = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{place[0].upper()}{place[1:]} is no JSON: {error}.") from error
    keys = (*_NUMBERS, "label", *_TEXTS)
    if not isinstance(data, dict) or not all(key in data for key in keys):
        missing = [key for key in keys if not isinstance(data, dict) or key not in data]
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
