"""Do the persona's words survive? Markers in what is said after a substitution (§6).

Of each cell, 80 greedy tokens under four conditions: the clean XY prompt; XY with
h_BB + ΔX + ΔY in place of its residual at p_last of one layer; XY with the persona's effect taken
out there, h_XY − ΔX; and the task alone. How often do words that give the persona away occur?
"""

from typing import Any

import torch
import xarray as xr
from matplotlib.figure import Figure
from nnsight import TransformersModel, save
from torch import Tensor

from persona_nns.declarations import Count, marker_variables
from persona_nns.figures import estimates, shares_heatmap
from persona_nns.prompts import ROLE_PROMPTS, Cell, render_cell, require_markers
from persona_nns.tracing import (
    Prefilled,
    additive,
    end_tokens,
    entry,
    force,
    greedily,
    left_pad,
    mark,
    prefill_rows,
    read_continuation,
    say,
    substitute,
)

protocol_version = 1
# Layer 14 of the 26 of Gemma-2-2B, and the layer nearest to that depth elsewhere.
defaults = {"grid": "review", "layers": "0.5385"}

CONDITIONS = ("clean", "additive", "remove_persona", "bare")

variables = marker_variables(
    "cell layer condition",
    "greedy continuation",
    {"condition": CONDITIONS},
    any_marker="Whether a marker of the cell's persona occurs in the text; clean and bare do not "
    "depend on the layer and repeat over it.",
    distinct_markers="How many different markers of the cell's persona occur in the text.",
    text="What is said, special tokens left out.",
)


def markers_figure(results: xr.Dataset) -> Figure:
    """Rates and counts: by condition for an injection layer or few, by layer for many."""
    x, hue = ("condition", "layer") if results.sizes["layer"] <= 4 else ("layer", "condition")
    said = "additive: h_BB + ΔX + ΔY in place of h_XY; remove_persona: h_XY − ΔX; bare: no persona."
    return estimates(
        results, {"any_marker": "mean", "distinct_markers": "mean"}, x=x, hue=hue, note=said
    )


figures = {
    "markers": markers_figure,
    "markers_by_persona": lambda ds: shares_heatmap(ds, "any_marker", "persona", "condition"),
    "markers_by_task": lambda ds: shares_heatmap(ds, "any_marker", "task", "condition"),
}


def measure(
    model: TransformersModel,
    cells: list[Cell],
    *,
    layers: list[int],
    n_tokens: Count = 80,
    reuse: bool = True,
) -> dict[str, Any]:
    """Measure a batch of cells.

    Args:
        model: from `load_model`.
        cells: the cells; the leading axis of every result.
        layers: where p_last is written to, one layer at a time.
        n_tokens: greedy tokens of each continuation.
        reuse: run shared prefixes once.
    """
    require_markers(cells)
    prompts = [render_cell(model.tokenizer, cell, (*ROLE_PROMPTS, "BARE")) for cell in cells]
    role = [prompt[name].ids for name in ROLE_PROMPTS for prompt in prompts]
    bare = list(dict.fromkeys(prompt["BARE"].ids for prompt in prompts))  # alike for all personas
    rows, n_cells = prefill_rows(model, [*role, *bare], reuse=reuse), len(cells)
    of_role = [rows.some(slice(k, k + n_cells)) for k in range(0, len(role), n_cells)]

    # Residuals of the four prompts at p_last, each its own. [layer, cell, d_model]
    nothing = torch.empty(n_cells, 0, dtype=torch.long, device=model.device)
    runs = [force(model, each, nothing) for each in of_role]
    bb, xb, by, xy = (run.residual[layers, :, -1].float() for run in runs)
    written = torch.cat([additive(bb, xb, by), xy - (xb - bb)], dim=1)

    # Clean: what is said to XY, the last of the four, and to the task alone.
    said = say(model, rows.some(slice(3 * n_cells, None)), n_tokens).texts(model.tokenizer)
    clean, alone = said[:n_cells], dict(zip(bare, said[n_cells:], strict=True))

    # XY again, with both substitutions at once, once for each layer.
    twice = of_role[-1].some([*range(n_cells)] * 2)
    moved = [
        say_substituted(model, twice, layer, value, n_tokens)
        for layer, value in zip(layers, written, strict=True)
    ]
    text = [  # [cell][layer][condition]
        [[clean[c], said[c], said[n_cells + c], alone[prompt["BARE"].ids]] for said in moved]
        for c, prompt in enumerate(prompts)
    ]
    return mark(text, cells)


def say_substituted(
    model: TransformersModel, prompts: Prefilled, layer: int, value: Tensor, n_tokens: int
) -> list[str]:
    """What is said with another residual at p_last, the last column that the first step runs."""
    batch = left_pad(prompts.rows, device=model.device)
    p_last = torch.full((len(value),), -1, device=model.device)
    site = entry(model, layer)
    with model.generate(batch.tokens, **greedily(prompts, n_tokens)) as tracer:
        site.output = substitute(site.output, p_last, value)
        said = save(tracer.result)
    said = read_continuation(said, batch.width, n_tokens, end_tokens(model))
    return said.texts(model.tokenizer)
