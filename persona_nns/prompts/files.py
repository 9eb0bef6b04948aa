"""Files that people bring: texts, JSON, and tables with a row a line, read in one way.

They are UTF-8, with or without a byte order mark, and may be gzipped (``.gz``). A line ends with
LF, CRLF or CR and with nothing else: every other line break of Unicode belongs to the text that it
stands in. What cannot be read is said with the file's name, the line and the reason.
"""

import csv
import gzip
import io
import json
import re
import zlib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_nns.errors import UsageError, one_line

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


def read_csv(file: str | Path, what: str) -> list[Row]:
    """The rows of a CSV file with a heading; ``what`` begins a message, as in `read_text`.

    Raises:
        UsageError: it cannot be read.
    """
    stream = _stream(file, what)
    try:
        return [Row(number, row) for number, row in enumerate(csv.DictReader(stream), start=1)]
    except csv.Error as error:
        raise UsageError(f"{what} {str(file)!r} is no CSV file: {error}.") from error


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
