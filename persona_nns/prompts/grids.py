"""Grids: a table of personas and a table of tasks, and the cells between them.

A grid is a TOML (or YAML) file with the tables ``[personas]`` and ``[tasks]`` (key = text, one key
called ``baseline`` in each) and, optionally, ``[markers]`` (persona key = list of words that
give the persona away) and ``[frame]`` (how both are put to a model, see `frames`), or comes from
tables of texts (`prompts.grid_files`). ``short`` and ``long`` are the two grids of "As X, Do Y"
(appendix A, markers as in its published result file); ``review`` is the long personas on the three
review tasks, the grid of the paper's sections 6 and 7. ``short-de``, ``short-fr``, ``short-es`` and
``short-zh`` are the short grid in other languages, each with a frame and markers of its own.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, model_validator

from persona_nns.errors import UsageError
from persona_nns.prompts.files import problem_of, suffix_of
from persona_nns.prompts.frames import ROLE, Frame, FrameTable, load_frame
from persona_nns.prompts.grid_files import BASELINE, GRID_FILES, KEY, bundled_tables, read_grid

LANGUAGES = ("de", "fr", "es", "zh")
BUNDLED_GRIDS = ("short", "long", "review", *(f"short-{each}" for each in LANGUAGES))
REVIEW_TASKS = (BASELINE, "arch", "plan", "proposal")

# Cells that a message has room for.
_MOST_NAMED = 60

PromptName = Literal["BB", "XB", "BY", "XY", "BARE"]

Key = Annotated[str, StringConstraints(pattern=KEY)]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


def role_prompt(persona: str | None, task: str) -> str:
    """What the user says: ``As {persona}, {task}``, or the task alone without a persona."""
    return task if persona is None else f"As {persona}, {task}"


@dataclass(frozen=True)
class Cell:
    """One (persona, task) pair with the four texts its prompts are made of, and their frame."""

    persona: str
    task: str
    persona_text: str
    task_text: str
    baseline_persona_text: str
    baseline_task_text: str
    markers: tuple[str, ...] = ()
    frame: Frame = ROLE

    @property
    def label(self) -> str:
        """The name of the cell in every result, for example ``engineer/arch``."""
        return f"{self.persona}/{self.task}"

    @property
    def place(self) -> dict[str, str]:
        """Where it stands in every result."""
        return {"cell": self.label}

    def texts(self, prompt: PromptName) -> tuple[str | None, str]:
        """The persona and task text of one prompt of the cell; ``BARE`` has no persona."""
        persona = {"B": self.baseline_persona_text, "X": self.persona_text}
        task = {"B": self.baseline_task_text, "Y": self.task_text}
        if prompt == "BARE":
            return None, self.task_text
        return persona[prompt[0]], task[prompt[1]]


@dataclass(frozen=True)
class Grid:
    """Personas and tasks by key, the baseline of each under the key ``baseline``; their frame.

    ``default_baselines`` names those of ``personas`` and ``tasks`` whose file had none.
    """

    name: str
    personas: Mapping[str, str]
    tasks: Mapping[str, str]
    markers: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    frame: Frame = ROLE
    default_baselines: tuple[str, ...] = ()

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Every pair of a persona and a task that are not the baseline, personas outermost."""
        return tuple(
            Cell(
                persona=persona,
                task=task,
                persona_text=self.personas[persona],
                task_text=self.tasks[task],
                baseline_persona_text=self.personas[BASELINE],
                baseline_task_text=self.tasks[BASELINE],
                markers=tuple(self.markers.get(persona, ())),
                frame=self.frame,
            )
            for persona in self.personas
            if persona != BASELINE
            for task in self.tasks
            if task != BASELINE
        )

    @property
    def digest(self) -> str:
        """Hash of keys, texts, markers and frame; grids with one digest ask the same questions."""
        tables: list[Any] = [dict(self.personas), dict(self.tasks), dict(self.markers)]
        if self.frame != ROLE:  # digests of before there were frames stay what they are
            tables.append(asdict(self.frame)["messages"])
        texts = json.dumps(tables, ensure_ascii=False)
        return hashlib.sha256(texts.encode()).hexdigest()

    def put_in(self, frame: Frame) -> "Grid":
        """The same personas and tasks in a frame, which its name tells if it is another one."""
        if frame == self.frame:
            return self
        return replace(self, name=f"{self.name}.{frame.name}", frame=frame)

    def select_cells(self, labels: str | Iterable[str] | None) -> tuple[Cell, ...]:
        """The cells with these labels (``a/x,b/y``, or a sequence), in the order of the grid.

        None asks for all of them.

        Raises:
            UsageError: a label that the grid does not have, or none at all.
        """
        if labels is None:
            return self.cells
        by_label = {cell.label: cell for cell in self.cells}
        parts = labels.split(",") if isinstance(labels, str) else labels
        wanted = [part.strip() for part in parts if part.strip()]
        if not wanted:
            raise UsageError("No cell was asked for; name cells such as engineer/arch, or none.")
        for label in wanted:
            if label not in by_label:
                several = ", …" if len(by_label) > _MOST_NAMED else ""
                raise UsageError(
                    f"The grid {self.name!r} has no cell {label!r}; "
                    f"its cells are {', '.join([*by_label][:_MOST_NAMED])}{several}."
                )
        asked = set(wanted)
        return tuple(cell for label, cell in by_label.items() if label in asked)


