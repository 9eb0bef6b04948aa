"""What carries a persona? Spans of the key-value cache, grafted into a host that has none.

The host is the prompt with the baseline persona and the cell's task (BY), the source the prompt
with the cell's persona (XY). Spans of the source's cache overwrite the host's, for all layers or
for a band of them; p_last and the greedy continuation of XY then run forward on the grafted
cache. How much of the distance to the source does each graft close?
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from nnsight import TransformersModel, save
from pydantic import AfterValidator
from torch import Tensor

from persona_nns.declarations import (
    CONTENT,
    EVERY_BAND,
    LATER,
    Count,
    FileName,
    ModelRecord,
    Variable,
    bands_of,
    check_bands,
    choose_bands,
    marker_variables,
    scored_tokens,
)
from persona_nns.figures import closure_by_band, closure_by_graft, closure_heatmap
from persona_nns.models import check_cartridges
from persona_nns.prompts import (
    Cell,
    PromptName,
    Span,
    count_each,
    warn_without_markers,
)
from persona_nns.tracing import (
    Cartridge,
    GraftSources,
    KVCache,
    Origins,
    Piece,
    Prefilled,
    Reference,
    Window,
    block_keys,
    closure,
    fill_sources,
    graft_spans,
    grafted_tokens,
    host_with,
    log_probabilities,
    open_persona_slots,
    open_slots,
    read_host,
    read_reference,
    say,
    splice,
    summed_kl,
    take,
)

protocol_version = 2
defaults = {"grid": "review"}


# Spans of the clean prompt in the host; the prefix is always the host's. `persona_cached` is the
# persona span as computed once before the baseline task. `additive` is none: see `add_persona`.
GRAFTS: dict[str, Origins] = {
    "none": host_with(),
    "persona": host_with(persona="XY"),
    "task": host_with(task="XY"),
    "tail": host_with(tail="XY"),
    "persona+task": host_with(persona="XY", task="XY"),
    "persona+tail": host_with(persona="XY", tail="XY"),
    "task+tail": host_with(task="XY", tail="XY"),
    "all": host_with(persona="XY", task="XY", tail="XY"),
    "persona_cached": host_with(persona="XB"),
}
LABELS = (*GRAFTS, "additive")
CONTINUED = ("none", "persona", "all")


def check_grafts(grafts: str) -> str:
    """The labels asked for, in one order and with ``none``, which closure is measured from."""
    asked = [label.strip() for label in grafts.split(",")]
    if unknown := [label for label in asked if label not in LABELS]:
        raise ValueError(f"there is no graft {', '.join(unknown)}; use {', '.join(LABELS)}")
    return ",".join(label for label in LABELS if label == "none" or label in asked)


def graft_labels(_: ModelRecord, parameters: Mapping[str, Any]) -> list[str]:
    """The grafts of a run; `cartridge` comes last, where there is one."""
    return [*parameters["grafts"].split(","), *(["cartridge"] if parameters["cartridge"] else [])]


_ONLY_PERSONA = "Bands other than 'all' are measured for the graft 'persona'."
_OF_PERSONAS = "The graft 'cartridge' is that of the cell's persona; NaN where none is given."
_ONLY_CONTINUED = f"Measured for the grafts {', '.join(CONTINUED)}."
_coords = {
    "graft": graft_labels,
    "layer_band": lambda record, asked: choose_bands(asked["bands"], record.n_layers),
}

variables = {
    "kl": Variable(
        "cell graft layer_band",
        "causal KL",
        units="nat",
        description="KL(clean XY ‖ grafted host) summed over the scored tokens of the clean "
        f"greedy continuation. {_ONLY_PERSONA}",
        coords=_coords,
    ),
    "closure": Variable(
        "cell graft layer_band",
        "closure",
        description="Share of the host gap removed: 1 − KL / KL(none), in each cell; "
        f"NaN where there is no gap. {_ONLY_PERSONA} {_OF_PERSONAS}",
        coords=_coords,
    ),
    "cache_bytes": Variable(
        "cell graft layer_band",
        "grafted keys and values",
        units="byte",
        description="Size of the keys and values that are put into the host, in the model's "
        f"precision. {_ONLY_PERSONA}",
        kind="int",
        unmeasured=-1,
        coords=_coords,
    ),
    "n_eval": scored_tokens(),
    **marker_variables(
        "cell graft",
        "continuation",
        {"graft": graft_labels},
        text=f"Greedy continuation of the grafted host. {_ONLY_CONTINUED}",
        any_marker=f"Whether a marker of the persona occurs in it. {_ONLY_CONTINUED}",
        distinct_markers="How many different markers of the persona occur in it; NaN where nothing "
        f"was generated. {_ONLY_CONTINUED}",
    ),
}

figures = {
    "closure_heatmap": closure_heatmap,
    "closure_by_graft": closure_by_graft,
    "closure_by_band": closure_by_band,
}


def prepares(options: Mapping[str, Any]) -> bool:
    """Whether there are cartridges, which are made for one model."""
    return bool(options.get("cartridge"))


def prepare(
    model: TransformersModel, _store: str | Path, options: dict[str, Any], **_progress: bool
) -> dict[str, Any]:
    """See that the model can be given the cartridges, and each persona one."""
    check_cartridges(options.get("cartridge") or (), model)
    return options


def measure(
    model: TransformersModel,
    cells: list[Cell],
    *,
    grafts: Annotated[str, AfterValidator(check_grafts)] = ",".join(LABELS),
    bands: Annotated[str, AfterValidator(check_bands), LATER] = EVERY_BAND,
    cartridge: Annotated[list[FileName] | None, LATER, CONTENT] = None,
    n_eval: Count = 10,
    n_tokens: Count = 80,
    reuse: bool = True,
) -> dict[str, Any]:
    """Measure a batch of cells.

    Args:
        model: from `load_model`.
        cells: the cells; the leading axis of every result.
        grafts: which grafts, by label; ``none,all`` move no key, whatever the model's positions.
        bands: layers of the graft ``persona``, as ``all,3,0:4`` (the end is not in it).
        cartridge: file of persona_cartridge, a graft for the cells of its persona; one a persona.
        n_eval: reference tokens that the KL is summed over.
        n_tokens: greedy tokens that markers are looked for in.
        reuse: in a band, go on from the host's residual at its first layer.
    """
    warn_without_markers(cells)
    sources = read_sources(model, cells)
    reference = read_reference(model, cells, sources, n_eval)
    asked, parts = grafts.split(","), bands_of(len(model.layers), bands)
    asked += ["cartridge"] if cartridge else []
    kl = torch.full((len(cells), len(asked), len(parts)), torch.nan, device=model.device)
    cache_bytes = torch.full(kl.shape, -1)
    text, distinct = [[""] * len(cells) for _ in asked], torch.full((len(asked), len(cells)), -1)
    for given in read_cartridges(cartridge or ()):
        if own := [row for row, cell in enumerate(cells) if given.is_of(cell)]:
            kl[own, -1, 0] = score_cartridge(model, sources, reference, given, own)
            cache_bytes[own, -1, 0] = given.n_bytes
    for g, graft in enumerate(grafts.split(",")):
        host, layer_bytes = make_graft(sources, graft)
        kl[:, g, 0] = score(model, host.followed_by(reference.forced), reference, {})
        cache_bytes[:, g, 0] = layer_bytes * len(parts[0])
        if graft in CONTINUED:
            text[g] = say(model, host, n_tokens).texts(model.tokenizer)
            distinct[g] = torch.tensor(count_each(text[g], cells))
        if graft == "persona" and parts[1:]:
            cache_bytes[:, g, 1:] = layer_bytes[:, None] * torch.tensor(list(map(len, parts[1:])))
            kl[:, g, 1:] = score_in_bands(model, sources, reference, parts[1:], reuse=reuse)
    return {
        "kl": kl,
        "closure": closure(kl, kl[:, asked.index("none"), 0, None, None]),
        "cache_bytes": cache_bytes,
        "n_eval": reference.scored.sum(1),
        "text": [list(of_cell) for of_cell in zip(*text, strict=True)],
        "any_marker": distinct.T > 0,
        "distinct_markers": distinct.T,
    }


def read_sources(model: TransformersModel, cells: Sequence[Cell]) -> GraftSources:
    """Everything before p_last of each prompt, once; and how this model's keys are moved."""
    sources = fill_sources(model, cells)
    refusal = sources.rotation.refusal  # said only if a key has to move
    hint = refusal and f"{refusal} With --grafts none,all no key moves."
    return replace(sources, rotation=replace(sources.rotation, refusal=hint))


