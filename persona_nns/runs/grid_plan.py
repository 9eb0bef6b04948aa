"""The plan of a grid: its cells are the units, and each distinct prompt is rendered once."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace

from transformers import PreTrainedTokenizerBase

from persona_nns.declarations.plans import Plan
from persona_nns.prompts.grids import Cell, Grid, PromptName
from persona_nns.prompts.positions import position_index
from persona_nns.prompts.render import ROLE_PROMPTS, Prompt, prompt_names, render_cells
from persona_nns.prompts.templates import takes_system_role

# What of a cell is part of a run's identity. The frame is there through the token ids.
_CONTENT = tuple(part.name for part in fields(Cell) if part.name != "frame")


def plan_grid(tokenizer: PreTrainedTokenizerBase, grid: Grid, positions: Sequence[str]) -> Plan:
    """A plan whose units are the cells of a grid.

    Args:
        tokenizer: the model's.
        grid: with its frame.
        positions: that have to exist in every prompt.

    Raises:
        UsageError: no chat template, or a prompt too short for a position.
    """
    plan = plan_of_grid(grid, render_grid(tokenizer, grid, positions))
    if not grid.frame.has_system_message:
        return plan
    return replace(plan, attrs={**plan.attrs, "system_role": takes_system_role(tokenizer)})


def plan_of_grid(grid: Grid, prompts: Mapping[str, Mapping[PromptName, Prompt]]) -> Plan:
    """A plan whose units are the cells of a grid, with their rendered prompts."""
    cells, defaults = grid.cells, list(grid.default_baselines)
    return Plan(
        name=grid.name,
        units=cells,
        axes={"cell": [cell.label for cell in cells]},
        unit_axes=("cell",),
        content={cell.label: {name: getattr(cell, name) for name in _CONTENT} for cell in cells},
        token_ids={
            cell: {name: prompt.ids for name, prompt in of_cell.items()}
            for cell, of_cell in prompts.items()
        },
        digest=grid.digest,
        coords={
            "persona": ("cell", [cell.persona for cell in cells]),
            "task": ("cell", [cell.task for cell in cells]),
        },
        attrs={
            "personas": dict(grid.personas),
            "tasks": dict(grid.tasks),
            "markers": {persona: list(words) for persona, words in grid.markers.items()},
            "frame": [asdict(message) for message in grid.frame.messages],
            **({"default_baselines": defaults} if defaults else {}),
        },
        shown={cell: of_cell["XY"].shown for cell, of_cell in prompts.items()},
    )


def render_grid(
    tokenizer: PreTrainedTokenizerBase, grid: Grid, positions: Sequence[str]
) -> dict[str, dict[PromptName, Prompt]]:
    """Render every prompt of every cell, and see that the positions exist in them.

    Raises:
        UsageError: no chat template, or a prompt too short for a position.
    """
    cells = grid.cells
    rendered = render_cells(tokenizer, cells, prompt_names(tokenizer, grid.frame))
    # Cells share prompts: each is looked at once.
    distinct = {id(of_cell[name]): of_cell[name] for of_cell in rendered for name in ROLE_PROMPTS}
    for prompt in distinct.values():
        for position in positions:
            position_index(prompt, position)
    return {cell.label: of_cell for cell, of_cell in zip(cells, rendered, strict=True)}
