"""Where do persona and task add up? Additive substitution at one site ("As X, Do Y", §4 and §5).

Of each cell, four prompts: BB, XB, BY, XY. At a site (layer, position) the residuals of the four
give ΔX, ΔY and ΔXY. How well does ΔX + ΔY point along ΔXY? And if h_BB + ΔX + ΔY replaces the
residual of XY at that one site, how far do the next ten tokens move from where they were?

Where the sum misses in size and the tokens hardly move, is it the next block's norm that absorbs
the difference in size? The same distances after that norm, and the same substitution with the
size alone put right, or alone put wrong, say.
"""

import warnings
from itertools import product
from typing import Annotated

import torch
import xarray as xr
from nnsight import TransformersModel, save
from pydantic import Field
from torch import Tensor

from persona_nns.declarations import Variable, generated_index
from persona_nns.figures import cells_heatmap, compare_by_layer, lines_by_layer
from persona_nns.prompts import ROLE_PROMPTS, Cell, render_cell, tokens_from_first_site
from persona_nns.tracing import (
    additive,
    cos_additive,
    cos_persona_task,
    end_tokens,
    gap_ratio,
    index_sites,
    interaction_ratio,
    left_pad,
    log_probabilities,
    match_rms,
    open_window,
    prefill,
    read_clean_run,
    read_continuation,
    stack_windows,
    substitute,
    summed_kl,
    take,
)

protocol_version = 2
defaults = {"layers": "0.25,0.40,0.55,0.70,0.85", "positions": "p_last,g1,g2"}

variables = {
    "kl": Variable(
        "cell layer position",
        "causal KL",
        units="nat",
        description="KL(clean ‖ substituted) summed over the scored reference tokens, with "
        "h_BB + ΔX + ΔY in place of the XY residual at (layer, position).",
    ),
    "kl_rms_matched": Variable(
        "cell layer position",
        "causal KL, size put right",
        units="nat",
        description="The same with h_BB + ΔX + ΔY rescaled to the root mean square of h_XY.",
    ),
    "kl_rms_only": Variable(
        "cell layer position",
        "causal KL, size alone wrong",
        units="nat",
        description="The same with h_XY rescaled to the root mean square of h_BB + ΔX + ΔY.",
    ),
    "n_eval": Variable(
        "cell position",
        "scored tokens",
        units="token",
        description="Reference tokens the KL is summed over; fewer than asked for where the "
        "continuation ends early.",
        kind="int",
    ),
    "cos_additive": Variable(
        "cell layer position",
        "cos(ΔXY, ΔX+ΔY)",
        description="Directional alignment of the additive prediction with the combination.",
        every_layer=True,
    ),
    "cos_persona_task": Variable(
        "cell layer position",
        "cos(ΔX, ΔY)",
        description="Overlap of the persona effect with the task effect.",
        every_layer=True,
    ),
    "interaction_ratio": Variable(
        "cell layer position",
        "‖Inter‖ / ‖ΔXY‖",
        description="Size of what the sum leaves out, relative to the whole effect.",
        every_layer=True,
    ),
    "gap_ratio": Variable(
        "cell layer position",
        "‖h_add − h_XY‖ / ‖ΔXY‖",
        description="What the sum misses before the next block's norm; h_add = h_BB + ΔX + ΔY, "
        "so it is the interaction ratio.",
        every_layer=True,
    ),
    "gap_ratio_post_norm": Variable(
        "cell layer position",
        "‖N(h_add) − N(h_XY)‖ / ‖N(h_XY) − N(h_BB)‖",
        description="What the sum misses after N, the input norm of the block that reads the "
        "layer. NaN after the last block, and where blocks have no input norm (OLMo2).",
        every_layer=True,
    ),
    "residuals": Variable(
        "cell prompt layer position d_model",
        "residual",
        description="The residual stream of the four prompts at every site.",
        every_layer=True,
        coords={"prompt": ROLE_PROMPTS},
    ),
}


