"""Multiple-choice questions: the bundled ones, MMLU, or a file with the same columns.

A question has four choices and the index of the right one. A file has the columns ``question``,
``choices`` and ``answer`` (0 to 3, or A to D), and may have ``subject``: MMLU's own names. MMLU's
first files are read too, without a heading: question, the four choices, the letter.
"""

import ast
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
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
from persona_nns.prompts.fetched_questions import MMLU_DEV, mmlu_dev
from persona_nns.prompts.files import (
    Row,
    WrittenFloat,
    parse_json,
    parse_jsonl,
    read_csv,
    read_csv_without_heading,
    read_jsonl,
    stem_of,
    suffix_of,
)

BUNDLED = "bundled"
LETTERS = ("A", "B", "C", "D")
INSTRUCTION = "answer this multiple-choice question with one letter only."
_COLUMNS = ("question", "choices", "answer")
_MMLU = "cais/mmlu"
_WHAT = "The question file"
# Of MMLU's first files: anatomy_dev.csv.
_SPLIT = re.compile(r"_(dev|val|test)$")


@dataclass(frozen=True)
class Question:
    """One question; ``answer`` is the index of the right choice."""

    question: str
    choices: tuple[str, str, str, str]
    answer: int
    subject: str = ""

    @property
    def task(self) -> str:
        """What a persona is asked to do, as instruction, question and lettered choices."""
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
    def _index_or_letter(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("it has to be the index of a choice, or its letter")
        letter = value.strip().upper() if isinstance(value, str) else ""
        return LETTERS.index(letter) if letter in LETTERS else value

    @field_validator("question", "choices", "subject", mode="before")
    @classmethod
    def _keeps_its_text(cls, value: Any) -> Any:
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, float | Decimal) and not math.isfinite(each):
                raise ValueError("it is not a text, nor a number that is finite")
            if isinstance(each, WrittenFloat) and str(float(each)) != each.written:
                raise ValueError(
                    f"the number {each.written} would become {float(each)}; put it in quotes"
                )
        return value

    @field_validator("choices", mode="before")
    @classmethod
    def _has_an_order(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise ValueError("it has to be a list")
        return value

    @field_validator("question")
    @classmethod
    def _says_something(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("it is blank")
        return value

    @field_validator("choices")
    @classmethod
    def _offers_something(cls, value: list[str]) -> list[str]:
        for letter, choice in zip(LETTERS, value, strict=True):
            if not choice.strip():
                raise ValueError(f"choice {letter} is blank")
        return value


def load_questions(source: str | Path) -> tuple[Question, ...]:
    """Load multiple-choice questions, in their order.

    Args:
        source: ``bundled``; ``mmlu-dev`` (281 of MMLU's development questions, out of the package
            ``lm-eval``, which is fetched where it is not installed); ``mmlu`` or ``mmlu:subject``
            (its test split, through the package ``datasets``); or the path of a ``.jsonl``,
            ``.csv`` (both may be gzipped) or ``.parquet`` file. In a CSV file ``choices`` is a list
            as JSON or Python writes it; one without a heading has question, four choices, letter.

    Raises:
        UsageError: unknown source, unreadable file, missing column, or a row that is no question
            of four choices.
        PersonaError: MMLU could not be loaded, or fetched.
    """
    if source == BUNDLED:
        file = resources.files("persona_nns.organism") / "questions.jsonl"
        return _check(parse_jsonl(file.read_text(encoding="utf-8"), BUNDLED), BUNDLED)
    if source == MMLU_DEV:
        return _check(_numbered(mmlu_dev()), MMLU_DEV)
    name, _, subject = str(source).partition(":")
    if name == "mmlu":
        return _check(_numbered(_read_mmlu(subject or "all")), str(source))
    return _check(_read_file(str(source)), str(source))


def choose_questions(
    source: str | Path,
    first: int | None,
    solved: str | None,
    solved_alone: bool,  # noqa: FBT001
) -> dict[int, Question]:
    """Load questions, and leave out what was not solved.

    Args:
        source: as of `load_questions`.
        first: only the first so many; None is all.
        solved: numbers of those that are kept, as ``0,4,17``; None is all.
        solved_alone: whether only solved ones are wanted.

    Returns:
        The questions by their number in the source, in its order.

    Raises:
        UsageError: as `load_questions`; or what was solved is no list of their numbers, is
            nothing, or is not wanted.
    """
    questions = dict(enumerate(load_questions(source)[:first]))
    if solved is None:
        return questions
    if not solved_alone:
        raise UsageError(
            f"Which questions are solved ({solved!r}) was given and is not asked for; add "
            "--solved-by-baseline."
        )
    if not solved.strip():
        raise UsageError(
            f"The baseline persona answers none of the {len(questions)} questions of "
            f"{str(source)!r} right; give others, or leave out --solved-by-baseline."
        )
    numbers = [number.strip() for number in solved.split(",")]
    for number in numbers:
        if not (number.isdecimal() and int(number) in questions):
            raise UsageError(
                f"There is no question {number!r} in {str(source)!r}; solved questions are "
                f"numbers from 0 to {len(questions) - 1}, as 0,4,17."
            )
    return {k: questions[k] for k in sorted(map(int, numbers))}


def name_questions(source: str | Path) -> str:
    """A short name of a source, fit for a group of a store: ``mmlu-anatomy``."""
    text = str(source)
    return text.replace(":", "-") if text.startswith(("mmlu:", BUNDLED)) else stem_of(text)


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


def _read_file(source: str) -> list[Row]:
    suffix = suffix_of(source)
    if suffix in (".jsonl", ".jsonl.gz"):
        return read_jsonl(source, _WHAT)
    if suffix in (".csv", ".csv.gz"):
        rows = read_csv_without_heading(source, _WHAT)
        if rows and _is_first_form(rows[0]):
            subject = _SPLIT.sub("", stem_of(source))
            return _numbered(
                _of_first_form(row, subject, source, n) for n, row in enumerate(rows, 1)
            )
        return [_with_choices(row, source) for row in read_csv(source, _WHAT)]
    if suffix == ".parquet":
        return _numbered(_read_parquet(Path(source).expanduser()))
    raise UsageError(
        f"Unknown questions {source!r}; use 'bundled', 'mmlu-dev', 'mmlu', 'mmlu:subject', or a "
        ".jsonl, .csv (both may end in .gz) or .parquet file."
    )


def _numbered(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    return [Row(number, row) for number, row in enumerate(rows, start=1)]


def _is_first_form(row: Sequence[str]) -> bool:
    """Whether the first row of a CSV file is a question already: text, four choices, a letter."""
    named = {field.strip().lower() for field in row}
    return len(row) == 6 and row[5].strip() in LETTERS and "question" not in named


def _of_first_form(row: Sequence[str], subject: str, source: str, number: int) -> dict[str, Any]:
    if len(row) != 6:
        raise UsageError(
            f"Row {number} of {source!r} has {len(row)} fields; without a heading they are six: "
            "the question, four choices and the letter of the right one."
        )
    return {"question": row[0], "choices": row[1:5], "answer": row[5], "subject": subject}


def _with_choices(row: Row, source: str) -> Row:
    """A row of a CSV file with its choices as a list."""
    text = row.values.get("choices")
    if text is None:
        return row
    try:
        return replace(row, values={**row.values, "choices": _parse_list(text)})
    except (ValueError, SyntaxError, RecursionError) as error:
        raise UsageError(
            f"Row {row.number} of {source!r}: choices is {text!r}, which is no list such as "
            '["a", "b", "c", "d"].'
        ) from error


def _parse_list(text: str) -> Any:
    """A list as JSON or as Python writes it; what is no list is refused with its row."""
    try:
        return parse_json(text)
    except ValueError:
        whole = ast.parse(text.strip(), mode="eval").body
    if not isinstance(whole, ast.List | ast.Tuple):
        raise ValueError(text)  # a set has no order
    return [_parse_literal(each, text.strip()) for each in whole.elts]


def _parse_literal(node: ast.expr, text: str) -> Any:
    value = ast.literal_eval(node)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    written = ast.get_source_segment(text, node) or ""
    return WrittenFloat(value, written) if is_number and str(value) != written else value


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


def _check(rows: Iterable[Row], source: str) -> tuple[Question, ...]:
    questions: list[Question] = []
    for row in rows:
        place, values = f"Row {row.number} of {source!r}", row.values
        for column in _COLUMNS:
            if values.get(column) is None:
                raise UsageError(
                    f"{place} has no {column!r}; the columns are question, choices, answer "
                    "(0 to 3, or A to D) and, optionally, subject."
                )
        known = {
            name: values[name] for name in (*_COLUMNS, "subject") if values.get(name) is not None
        }
        try:
            checked = _Row.model_validate(known)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise UsageError(
                f"{place}: {where} is {problem['input']!r}: {problem['msg']}."
            ) from error
        a, b, c, d = checked.choices
        questions.append(Question(checked.question, (a, b, c, d), checked.answer, checked.subject))
    if not questions:
        raise UsageError(f"There are no questions in {source!r}.")
    return tuple(questions)
