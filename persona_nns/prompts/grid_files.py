"""Grids from what people have: tables of texts with a row a line, and keyed files in TOML or YAML.

A keyed file has the tables of a grid (`prompts.grids`). A table, CSV or JSONL, has the columns
``persona`` and ``task``, one of them or both, and may have ``persona_key``, ``task_key`` and
``baseline``; other columns are not looked at. Its personas are the different persona texts in their
order, its tasks the different task texts, and the grid is every pair of them. Texts are taken as
they are.

- A text without a key gets one: its first words (``a-head-chef-who``), numbered where two texts
  begin alike (``a-head-chef-who-2``).
- The baseline of each is what has the key ``baseline``, or stands in a row whose ``baseline`` is
  true. A table without one gets that of the grid ``short``: "a thoughtful person", "Give advice to
  someone facing a difficult decision."
"""

import re
import tomllib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from persona_nns.errors import UsageError
from persona_nns.prompts.files import (
    TABLES,
    Row,
    lines_of,
    read_table,
    read_text,
    read_toml,
    read_yaml,
    stem_of,
    suffix_of,
)

BASELINE = "baseline"
KEY = r"^[A-Za-z0-9_.-]+$"

_KEYED = (".toml", ".yaml", ".yml")
#: Endings of a file that holds a grid, or the personas of one.
GRID_FILES = (*_KEYED, *TABLES)
#: Endings of a file that holds the tasks of one.
TASK_FILES = (*GRID_FILES, ".txt")

Column = Literal["persona", "task"]
_COLUMNS: tuple[Column, Column] = ("persona", "task")
_WORDS = 5  # of a text, that make its key
_CHARACTERS = 40
_TRUE, _FALSE = ("true", "yes", "1", "x"), ("false", "no", "0", "")


@dataclass(frozen=True)
class GridTables:
    """What a grid's files say, as the tables of a TOML file would.

    Attributes:
        name: what the grid is called.
        tables: ``personas`` and ``tasks`` (key → text), and whatever else a keyed file has.
        default_baselines: which of ``personas`` and ``tasks`` have the baseline of ``short``.
    """

    name: str
    tables: Mapping[str, Any]
    default_baselines: tuple[str, ...]


@dataclass(frozen=True)
class _Entry:
    """A text in a row; the key is empty where none is given."""

    key: str
    text: str
    place: str


def read_grid(file: str | Path, tasks: str | Path | None = None) -> GridTables:
    """Read the tables of a grid.

    Args:
        file: a ``.toml``, ``.yaml``, ``.csv`` or ``.jsonl`` file (the latter two may be gzipped).
        tasks: where its tasks are, if it has personas alone: such a file, or a ``.txt`` with a
            task a line.

    Raises:
        UsageError: a file cannot be read, or a row is wrong; or tasks are missing, or given twice.
    """
    name, tables = stem_of(file), _read(file, "The grid file")
    if tasks is not None:
        if "tasks" in tables:
            raise UsageError(
                f"The grid file {str(file)!r} has tasks of its own; leave out --tasks."
            )
        name = f"{name}-{stem_of(tasks)}"
        tables = {**tables, "tasks": _read_tasks(tasks)}
    if suffix_of(file) in TABLES:
        _check_columns(tables, str(file))
    short, defaults = bundled_tables("short"), list[str]()
    for table, source in (("personas", file), ("tasks", tasks or file)):
        if suffix_of(source) not in _KEYED and BASELINE not in tables[table]:
            defaults.append(table)
            tables = {**tables, table: {BASELINE: short[table][BASELINE], **tables[table]}}
    return GridTables(name, tables, tuple(defaults))


def _check_columns(tables: Mapping[str, Any], source: str) -> None:
    """See that a table has personas and tasks."""
    advice = {"persona": "", "task": "; give them with --tasks FILE"}
    for column in _COLUMNS:
        if f"{column}s" not in tables:
            raise UsageError(
                f"The grid file {source!r} has no column {column!r}, and so no {column}s"
                f"{advice[column]}."
            )


def _read(file: str | Path, what: str) -> dict[str, Any]:
    suffix = suffix_of(file)
    if suffix in TABLES:
        rows = read_table(file, what)
        return _tables_of(rows, "Row" if ".csv" in suffix else "Line", str(file))
    return (read_toml if suffix == ".toml" else read_yaml)(file, what)