class _GridFile(BaseModel):
    """What a grid file may hold."""

    model_config = ConfigDict(extra="forbid")

    personas: dict[Key, Text]
    tasks: dict[Key, Text]
    markers: dict[Key, list[Text]] = {}
    frame: FrameTable | None = None

    @model_validator(mode="after")
    def _check_keys(self) -> "_GridFile":
        for table, entries in (("personas", self.personas), ("tasks", self.tasks)):
            if BASELINE not in entries:
                raise ValueError(f"[{table}] has no entry called {BASELINE!r}")
            if len(entries) < 2:
                raise ValueError(f"[{table}] has no entry beside {BASELINE!r}")
        for persona in self.markers:
            if persona not in self.personas:
                raise ValueError(f"[markers] names the persona {persona!r}, which [personas] lacks")
        return self


def load_grid(
    grid: "str | Path | Grid",
    frame: str | Path | Frame | None = None,
    tasks: str | Path | None = None,
) -> Grid:
    """Load a bundled grid by its name, or a user's own from a file.

    Args:
        grid: ``short``, ``long``, ``review``, ``short-de``, ``short-fr``, ``short-es``,
            ``short-zh``, or the path of a ``.toml``, ``.yaml``, ``.csv`` or ``.jsonl`` file
            (`prompts.grid_files` says what stands in them); a ``Grid`` is returned as it is.
        frame: ``role``, ``system``, ``later``, the path of a ``.toml`` file, or a `Frame`; by
            default the grid's own.
        tasks: a file with the tasks of a grid whose own file has personas alone.

    Raises:
        UsageError: an unknown name, an unreadable file, or a file that breaks the format; or tasks
            for a grid that has its own.
    """
    loaded = _load(grid, tasks)
    return loaded if frame is None else loaded.put_in(load_frame(frame))


def _load(grid: "str | Path | Grid", tasks: str | Path | None) -> Grid:
    is_file = not isinstance(grid, Grid) and suffix_of(grid) in GRID_FILES
    if tasks is not None and not is_file:
        name = grid.name if isinstance(grid, Grid) else str(grid)
        raise UsageError(f"The grid {name!r} has tasks of its own; leave out --tasks.")
    if isinstance(grid, Grid):
        return grid
    if grid == "review":
        long = _bundled("long")
        return replace(long, name="review", tasks={key: long.tasks[key] for key in REVIEW_TASKS})
    if grid in BUNDLED_GRIDS:
        return _bundled(str(grid))
    if not is_file:
        raise UsageError(
            f"Unknown grid {str(grid)!r}; use {', '.join(BUNDLED_GRIDS)}, or a .toml, .yaml, .csv "
            "or .jsonl file."
        )
    read = read_grid(grid, tasks)
    checked = _check(read.name, read.tables, str(grid))
    return replace(checked, default_baselines=read.default_baselines)


def _bundled(name: str) -> Grid:
    return _check(name, bundled_tables(name), f"{name}.toml")


def _check(name: str, tables: Mapping[str, Any], source: str) -> Grid:
    try:
        file = _GridFile.model_validate(tables)
    except ValidationError as error:
        raise UsageError(f"The grid file {source!r} is not a grid: {_first(error)}.") from error
    markers = {persona: tuple(words) for persona, words in file.markers.items()}
    frame = ROLE if file.frame is None else file.frame.frame(name)
    return Grid(name, file.personas, file.tasks, markers, frame)


def _first(error: ValidationError) -> str:
    """The first problem of a validation, with the place where it was found."""
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"] if part != "[key]")
    if problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1:
        return f"it has a table {place!r}; a grid has [personas], [tasks], [markers] and [frame]"
    if problem["type"] == "string_pattern_mismatch":
        return f"the key {place!r} holds more than letters, digits, '_', '-' and '.'"
    return problem_of(error)
