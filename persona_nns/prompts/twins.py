"""The prompts with a persona and without, of cells in which they are alike behind it."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from persona_nns.prompts.grids import Cell
from persona_nns.prompts.render import render_cells


@dataclass(frozen=True)
class Twins:
    """The two prompts of a cell.

    Attributes:
        label: the cell's.
        clean: token ids of XY.
        host: token ids of BY.
        persona: where the persona stands in XY.
        n_shared: tokens behind the persona; 0 where they are not the same in both.
    """

    label: str
    clean: tuple[int, ...]
    host: tuple[int, ...]
    persona: range
    n_shared: int


@dataclass(frozen=True)
class TwinCell:
    """A cell with the other tasks of its persona in the grid."""

    own: Twins
    others: tuple[Twins, ...]

    @property
    def label(self) -> str:
        """The cell's."""
        return self.own.label

    @property
    def place(self) -> dict[str, str]:
        """The cell's."""
        return {"cell": self.label}


def find_twins(tokenizer: PreTrainedTokenizerBase, cells: Sequence[Cell]) -> dict[str, Twins]:
    """The two prompts of each cell, by its label."""
    twins: dict[str, Twins] = {}
    for cell, prompts in zip(cells, render_cells(tokenizer, cells, ("XY", "BY")), strict=True):
        clean, host = prompts["XY"], prompts["BY"]
        behind, others = (of.ids[of.spans["persona"].stop :] for of in (clean, host))
        n_shared = len(behind) if behind == others else 0
        persona = clean.spans["persona"]
        twins[cell.label] = Twins(cell.label, clean.ids, host.ids, persona, n_shared)
    return twins
