"""Can one residual stand in for the persona's text? Injection into a host without it (§7).

The host is the BY prompt: baseline persona, the cell's task. At its p_last, at each layer of a
set, its residual is replaced by a source's: `cached`, h_BB + ΔX + ΔY, or `oracle`, the long
persona's own h_XY. How much nearer does that bring its next-token distributions, teacher-forced
on what the long-persona prompt says, to those of the long-persona prompt?

And does what the host then says of its own carry the persona? 80 greedy tokens under each source,
injected at p_last alone, or at p_last, g1 and g2 as each of them is reached.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from nnsight import TransformersModel, save
from torch import Tensor

from persona_nns.declarations import (
    Count,
    Variable,
    label_layer_set,
    marker_variables,
    scored_tokens,
)
from persona_nns.figures import closure_figure, estimates, host_markers
from persona_nns.prompts import ROLE_PROMPTS, Cell, render_cell, warn_without_markers
from persona_nns.tracing import (
    CleanRun,
    Continuation,
    Prefilled,
    additive,
    closure,
    end_tokens,
    entry,
    force,
    greedily,
    left_pad,
    log_probabilities,
    mark,
    prefill_rows,
    put,
    read_continuation,
    say,
    substitute,
    summed_kl,
    until_end_of_text,
)

protocol_version = 1
# Layer 14 of the 26 of Gemma-2-2B, and the layer nearest to that depth elsewhere.
defaults = {"grid": "review", "layer_sets": "0.5385"}

SOURCES = ("none", "cached", "oracle")
JOINT_SITE = ("p_last", "g1", "g2")
SITES = ("p_last", "+".join(JOINT_SITE))

_by_set = {
    "layer_set": lambda _, parameters: [label_layer_set(s) for s in parameters["layer_sets"]],
    "source": SOURCES,
}

variables = {
    "kl": Variable(
        "cell layer_set source",
        "KL to the long persona",
        units="nat",
        description="KL(long persona ‖ host) summed over the scored reference tokens, with the "
        "source injected at the host's p_last at each layer of the set; none repeats over sets.",
        coords=_by_set,
    ),
    "closure": Variable(
        "cell layer_set source",
        "closure",
        description="Share of the gap between host and long persona that the injection removes, "
        "1 − KL / KL(none); NaN where there is no gap.",
        coords=_by_set,
    ),
    "n_eval": scored_tokens(),
    **marker_variables(
        "cell site source",
        "greedy continuation of the host",
        {"site": SITES, "source": SOURCES},
        any_marker="Whether a marker of the cell's persona occurs in the host's continuation, with "
        "the source injected at the first layer set; none repeats over sites.",
        distinct_markers="How many different markers of the cell's persona occur in it.",
        text="What the host says, special tokens left out, with the source injected at the first "
        "layer set.",
    ),
    "clean_any_marker": Variable(
        "cell",
        "any persona marker, long persona",
        description="Whether one occurs in what the long-persona prompt says.",
        kind="bool",
    ),
    "clean_distinct_markers": Variable(
        "cell",
        "distinct persona markers, long persona",
        description="How many different ones occur in it.",
        kind="int",
        unmeasured=-1,
    ),
    "clean_text": Variable(
        "cell",
        "greedy continuation of the long persona",
        description="What the long-persona prompt says, special tokens left out.",
        kind="text",
    ),
}

figures = {
    "kl": lambda ds: estimates(
        ds,
        {"kl": "median"},
        x="layer_set",
        hue="source",
        note="Injected into the host: cached, h_BB + ΔX + ΔY; oracle, the long persona's h_XY.",
    ),
    "closure": closure_figure,
    "markers": host_markers,
}


def measure(
    model: TransformersModel,
    cells: list[Cell],
    *,
    layer_sets: list[list[int]],
    n_eval: Count = 10,
    n_tokens: Count = 80,
    reuse: bool = True,
) -> dict[str, Any]:
    """Measure a batch of cells.

    Args:
        model: from `load_model`.
        cells: the cells; the leading axis of every result.
        layer_sets: sets of layers to inject at; texts are generated for the first of them.
        n_eval: reference tokens that the KL is summed over.
        n_tokens: greedy tokens of each continuation.
        reuse: run shared prefixes once and resume at the lowest layer of an injection.
    """
    warn_without_markers(cells)
    prompts = prefill_prompts(model, cells, reuse=reuse)
    # The reference: what the model says, greedily, to the long-persona prompt.
    reference = say(model, prompts["XY"], max(n_tokens, n_eval, len(JOINT_SITE) - 1))
    reference.warn_if_short([cell.label for cell in cells], n_eval)
    scored = reference.scored("p_last", n_eval)
    # The four prompts, each followed by the same reference tokens.
    forced = reference.ids[:, : max(n_eval, len(JOINT_SITE)) - 1]
    runs = {name: force(model, prompts[name], forced) for name in ROLE_PROMPTS}
    source = read_sources(runs)
    clean, host = (log_probabilities(runs[name].logits[:, :n_eval]) for name in ("XY", "BY"))
    none = summed_kl(clean, host, scored)[:, None, None]
    kl = none.repeat(1, len(layer_sets), len(SOURCES))
    for (s, layers), (name, value) in product(enumerate(layer_sets), source.items()):
        logits = inject(model, runs["BY"], layers, value[:, :, 0])[:, :n_eval]
        kl[:, s, SOURCES.index(name)] = summed_kl(clean, log_probabilities(logits), scored)

    text = say_injected(model, prompts["BY"], source, reference, layer_sets[0], n_tokens)
    of_clean = mark(reference.first(n_tokens).texts(model.tokenizer), cells)
    return {
        "kl": kl,
        "closure": closure(kl, none),
        "n_eval": scored.sum(1),
        **mark(text, cells),
        **{f"clean_{name}": value for name, value in of_clean.items()},
    }


def prefill_prompts(
    model: TransformersModel, cells: Sequence[Cell], *, reuse: bool
) -> dict[str, Prefilled]:
    """The four prompts of each cell; everything before p_last is run once."""
    prompts = [render_cell(model.tokenizer, cell) for cell in cells]
    rows = [prompt[name].ids for name in ROLE_PROMPTS for prompt in prompts]
    shared = prefill_rows(model, rows, reuse=reuse)
    starts = range(0, len(rows), len(cells))
    parts = [shared.some(slice(start, start + len(cells))) for start in starts]
    return dict(zip(ROLE_PROMPTS, parts, strict=True))


def read_sources(runs: Mapping[str, CleanRun]) -> dict[str, Tensor]:
    """What is injected at p_last, g1 and g2: [layer, cell, step, d_model]."""
    from_p_last = [runs[name].residual[:, :, runs[name].n_prompt - 1 :] for name in ROLE_PROMPTS]
    bb, xb, by, xy = (columns[:, :, : len(JOINT_SITE)].float() for columns in from_p_last)
    return {"cached": additive(bb, xb, by), "oracle": xy}


def inject(
    model: TransformersModel, host: CleanRun, layers: Sequence[int], value: Tensor
) -> Tensor:
    """The host's logits with a source at its p_last, at each layer of a set at once."""
    n_kept = host.logits.shape[1]
    window = host.narrow(host.p_last, n_kept)
    column = window.column(host.p_last)
    with model.trace(window.inputs(), logits_to_keep=n_kept):
        window.resume(model, layers[0])
        for layer in layers:
            hidden = model.layers[layer].input
            model.layers[layer].input = substitute(hidden, column, value[layer])
        logits = save(model.output.logits)
    return logits  # noqa: RET504 - there only once the trace has run