def _read_tasks(file: str | Path) -> Any:
    what, suffix = "The file of tasks", suffix_of(file)
    if suffix not in TASK_FILES:
        raise UsageError(
            f"The tasks {str(file)!r} are no {', '.join(TASK_FILES[:-1])} or {TASK_FILES[-1]} file."
        )
    if suffix == ".txt":
        lines = enumerate(lines_of(read_text(file, what)), start=1)
        rows = [Row(number, {"task": line}) for number, line in lines if line.strip()]
        tables = _tables_of(rows, "Line", str(file))
    else:
        tables = _read(file, what)
    if "tasks" not in tables:
        raise UsageError(f"{what} {str(file)!r} holds no tasks.")
    return tables["tasks"]


def _tables_of(rows: Sequence[Row], word: str, source: str) -> dict[str, Any]:
    """The tables ``personas`` and ``tasks``, as far as rows have them."""
    if not rows:
        raise UsageError(f"There are no personas and no tasks in {source!r}.")
    entries: dict[Column, list[_Entry]] = {"persona": [], "task": []}
    for row in rows:
        place = f"{word} {row.number} of {source!r}"
        found = {column: list(_entry(row, column, place)) for column in _COLUMNS}
        if not any(found.values()):
            known = ", ".join(map(repr, row.values)) or "nothing"
            raise UsageError(
                f"{place} has neither a persona nor a task (columns 'persona', 'task'); it has "
                f"{known}."
            )
        for column in _COLUMNS:
            entries[column] += found[column]
    return {f"{column}s": _with_keys(of, column) for column, of in entries.items() if of}


def _entry(row: Row, column: Column, place: str) -> Iterator[_Entry]:
    """What a row has in a column: one entry, or none."""
    text, key = row.values.get(column), row.values.get(f"{column}_key")
    if text is not None and not isinstance(text, str):
        raise UsageError(f"{place}: {column} is {text!r}, which is no text.")
    text, key = (text or "").strip(), "" if key is None else str(key).strip()
    if key and not re.fullmatch(KEY, key):
        raise UsageError(
            f"{place}: the key {key!r} holds more than letters, digits, '_', '-' and '.'."
        )
    if key and not text:
        raise UsageError(f"{place} has the {column}_key {key!r} and no {column}.")
    if text:
        yield _Entry(BASELINE if _is_baseline(row, place) else key, text, place)


def _is_baseline(row: Row, place: str) -> bool:
    mark = row.values.get(BASELINE)
    word = "" if mark is None else str(mark).strip().lower()
    if word not in (*_TRUE, *_FALSE):
        raise UsageError(f"{place}: baseline is {mark!r}; it has to be true or false.")
    return word in _TRUE


def _with_keys(entries: Sequence[_Entry], column: Column) -> dict[str, str]:
    """Texts by key, in their order; keys are made for those without."""
    keys: dict[str, str] = {}  # of texts
    given: dict[str, str] = {}
    for entry in entries:
        if not entry.key:
            continue
        if given.setdefault(entry.key, entry.text) != entry.text:
            raise UsageError(
                f"{entry.place}: the {column} {entry.text!r} has the key {entry.key!r}, which "
                f"stands for {given[entry.key]!r} already."
            )
        keys.setdefault(entry.text, entry.key)
    made: dict[str, str] = {}
    taken, counts = {BASELINE, *given}, dict[str, int]()
    for entry in entries:
        if not entry.key and entry.text not in keys:
            keys[entry.text] = _free(make_key(entry.text, column), taken, counts)
        made[entry.key or keys[entry.text]] = entry.text
    return made


def make_key(text: str, otherwise: str) -> str:
    """A readable key of a text: its first words in small ASCII letters; ``otherwise`` of none."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    words = re.findall(r"[a-z0-9]+", ascii_text.replace("'", ""))
    return "-".join(words[:_WORDS])[:_CHARACTERS].rstrip("-") or otherwise


def _free(key: str, taken: set[str], counts: dict[str, int]) -> str:
    """The key itself or, where it is taken, its first free number; it is taken then."""
    free = key
    while free in taken:
        counts[key] = counts.get(key, 1) + 1
        free = f"{key}-{counts[key]}"
    taken.add(free)
    return free


def bundled_tables(name: str) -> dict[str, Any]:
    """The tables of a grid that comes with the package."""
    file = resources.files("persona_nns.prompts") / "texts" / f"{name}.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))