def make_graft(sources: GraftSources, graft: str) -> tuple[Prefilled, Tensor]:
    """The grafted host, every key that moves rotated by its distance.

    Returns:
        The host, and how many bytes of each layer of its cache are not its own, [cell].
    """
    if graft == "additive":
        rows = [list(prompt["BY"].ids) for prompt in sources.prompts]
        cache, sizes = add_persona(sources)
    else:
        rows, cache = graft_spans(sources, GRAFTS[graft])
        sizes = grafted_tokens(sources, GRAFTS[graft])
    return Prefilled(rows, cache), torch.tensor(sizes) * cache.token_bytes


def score(
    model: TransformersModel, window: Window, reference: Reference, hidden: Mapping[int, Tensor]
) -> Tensor:
    """KL of p_last and the reference tokens, run forward on a grafted cache, [cell].

    ``hidden`` are columns of the cache, [cell, column], that a layer does not see; the pass goes
    on from the first of these layers, if it can.
    """
    with model.trace(window.inputs(), logits_to_keep=reference.scored.shape[1]):
        window.resume(model, min(hidden, default=0))
        for layer, columns in hidden.items():
            block_keys(model.layers[layer].attn, None, columns)
        predicted = log_probabilities(model.output.logits)
        kl = save(summed_kl(reference.clean, predicted, reference.scored))
    return kl  # noqa: RET504 - there only once the trace has run


