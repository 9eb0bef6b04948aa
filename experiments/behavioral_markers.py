"""Do the persona's words survive? Markers in what is said after a substitution (§6).

Of each cell, 80 greedy tokens under four conditions: the clean XY prompt; XY with
h_BB + ΔX + ΔY in place of its residual at p_last of one layer; XY with the persona's effect taken
out there, h_XY − ΔX; and the task alone. How often do words that give the persona away occur?
"""

from typing import Annotated, Any

import torch
import xarray as xr
from matplotlib.figure import Figure
from nnsight import TransformersModel, save
from pydantic import Field

from persona_nns.declarations import Variable
from persona_nns.figures import estimates, shares_heatmap
from persona_nns.prompts import ROLE_PROMPTS, Cell, count_markers, render_cell, require_markers
from persona_nns.tracing import (
    additive,
    end_tokens,
    left_pad,
    open_window,
    prefill,
    read_continuation,
    substitute,
)

protocol_version = 1
# Layer 14 of the 26 of Gemma-2-2B, and the layer nearest to that depth elsewhere.
defaults = {"grid": "review", "layers": "0.5385"}

CONDITIONS = ("clean", "additive", "remove_persona", "bare")

variables = {
    "any_marker": Variable(
        "cell layer condition",
        "any persona marker",
        description="Whether a marker of the cell's persona occurs in the text; clean and bare do "
        "not depend on the layer and repeat over it.",
        kind="bool",
        coords={"condition": CONDITIONS},
    ),
    "distinct_markers": Variable(
        "cell layer condition",
        "distinct persona markers",
        description="How many different markers of the cell's persona occur in the text.",
        kind="int",
        coords={"condition": CONDITIONS},
    ),
    "text": Variable(
        "cell layer condition",
        "greedy continuation",
        description="What is said, special tokens left out.",
        kind="text",
        coords={"condition": CONDITIONS},
    ),
}


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
    prompts = [render_cell(model.tokenizer, cell, (*ROLE_PROMPTS, "BARE")) for cell in cells]
    rows = {name: [prompt[name].ids for prompt in prompts] for name in (*ROLE_PROMPTS, "BARE")}

    # Residuals of the four prompts at p_last, each its own. [layer, cell, d_model]
    nothing = torch.empty(len(cells), 0, dtype=torch.long, device=model.device)
    residual = {}
    bare = list(dict.fromkeys(rows["BARE"]))
    everything = [*(ids for name in ROLE_PROMPTS for ids in rows[name]), *bare]
    shared = prefill(model, [ids[:-1] for ids in everything], reuse=reuse)
    for k, name in enumerate(ROLE_PROMPTS):
        of_prompt = slice(k * len(cells), (k + 1) * len(cells))
        window = open_window(rows[name], nothing, shared.rows(of_prompt) if shared else None)
        with model.trace(window.inputs(), logits_to_keep=1):
            read = save([model.layers[layer].input[:, -1] for layer in layers])
        residual[name] = torch.stack(read).float()
    bb, xb, by, together = (residual[name] for name in ROLE_PROMPTS)
    written = {"additive": additive(bb, xb, by), "remove_persona": together - (xb - bb)}

    def texts(said: torch.Tensor, n_prompt: int) -> list[str]:
        return read_continuation(said, n_prompt, n_tokens, end_tokens(model)).texts(model.tokenizer)

    # Clean: what is said to XY, and to the task alone (the same for every persona).
    asked = everything[3 * len(cells) :]  # XY is the last of the four
    prefix = shared.rows(slice(3 * len(cells), None)) if shared else None
    batch = left_pad(asked, device=model.device)
    with model.generate(
        batch.tokens,
        past_key_values=prefix.cache() if prefix is not None else None,
        max_new_tokens=n_tokens,
        do_sample=False,
        num_beams=1,
    ) as tracer:
        said = save(tracer.result)
    answers = texts(said, batch.input_ids.shape[1])
    clean, alone = answers[: len(cells)], dict(zip(bare, answers[len(cells) :], strict=True))

    # XY again, with another residual at p_last: the only column that the first step runs, or the
    # last of those it runs. Both substitutions at once, once for each layer.
    twice = [*rows["XY"], *rows["XY"]]
    again = torch.arange(len(cells), device=model.device).repeat(2)
    prefix = prefix.rows(again) if prefix is not None else None
    batch = left_pad(twice, device=model.device)
    p_last = batch.input_ids.shape[1] - 1 - (0 if prefix is None else prefix.width)
    column = torch.full((len(twice),), p_last, device=model.device)
    intervened = []
    for k, layer in enumerate(layers):
        value = torch.cat([written["additive"][k], written["remove_persona"][k]])
        with model.generate(
            batch.tokens,
            past_key_values=prefix.cache() if prefix is not None else None,
            max_new_tokens=n_tokens,
            do_sample=False,
            num_beams=1,
        ) as tracer:
            model.layers[layer].input = substitute(model.layers[layer].input, column, value)
            said = save(tracer.result)
        intervened.append(texts(said, batch.input_ids.shape[1]))

    by_cell = [  # [cell][layer][condition]
        [
            [clean[row], of_layer[row], of_layer[len(cells) + row], alone[rows["BARE"][row]]]
            for of_layer in intervened
        ]
        for row in range(len(cells))
    ]
    distinct = torch.tensor(
        [
            [[count_markers(text, cell) for text in of_layer] for of_layer in of_cell]
            for cell, of_cell in zip(cells, by_cell, strict=True)
        ]
    )
    return {"any_marker": distinct > 0, "distinct_markers": distinct, "text": by_cell}
