"""Cells that know the tokens of their persona, and how many the longest persona has."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from persona_nns.declarations.plans import Label, Plan
from persona_nns.prompts.grids import Cell
from persona_nns.prompts.render import RenderedCell, render_cells


@dataclass(frozen=True)
class PersonaCell:
    """A cell with its prompts XY and BY.

    Attributes:
        cell: the cell.
        n_longest: tokens of the longest persona of all cells, whichever are asked for.
    """

    cell: RenderedCell
    n_longest: int

    @property
    def label(self) -> str:
        """The cell's."""
        return self.cell.label

    @property
    def place(self) -> Mapping[str, Label]:
        """The cell's."""
        return self.cell.place

    @property
    def tokens(self) -> list[int]:
        """Ids of the persona's tokens in XY."""
        prompt = self.cell.prompts["XY"]
        return [prompt.ids[k] for k in prompt.spans["persona"]]


def label_tokens(tokenizer: PreTrainedTokenizerBase, plan: Plan) -> Plan:
    """A grid's plan with a dimension ``token``, the place of a token in its persona.

    Its units are `PersonaCell`.
    """
    own = [unit for unit in plan.units if isinstance(unit, Cell)]
    prompts = render_cells(tokenizer, own, ("XY", "BY"))
    cells = [RenderedCell(**vars(cell), prompts=of) for cell, of in zip(own, prompts, strict=True)]
    n_longest = max(len(cell.prompts["XY"].spans["persona"]) for cell in cells)
    return replace(
        plan,
        units=[PersonaCell(cell, n_longest) for cell in cells],
        axes={**plan.axes, "token": list(range(n_longest))},
    )
