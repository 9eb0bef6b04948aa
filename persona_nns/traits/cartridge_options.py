"""Which personas get cartridges of which kinds, and what these are trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from persona_nns.declarations.options import FileName
from persona_nns.errors import UsageError
from persona_nns.prompts.grids import Cell, load_grid
from persona_nns.tracing.kv.cartridge import FORMS, Form


@dataclass(frozen=True, eq=False)
class CartridgeUnit:
    """A persona with every task, and what is trained for it.

    Attributes:
        persona: its key.
        cells: a task each, those that are trained on first.
        control: likewise, of the persona whose cartridge is the control; none of one alone.
        n_train: how many of the tasks are trained on.
        forms: what stands behind the slot.
        slots: how long it is.
    """

    persona: str
    cells: tuple[Cell, ...]
    control: tuple[Cell, ...]
    n_train: int
    forms: tuple[Form, ...]
    slots: tuple[int, ...]

    @property
    def label(self) -> str:
        """The persona."""
        return self.persona

    @property
    def place(self) -> dict[str, str]:
        """Where it stands in the result."""
        return {"persona": self.persona}

    def split(self, values: Tensor) -> Tensor:
        """Of [cartridge, task, form, slots], each task in its split and NaN in the other.

        Returns:
            [cartridge, task, form, slots, split]: trained on, held out.
        """
        is_train = torch.arange(len(self.cells), device=values.device) < self.n_train
        split = torch.stack([is_train, ~is_train], dim=1)[:, None, None]
        return torch.where(split, values[..., None], torch.nan)


@dataclass(frozen=True)
class CartridgeOptions:
    """Which cartridges there are.

    Attributes:
        grid: personas and tasks: a name or a file.
        personas: some of them, as teacher,chef; by default all.
        train_tasks: the tasks that cartridges are trained on; the others are held out.
        forms: what stands behind the slot: graft (the host's cached task and tail, moved), prefix
            (both run again).
        slots: numbers of slots.
    """

    grid: FileName = "long"
    personas: str | None = None
    train_tasks: str = "arch,plan,proposal"
    forms: str = ",".join(FORMS)
    slots: str = "1,2,4,8"

    @property
    def name(self) -> str:
        """What the inputs are called."""
        return load_grid(self.grid).name

    def units(self) -> list[CartridgeUnit]:
        """The personas, in the order of the grid.

        Raises:
            UsageError: an option names something that there is not.
        """
        cells = {(cell.persona, cell.task): cell for cell in load_grid(self.grid).cells}
        personas, tasks = (list(dict.fromkeys(pair)) for pair in zip(*cells, strict=True))
        names = _choose("personas", self.personas, personas)
        trained = _choose("train-tasks", self.train_tasks, tasks)
        order = [*trained, *(task for task in tasks if task not in trained)]
        of = {name: tuple(cells[name, task] for task in order) for name in names}
        following = dict(zip(names, [*names[1:], names[0]], strict=True))
        return [
            CartridgeUnit(
                persona=name,
                cells=of[name],
                control=() if following[name] == name else of[following[name]],
                n_train=len(trained),
                forms=_choose("forms", self.forms, FORMS),
                slots=_parse_slots(self.slots),
            )
            for name in names
        ]


def _choose(option: str, asked: str | None, known: Sequence[Any]) -> tuple[Any, ...]:
    """Those of some labels that are asked for, in their own order.

    Raises:
        UsageError: there is no such label, or none is asked for.
    """
    if asked is None:
        return tuple(known)
    named = [each.strip() for each in asked.split(",") if each.strip()]
    if unknown := [each for each in named or [asked] if each not in known]:
        raise UsageError(f"--{option} cannot be {unknown[0]!r}; use some of {', '.join(known)}.")
    return tuple(label for label in known if label in named)


def _parse_slots(asked: str) -> tuple[int, ...]:
    """Numbers of slots such as ``1,2,4``, ascending.

    Raises:
        UsageError: not whole numbers above zero.
    """
    parts = [each.strip() for each in asked.split(",") if each.strip()]
    if not parts or not all(each.isascii() and each.isdecimal() and int(each) for each in parts):
        raise UsageError(f"The numbers of slots {asked!r} are not numbers such as 1,2,4.")
    return tuple(sorted(set(map(int, parts))))