def say_injected(
    model: TransformersModel,
    host: Prefilled,
    source: Mapping[str, Tensor],
    reference: Continuation,
    layers: Sequence[int],
    n_tokens: int,
) -> list[list[list[str]]]:
    """What the host says, once as it is for each task, and for each cell with a source.

    It is put at p_last, or at p_last and then at g1 and g2 as each is reached. A site that the
    reference, which the sources are read on, does not have is left as it is.

    Returns:
        [cell][site][source]
    """
    exists = torch.stack([reference.reaches(position) for position in JOINT_SITE], dim=1)
    n_cells, n_steps = exists.shape
    own = list(dict.fromkeys(host.rows))
    injections = list(product(SITES, source))
    prompts = host.some([*map(host.rows.index, own), *(list(range(n_cells)) * len(injections))])
    only_p_last = exists & (torch.arange(n_steps, device=model.device) == 0)
    reached = {SITES[0]: only_p_last, SITES[1]: exists}
    where = torch.cat([reached[site] for site, _ in injections])  # [row, step]
    where = torch.nn.functional.pad(where, (0, 0, len(own), 0))
    value = torch.cat([source[name] for _, name in injections], dim=1)  # [layer, row, step, d]
    value = torch.nn.functional.pad(value, (0, 0, 0, 0, len(own), 0))
    batch = left_pad(prompts.rows, device=model.device)
    with until_end_of_text(), model.generate(**greedily(prompts, n_tokens)) as tracer:
        with tracer.invoke(batch.tokens):
            for step in tracer.iter[: min(n_tokens, n_steps)]:
                for layer in layers:
                    hidden = entry(model, layer).output
                    column = torch.arange(hidden.shape[1], device=hidden.device)
                    at = where[:, step, None] & (column == hidden.shape[1] - 1)
                    entry(model, layer).output = put(hidden, at, value[layer, :, step, None])
        with tracer.invoke():
            said = save(tracer.result)
    said = read_continuation(said, batch.width, n_tokens, end_tokens(model))
    texts = said.texts(model.tokenizer)
    unmoved = dict(zip(own, texts, strict=False))
    by_source = {(site, "none"): [unmoved[ids] for ids in host.rows] for site in SITES}
    for k, injection in enumerate(injections):
        by_source[injection] = texts[len(own) + k * n_cells :][:n_cells]
    by_site = [[by_source[site, name] for name in SOURCES] for site in SITES]
    return [[[texts[c] for texts in of_site] for of_site in by_site] for c in range(n_cells)]
