"""Where do persona and task add up? Additive substitution at one site ("As X, Do Y", §4 and §5).

Of each cell, four prompts: BB, XB, BY, XY. At a site (layer, position) the residuals of the four
give ΔX, ΔY and ΔXY. How well does ΔX + ΔY point along ΔXY? And if h_BB + ΔX + ΔY replaces the
residual of XY at that one site, how far do the next ten tokens move from where they were?

Where the sum misses in size and the tokens hardly move, is it the next block's norm that absorbs
the difference in size? The same distances after that norm, and the same substitution with the
size alone put right, or alone put wrong, say.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import xarray as xr
from matplotlib.figure import Figure
from nnsight import TransformersModel, save
from torch import Tensor

from persona_nns.declarations import Count, Variable, generated_index, scored_tokens
from persona_nns.figures import (
    cells_heatmap,
    compare_by_layer,
    few_positions,
    lines_by_layer,
    position_map,
    said_of_positions,
)
from persona_nns.prompts import ROLE_PROMPTS, Cell, Prompt, render_cell, tokens_from_first_site
from persona_nns.tracing import (
    CleanRun,
    Prefilled,
    additive,
    cos_additive,
    cos_persona_task,
    gap_ratio,
    has_input_norms,
    index_sites,
    interaction_ratio,
    keep_last,
    kl_of_logits,
    log_probabilities,
    match_rms,
    prefill_rows,
    run_clean,
    stack_layers,
    stack_windows,
    substitute,
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
        "KL, h_add rescaled to the RMS of h_XY",
        units="nat",
        description="The same with h_BB + ΔX + ΔY rescaled to the root mean square of h_XY.",
    ),
    "kl_rms_only": Variable(
        "cell layer position",
        "KL, h_XY rescaled to the RMS of h_add",
        units="nat",
        description="The same with h_XY rescaled to the root mean square of h_BB + ΔX + ΔY.",
    ),
    "n_eval": scored_tokens("cell position"),
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
        "‖ΔXY − ΔX − ΔY‖ / ‖ΔXY‖",
        description="Size of what the sum leaves out, relative to the whole effect.",
        every_layer=True,
    ),
    "gap_ratio": Variable(
        "cell layer position",
        "‖h_add − h_XY‖ / ‖h_XY − h_BB‖",
        description="What the sum misses before the next block's norm; h_add = h_BB + ΔX + ΔY, "
        "so it is the interaction ratio.",
        every_layer=True,
    ),
    "gap_ratio_post_norm": Variable(
        "cell layer position",
        "the same after the next norm",
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


_DELTAS = (
    "h: residual of a prompt; B: baseline, X: persona, Y: task. ΔX = h_XB − h_BB, ΔY = h_BY − "
    "h_BB, ΔXY = h_XY − h_BB."
)
_ADDED = "h_add = h_BB + ΔX + ΔY."
_CAUSAL = f"Causal KL: of the next tokens, with {_ADDED[:-1]} in place of h_XY."


def _noted(results: xr.Dataset, *notes: str) -> str:
    """Notes of a figure, with what `_drawn` leaves out."""
    whole = beyond_embedding(results).sizes["layer"] == results.sizes["layer"]
    out = "" if whole else "Layer 0 is left out: there all four prompts have the same token."
    return " ".join(note for note in (out, said_of_positions(results), *notes) if note)


def _drawn(results: xr.Dataset) -> xr.Dataset:
    """What a figure with a line or a panel for each position shows."""
    return few_positions(beyond_embedding(results))


def _norm_figure(results: xr.Dataset) -> Figure:
    """Distances and KL before and after the next norm, at p_last if it was measured."""
    positions = results.position.values.tolist()
    position = "p_last" if "p_last" in positions else positions[0]
    there = results.sel(position=[position])
    which = "Next norm: the input norm of the block that reads h."
    return compare_by_layer(
        beyond_embedding(there),
        {
            "relative distance": ["gap_ratio", "gap_ratio_post_norm"],
            "KL (nat)": ["kl", "kl_rms_matched", "kl_rms_only"],
        },
        position=position,
        log=["KL (nat)"],
        note=_noted(there, _CAUSAL, _DELTAS, which),
    )


figures = {
    "kl_by_layer": lambda ds: lines_by_layer(
        _drawn(ds), ["kl"], log=True, reference=0.1, note=_noted(ds, _CAUSAL, _DELTAS)
    ),
    "cosines_by_layer": lambda ds: lines_by_layer(
        _drawn(ds),
        ["cos_additive", "cos_persona_task", "interaction_ratio"],
        note=_noted(ds, _DELTAS),
    ),
    "norm": _norm_figure,
    "kl_by_persona": lambda ds: cells_heatmap(
        _drawn(ds), "kl", "persona", note=_noted(ds, _CAUSAL)
    ),
    "kl_by_task": lambda ds: cells_heatmap(_drawn(ds), "kl", "task", note=_noted(ds, _CAUSAL)),
    "kl_map": lambda ds: position_map(beyond_embedding(ds), "kl", note=_CAUSAL),
}


def measure(
    model: TransformersModel,
    cells: list[Cell],
    *,
    layers: list[int],
    positions: list[str],
    n_eval: Count = 10,
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
    sites = run_xy(model, cells, positions, n_eval, reuse=reuse)
    residuals, post_norm = read_sites(model, sites)
    bb, xb, by, xy = residuals
    prediction = additive(bb, xb, by)
    written = {"kl": prediction}
    if rms:
        written["kl_rms_matched"] = match_rms(prediction, xy)
        written["kl_rms_only"] = match_rms(xy, prediction)
    results = {**substitute_each(model, sites, written, layers), "n_eval": sites.scored.sum(2).T}
    geometry = {
        "cos_additive": cos_additive(bb, xb, by, xy),
        "cos_persona_task": cos_persona_task(bb, xb, by),
        "interaction_ratio": interaction_ratio(bb, xb, by, xy),
        "gap_ratio": gap_ratio(prediction, xy, bb),
        "gap_ratio_post_norm": post_norm,
    }
    for name, values in geometry.items():  # [layer, cell, position]
        results[name] = torch.where(sites.exists[:, None], values.transpose(0, 1), torch.nan)
    if keep_residuals:  # [cell, prompt, layer, position, d_model]
        exists = sites.exists[:, None, None, :, None]
        results["residuals"] = torch.where(exists, residuals.movedim(2, 0), torch.nan)
    return results


@dataclass(frozen=True)
class Sites:
    """The four prompts of each cell, and the clean run: what the model says, greedily, to XY."""

    prompts: Sequence[Prompt]  # BB of every cell, then XB, BY and XY
    rows: Prefilled  # up to the first site
    positions: Sequence[str]
    run: CleanRun
    forced: Tensor  # first tokens of the reference, [cell, token]
    exists: Tensor  # whether it is long enough for the position to exist, [cell, position]
    scored: Tensor  # [position, cell, token]


def run_xy(
    model: TransformersModel,
    cells: Sequence[Cell],
    positions: Sequence[str],
    n_eval: int,
    *,
    reuse: bool,
) -> Sites:
    """The clean run, whose distributions the others are compared with.

    Each distinct prompt is run once up to the first site: its keys and values are kept.
    """
    of_cell = [render_cell(model.tokenizer, cell) for cell in cells]
    prompts = [prompt[name] for name in ROLE_PROMPTS for prompt in of_cell]
    n_shown = tokens_from_first_site(of_cell, positions)
    rows = prefill_rows(model, [prompt.ids for prompt in prompts], n_shown, reuse=reuse)
    n_forced = max(map(generated_index, positions))
    n_tokens = n_forced + n_eval
    reference, run = run_clean(model, rows.some(slice(-len(cells), None)), n_tokens)
    reference.warn_if_short([cell.label for cell in cells], n_tokens)
    return Sites(
        prompts,
        rows,
        positions,
        run,
        forced=reference.ids[:, :n_forced],
        exists=torch.stack([reference.reaches(position) for position in positions], dim=1),
        scored=torch.stack([reference.scored(position, n_eval) for position in positions]),
    )


def read_sites(model: TransformersModel, sites: Sites) -> tuple[Tensor, Tensor]:
    """What stands at every site of the four prompts.

    Each prompt is followed by the first reference tokens and read at its own positions.

    Returns:
        The residuals, [prompt, layer, cell, position, d_model], and what additivity misses of
        them after the norm of the block that reads the layer, [layer, cell, position].
    """
    n_prompts = len(ROLE_PROMPTS)
    window = sites.rows.followed_by(sites.forced.repeat(n_prompts, 1))
    column = window.column(index_sites(sites.prompts, sites.positions).to(model.device))
    has_norm = has_input_norms(model)
    if not has_norm:
        warnings.warn(
            "The blocks of this model have no input norm: gap_ratio_post_norm is NaN.", stacklevel=3
        )
    with model.trace(window.inputs(), logits_to_keep=keep_last(0)):
        read = [take(block.input, column) for block in model.layers]
        read = save(stack_layers([*read, take(model.final_norm.output, column)]).float())
        # What the block that reads the layer makes of it, in the model's own precision.
        bb, xb, by, xy = read.chunk(n_prompts, dim=1)
        residuals = torch.stack([additive(bb, xb, by), xy, bb]).to(model.dtype)
        normed = save([])
        if has_norm:
            for layer, block in enumerate(model.layers):
                normed.append(block.input_norm(residuals[:, layer]))
    residuals = torch.stack(read.chunk(n_prompts, dim=1))
    post_norm = torch.full(residuals.shape[1:-1], torch.nan, device=model.device)
    if has_norm:
        post_norm[:-1] = gap_ratio(*stack_layers(normed, dim=1))
    return residuals, post_norm


def substitute_each(
    model: TransformersModel, sites: Sites, written: Mapping[str, Tensor], layers: Sequence[int]
) -> dict[str, Tensor]:
    """The clean run again with another residual at one site, once for each layer.

    The positions are rows of one pass, next to each other: [position, cell].

    Returns:
        KL of what is ``written``, [cell, layer, position]; NaN where no token is scored.
    """
    run, scored, clean = sites.run, sites.scored, log_probabilities(sites.run.logits)
    n_positions, n_cells, n_eval = scored.shape
    site = index_sites(sites.prompts[-n_cells:], sites.positions).to(model.device)
    firsts = [generated_index(position) for position in sites.positions]
    reached = [p for p in range(n_positions) if scored[p].any()]
    windows = [run.narrow(site[:, p], n_generated=firsts[p] + n_eval) for p in reached]
    nowhere = torch.full((n_cells, len(layers), n_positions), torch.nan, device=model.device)
    kl = {name: nowhere.clone() for name in ("kl", "kl_rms_matched", "kl_rms_only")}
    for which, window in stack_windows(windows):
        places = [reached[k] for k in which]
        column = window.column(torch.cat([site[:, p] for p in places]))
        counted = scored[places]
        expected = [clean[:, firsts[p] : firsts[p] + n_eval] for p in places]
        for name, (k, layer) in product(written, enumerate(layers)):
            value = torch.cat([written[name][layer, :, p] for p in places])
            with model.trace(window.inputs(), logits_to_keep=keep_last(n_eval)):
                window.resume(model, layer)
                model.layers[layer].input = substitute(model.layers[layer].input, column, value)
                rows = zip(expected, model.output.logits.split(n_cells), counted, strict=True)
                moved = save(torch.stack([kl_of_logits(*each) for each in rows]))
            moved = torch.where(counted.any(2), moved, torch.nan)
            kl[name][:, k, places] = moved.T
    return kl
