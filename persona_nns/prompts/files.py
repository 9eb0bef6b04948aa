"""Files that people bring: texts, JSON, TOML, YAML, and tables with a row a line, read in one way.

They are UTF-8, with or without a byte order mark, and may be gzipped (``.gz``). A line ends with
LF, CRLF or CR and with nothing else: every other line break of Unicode belongs to the text that it
stands in. What cannot be read is said with the file's name, the line and the reason.
"""

import csv
import gzip
import io
import json
import re
import tomllib
import zlib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from persona_nns.errors import UsageError, one_line

#: Endings of tables with a row a line.
TABLES = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz")

_SURPLUS = "more fields than the heading"
_LINE_END = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        number: its line in a JSONL file; in a CSV file, where a text may have several lines, its
            number after the heading.
        values: by column.
    """

    number: int
    values: Mapping[str, Any]


class WrittenFloat(float):
    """A number that knows how it was written: 1.10 is 1.1, but not as a text."""

    written: str

    def __new__(cls, value: float, written: str) -> "WrittenFloat":
        """The number, and its text."""
        number = super().__new__(cls, value)
        number.written = written
        return number

    def __repr__(self) -> str:
        return self.written


def suffix_of(file: str | Path) -> str:
    """The ending of a file's name in small letters, ``.jsonl.gz`` of a gzipped one."""
    suffixes = [suffix.lower() for suffix in Path(file).suffixes]
    return "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:])


def stem_of(file: str | Path) -> str:
    """The name of a file without folder and ending: ``calm`` of ``rows/calm.jsonl.gz``."""
    name = Path(file).name
    return name.removesuffix(name[len(name) - len(suffix_of(name)) :])


def read_text(file: str | Path, what: str) -> str:
    """The text of a file, its line ends as they are.

    Args:
        file: its path.
        what: what it is, as a message begins: ``The question file``.

    Raises:
        UsageError: it cannot be read, or is not UTF-8.
    """
    try:
        path = Path(file).expanduser()
        data = path.read_bytes()
        if suffix_of(path).endswith(".gz"):
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"line {_line_of(error)} is not UTF-8 ({error.reason})"
        if error.object.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
            reason = "it is UTF-16; save it as UTF-8"
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, RuntimeError, EOFError, zlib.error) as error:  # a path that is none; gzip
        reason = one_line(error).rstrip(".")
    raise UsageError(f"{what} {str(file)!r} cannot be read: {reason}.")


def _line_of(error: UnicodeDecodeError) -> int:
    return len(_LINE_END.split(error.object[: error.start].decode("utf-8", "replace")))


def lines_of(text: str) -> list[str]:
    """The lines of a text, without what ends them."""
    return _LINE_END.split(text)


def read_json(file: str | Path, what: str) -> Any:
    """The value in a JSON file; ``what`` begins a message, as in `read_text`.

    Raises:
        UsageError: it cannot be read, or is not JSON.
    """
    try:
        return parse_json(read_text(file, what))
    except ValueError as error:
        raise UsageError(f"{what} {str(file)!r} cannot be read: {error}.") from error


def parse_json(text: str) -> Any:
    """The value that a text writes as JSON, numbers with a point as `WrittenFloat`.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(text, parse_float=lambda number: WrittenFloat(float(number), number))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_toml(file: str | Path, what: str) -> dict[str, Any]:
    """The tables of a TOML file; ``what`` begins a message, as in `read_text`.

    Raises:
        UsageError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads("\n".join(lines_of(read_text(file, what))))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{what} {str(file)!r} is not valid TOML: {error}.") from error


class _TextLoader(yaml.BaseLoader):
    """Reads every scalar as the text that it is: ``no`` and ``1.10`` are no truth or number."""


def _mapping(loader: _TextLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    """A mapping, each of whose keys stands there once: YAML itself would keep the last."""
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value in seen:
            raise yaml.MarkedYAMLError(
                problem=f"the key {key.value!r} stands there twice", problem_mark=key.start_mark
            )
        seen.add(str(key.value))
    return loader.construct_mapping(node, deep=True)


_TextLoader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read_yaml(file: str | Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file, every value a text; ``what`` begins a message, as above.

    Raises:
        UsageError: it cannot be read, is not YAML, or holds no mapping.
    """
    reason = "it holds no mapping"
    try:
        values = yaml.load(read_text(file, what), _TextLoader)  # noqa: S506 - texts alone
        if isinstance(values, dict):
            return values
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" (line {error.problem_mark.line + 1})"
        reason = f"{error.problem or one_line(error).rstrip('.')}{line}"
    except (yaml.YAMLError, RecursionError) as error:
        reason = one_line(error).rstrip(".")
    raise UsageError(f"{what} {str(file)!r} is not valid YAML: {reason}.")


def read_jsonl(file: str | Path, what: str) -> list[Row]:
    """The rows of a JSONL file, an object a line; ``what`` begins a message, as in `read_text`.

    Raises:
        UsageError: it cannot be read, or a line is no JSON object.
    """
    return parse_jsonl(read_text(file, what), str(file))


def parse_jsonl(text: str, source: str) -> list[Row]:
    """The rows of a text with a JSON object a line; empty lines are none.

    Raises:
        UsageError: a line is no JSON object.
    """
    rows: list[Row] = []
    for number, line in enumerate(lines_of(text), start=1):
        if not line.strip():
            continue
        place = f"Line {number} of {source!r} is no JSON object"
        try:
            values = parse_json(line)
        except ValueError as error:
            raise UsageError(f"{place}: it is not JSON ({error}).") from error
        if not isinstance(values, dict):
            raise UsageError(f"{place}.")
        rows.append(Row(number, values))
    return rows


def read_table(file: str | Path, what: str) -> list[Row]:
    """The rows of a file with one of the endings in `TABLES`; ``what`` as in `read_text`.

    Raises:
        UsageError: it cannot be read, or a row is none.
    """
    return (read_csv if ".csv" in suffix_of(file) else read_jsonl)(file, what)


def read_csv(file: str | Path, what: str) -> list[Row]:
    """The rows of a CSV file with a heading; ``what`` begins a message, as in `read_text`.

    Raises:
        UsageError: it cannot be read, or a row has more fields than the heading: a text with a
            comma that is not in quotes would be cut off.
    """
    reader = csv.DictReader(_stream(file, what), restkey=_SURPLUS)
    try:
        rows = [Row(number, row) for number, row in enumerate(reader, start=1)]
    except csv.Error as error:
        raise UsageError(f"{what} {str(file)!r} is no CSV file: {error}.") from error
    for row in rows:
        if any(field.strip() for field in row.values.get(_SURPLUS, ())):
            raise UsageError(
                f"Row {row.number} of {str(file)!r} has more fields than the heading; put a text "
                "with a comma in quotes."
            )
    return rows


def read_csv_without_heading(file: str | Path, what: str) -> list[list[str]]:
    """The fields of every row of a CSV file, its heading too; lines without any are none.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return [row for row in csv.reader(_stream(file, what)) if row]
    except csv.Error as error:
        raise UsageError(f"{what} {str(file)!r} is no CSV file: {error}.") from error


def _stream(file: str | Path, what: str) -> io.StringIO:
    # Line ends stay as they are: one inside a quoted field belongs to a text.
    return io.StringIO(read_text(file, what), newline="")


def problem_of(error: ValidationError) -> str:
    """The first problem of a validation with the place where it was found, without a full stop."""
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"] if part != "[key]")
    message = str(problem.get("ctx", {}).get("error", problem["msg"])).rstrip(".")
    return f"{place}: {message}" if place else message