def read_cartridges(files: Sequence[str]) -> list[Cartridge]:
    """The cartridges of these files, which `prepare` has checked."""
    if not files:  # on a server, say, which has no such package
        return []
    from persona_nns.models import load_cartridge

    return [load_cartridge(file) for file in files]


def score_cartridge(
    model: TransformersModel,
    sources: GraftSources,
    reference: Reference,
    cartridge: Cartridge,
    rows: Sequence[int],
) -> Tensor:
    """KL of some cells with a cartridge where the host's persona stood, [cell].

    Of the form `prefix`, the host's task and tail are run again behind it.
    """
    clean, scored = reference.clean[rows], reference.scored[rows]
    hosts = open_slots(sources.some(rows), reference.forced[rows], cartridge.slots, cartridge.form)
    window = hosts.with_cartridge(cartridge)
    with model.trace(window.inputs()):
        model.lm_head.input = take(model.lm_head.input, hosts.predicting)
        kl = save(summed_kl(clean, log_probabilities(model.output.logits), scored))
    return kl  # noqa: RET504 - there only once the trace has run


def score_in_bands(
    model: TransformersModel,
    sources: GraftSources,
    reference: Reference,
    bands: Sequence[range],
    *,
    reuse: bool,
) -> Tensor:
    """KL with the persona in a band of layers and the host in the others, [cell, band].

    Each layer holds one of the two persona spans (`PersonaSlots`), so no band is the graft `none`,
    and all layers are `persona`.
    """
    slots = open_persona_slots(sources, reference.forced)
    if reuse:
        slots = read_host(model, slots)
    kl: list[Tensor] = []
    for band in bands:
        lacks = {
            layer: slots.persona_lacks if layer in band else slots.host_lacks
            for layer in range(band.start if reuse else 0, len(model.layers))
        }
        window = replace(slots.window, prefix=slots.persona.only_in(band, slots.host))
        kl.append(score(model, window, reference, lacks))
    return torch.stack(kl, dim=1)


def add_persona(sources: GraftSources) -> tuple[KVCache, list[int]]:
    """KV_BB + ΔX + ΔY on the task and tail spans of the host: KV_BY + (KV_XB − KV_BB).

    Tasks differ in length, so the spans are aligned from their ends; the first tokens of the
    longer ones are left out, and the host's stay as they are. Keys are moved to the host's
    positions before they are added.

    Returns:
        The cache, and how many tokens of each row are changed.
    """

    def last(name: PromptName, span: Span) -> list[range]:
        """The last tokens of a span, as many as it has in all three prompts."""
        lengths = [min(len(of[each][span]) for each in ("BB", "XB", "BY")) for of in sources.spans]
        spans = [of[name][span] for of in sources.spans]
        return [whole[len(whole) - n :] for whole, n in zip(spans, lengths, strict=True)]

    def in_place_of_host(name: PromptName) -> KVCache:
        before = [range(task.start) for task in last("BY", "task")]
        between = [
            range(of["BY"]["tail"].start, tail.start)
            for of, tail in zip(sources.spans, last("BY", "tail"), strict=True)
        ]
        host, source = sources.caches["BY"], sources.caches[name]
        return splice(
            [
                Piece(host, before),
                Piece(source, last(name, "task")),
                Piece(host, between),
                Piece(source, last(name, "tail")),
            ],
            sources.rotation,
        )

    changed = zip(last("BY", "task"), last("BY", "tail"), strict=True)
    cache = in_place_of_host("BY").plus(in_place_of_host("XB"), in_place_of_host("BB"))
    return cache, [len(task) + len(tail) for task, tail in changed]
