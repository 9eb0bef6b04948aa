"""Do the persona's words survive? Markers in what is said after a substitution (§6).

Of each cell, 80 greedy tokens under four conditions: the clean XY prompt; XY with
h_BB + ΔX + ΔY in place of its residual at p_last of one layer; XY with the persona's effect taken
out there, h_XY − ΔX; and the task alone. How often do words that give the persona away occur?
"""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import xarray as xr
from matplotlib.figure import Figure
from nnsight import TransformersModel, save
from pydantic import Field
from torch import Tensor

from persona_nns.declarations import marker_variables
from persona_nns.figures import estimates, shares_heatmap
from persona_nns.prompts import ROLE_PROMPTS, Cell, render_cell, require_markers
from persona_nns.tracing import (
    KVCache,
    additive,
    end_tokens,
    greedily,
    left_pad,
    mark,
    open_window,
    prefill,
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
    return estimates(results, {"any_marker": "mean", "distinct_markers": "mean"}, x=x, hue=hue)


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
    n_tokens: Annotated[int, Field(ge=1)] = 80,
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
    n_cells = len(cells)
    prompts = [render_cell(model.tokenizer, cell, (*ROLE_PROMPTS, "BARE")) for cell in cells]
    bare = list(dict.fromkeys(prompt["BARE"].ids for prompt in prompts))  # alike for all personas
    rows = [*(prompt[name].ids for name in ROLE_PROMPTS for prompt in prompts), *bare]
    shared = prefill(model, [ids[:-1] for ids in rows], reuse=reuse)

    bb, xb, by, xy = (
        read_last(model, rows[of_name], shared and shared.rows(of_name), layers)
        for of_name in (slice(k * n_cells, (k + 1) * n_cells) for k in range(len(ROLE_PROMPTS)))
    )
    written = torch.cat([additive(bb, xb, by), xy - (xb - bb)], dim=1)

    unmoved = slice(3 * n_cells, None)  # XY, the last of the four, and the task alone
    prefix = shared and shared.rows(unmoved)
    said = say(model, rows[unmoved], prefix, n_tokens).texts(model.tokenizer)
    clean, alone = said[:n_cells], dict(zip(bare, said[n_cells:], strict=True))

    rows = [prompt["XY"].ids for prompt in prompts] * 2
    prefix = prefix and prefix.rows(torch.arange(n_cells, device=model.device).repeat(2))
    moved = [
        say_substituted(model, rows, prefix, layer, value, n_tokens)
        for layer, value in zip(layers, written, strict=True)
    ]
    text = [  # [cell][layer][condition]
        [[clean[c], said[c], said[n_cells + c], alone[prompt["BARE"].ids]] for said in moved]
        for c, prompt in enumerate(prompts)
    ]
    return mark(text, cells)


def read_last(
    model: TransformersModel,
    rows: Sequence[Sequence[int]],
    prefix: KVCache | None,
    layers: Sequence[int],
) -> Tensor:
    """Residuals of prompts at p_last, [layer, cell, d_model]."""
    nothing = torch.empty(len(rows), 0, dtype=torch.long, device=model.device)
    window = open_window(rows, nothing, prefix)
    with model.trace(window.inputs(), logits_to_keep=1):
        residual = save([model.layers[layer].input[:, -1] for layer in layers])
    return torch.stack(residual).float()


def say_substituted(
    model: TransformersModel,
    rows: Sequence[Sequence[int]],
    prefix: KVCache | None,
    layer: int,
    value: Tensor,
    n_tokens: int,
) -> list[str]:
    """What is said with another residual at p_last, the last column that the first step runs."""
    batch = left_pad(rows, device=model.device)
    p_last = torch.full((len(rows),), -1, device=model.device)
    with model.generate(batch.tokens, **greedily(prefix, n_tokens)) as tracer:
        model.layers[layer].input = substitute(model.layers[layer].input, p_last, value)
        said = save(tracer.result)
    said = read_continuation(said, batch.width, n_tokens, end_tokens(model))
    return said.texts(model.tokenizer)