def beyond_embedding(results: xr.Dataset) -> xr.Dataset:
    """Without layer 0 where all four prompts are equal there (one token, no learned position)."""
    embedding = results.interaction_ratio.sel(layer=0)
    return results if bool((embedding > 0).any()) else results.sel(layer=slice(1, None))


figures = {
    "kl_by_layer": lambda ds: lines_by_layer(beyond_embedding(ds), ["kl"], log=True, reference=0.1),
    "cosines_by_layer": lambda ds: lines_by_layer(
        beyond_embedding(ds), ["cos_additive", "cos_persona_task", "interaction_ratio"]
    ),
    "norm": lambda ds: compare_by_layer(
        beyond_embedding(ds),
        {
            "relative distance": ["gap_ratio", "gap_ratio_post_norm"],
            "KL (nat)": ["kl", "kl_rms_matched", "kl_rms_only"],
        },
        position=ds.position.values.tolist()[0],
        log=["KL (nat)"],
    ),
    "kl_by_persona": lambda ds: cells_heatmap(beyond_embedding(ds), "kl", "persona"),
    "kl_by_task": lambda ds: cells_heatmap(beyond_embedding(ds), "kl", "task"),
}


def measure(
    model: TransformersModel,
    cells: list[Cell],
    *,
    layers: list[int],
    positions: list[str],
    n_eval: Annotated[int, Field(ge=1)] = 10,
    rms: bool = True,
    reuse: bool = True,
    keep_residuals: bool = False,
) -> dict[str, Tensor]:
    """Measure a batch of cells.

    Args:
        model: from `load_model`.
        cells: the cells; the leading axis of every result.
        layers: where the KL is measured (the geometry is measured at every layer).
        positions: position names; ``gK`` is teacher-forced on the clean XY continuation.
        n_eval: reference tokens that the KL is summed over.
        rms: measure ``kl_rms_matched`` and ``kl_rms_only`` too, at three times the interventions.
        reuse: run shared prefixes once and resume at the layer of the intervention.
        keep_residuals: return the residuals too.
    """
    prompts = [render_cell(model.tokenizer, cell) for cell in cells]
    n_forced = max(map(generated_index, positions))
    n_tokens = n_forced + n_eval
    n_shown = tokens_from_first_site(prompts, positions)

    # Each distinct prompt once, up to the first site: its keys and values are kept.
    n_cells = len(cells)
    rows = [prompt[name] for name in ROLE_PROMPTS for prompt in prompts]
    prefix = prefill(model, [row.ids[:-n_shown] for row in rows], reuse=reuse)
    before_xy = prefix.rows(slice(-n_cells, None)) if prefix is not None else None

    # The reference: what the model says, greedily, to the clean XY prompt. The pass that says it
    # is the clean run, whose distributions the others are compared with.
    xy = [prompt["XY"].ids for prompt in prompts]
    batch = left_pad(xy, device=model.device)
    with model.generate(
        batch.tokens,
        past_key_values=before_xy.cache() if before_xy is not None else None,
        max_new_tokens=n_tokens,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        output_hidden_states=True,
        return_dict_in_generate=True,
    ) as tracer:
        said = save(tracer.result)
    reference = read_continuation(said.sequences, batch.width, n_tokens, end_tokens(model))
    reference.warn_if_short([cell.label for cell in cells], n_tokens)
    run = read_clean_run(said, xy, reference.ids, before_xy)
    clean = log_probabilities(run.logits)

    # Residuals of the four prompts at every site, each prompt followed by the first reference
    # tokens and read at its own positions. [layer, cell, position, d_model]
    window = open_window(
        [row.ids for row in rows], reference.ids[:, :n_forced].repeat(len(ROLE_PROMPTS), 1), prefix
    )
    column = window.column(index_sites(rows, positions).to(model.device))
    has_norm = all(hasattr(block, "input_norm") for block in model.layers)
    if not has_norm:
        warnings.warn(
            "The blocks of this model have no input norm: gap_ratio_post_norm is NaN.", stacklevel=2
        )
    with model.trace(window.inputs(), logits_to_keep=1):
        read = [take(block.input, column) for block in model.layers]
        read = save(torch.stack([*read, take(model.final_norm.output, column)]).float())
        # What the block that reads the layer makes of it, in the model's own precision.
        bb, xb, by, together = read.split(n_cells, dim=1)
        residuals = torch.stack([additive(bb, xb, by), together, bb]).to(model.dtype)
        normed = save(
            [
                block.input_norm(residuals[:, layer]) if has_norm else residuals[:, layer]
                for layer, block in enumerate(model.layers)
            ]
        )
    bb, xb, by, together = read.split(n_cells, dim=1)
    prediction = additive(bb, xb, by)
    post_norm = torch.full(prediction.shape[:-1], torch.nan, device=model.device)
    if has_norm:
        post_norm[:-1] = gap_ratio(*torch.stack(normed, dim=1))

    # The clean run again with another residual at one site, once for each layer; the positions
    # are rows of one pass, next to each other: [position, cell]. The prediction; the prediction
    # with the size of the clean residual; and the clean residual with that of the prediction.
    written = {"kl": prediction}
    if rms:
        written["kl_rms_matched"] = match_rms(prediction, together)
        written["kl_rms_only"] = match_rms(together, prediction)
    nowhere = torch.full((n_cells, len(layers), len(positions)), torch.nan, device=model.device)
    kl = {name: nowhere.clone() for name in ("kl", "kl_rms_matched", "kl_rms_only")}
    site = index_sites([prompt["XY"] for prompt in prompts], positions).to(model.device)
    scored = [reference.scored(position, n_eval) for position in positions]
    firsts = [generated_index(position) for position in positions]
    reached = [p for p in range(len(positions)) if scored[p].any()]
    windows = [run.narrow(site[:, p], n_generated=firsts[p] + n_eval) for p in reached]
    for which, window in stack_windows(windows):
        places = [reached[k] for k in which]
        column = window.column(torch.cat([site[:, p] for p in places]))
        counted = torch.cat([scored[p] for p in places])
        expected = torch.cat([clean[:, firsts[p] : firsts[p] + n_eval] for p in places])
        for name, (k, layer) in product(written, enumerate(layers)):
            value = torch.cat([written[name][layer, :, p] for p in places])
            with model.trace(window.inputs(), logits_to_keep=n_eval):
                window.resume(model, layer)
                model.layers[layer].input = substitute(model.layers[layer].input, column, value)
                intervened = log_probabilities(model.output.logits)
                moved = save(summed_kl(expected, intervened, counted))
            moved = torch.where(counted.any(1), moved, torch.nan)
            kl[name][:, k, places] = moved.view(len(places), n_cells).T

    exists = torch.stack([reference.reaches(position) for position in positions], dim=1)

    def by_cell(values: Tensor) -> Tensor:  # [layer, cell, position] -> [cell, layer, position]
        return torch.where(exists[:, None], values.transpose(0, 1), torch.nan)

    results = {
        **kl,
        "n_eval": torch.stack([tokens.sum(1) for tokens in scored], dim=1),
        "cos_additive": by_cell(cos_additive(bb, xb, by, together)),
        "cos_persona_task": by_cell(cos_persona_task(bb, xb, by)),
        "interaction_ratio": by_cell(interaction_ratio(bb, xb, by, together)),
        "gap_ratio": by_cell(gap_ratio(prediction, together, bb)),
        "gap_ratio_post_norm": by_cell(post_norm),
    }
    if keep_residuals:  # [cell, prompt, layer, position, d_model]
        by_prompt = torch.stack([bb, xb, by, together]).permute(2, 0, 1, 3, 4)
        results["residuals"] = torch.where(exists[:, None, None, :, None], by_prompt, torch.nan)
    return results
