"""What carries a persona? Spans of the key-value cache, grafted into a host that has none.

The host is the prompt with the baseline persona and the cell's task (BY), the source the prompt
with the cell's persona (XY). Spans of the source's cache overwrite the host's, for all layers or
for a band of them; p_last and the greedy continuation of XY then run forward on the grafted
cache. How much of the distance to the source does each graft close?
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from nnsight import TransformersModel, save
from pydantic import AfterValidator, Field

from persona_nns.declarations import ModelRecord, Variable, band_labels, band_layers
from persona_nns.figures import closure_by_band, closure_by_graft, closure_heatmap
from persona_nns.prompts import (
    ROLE_PROMPTS,
    Cell,
    Prompt,
    PromptName,
    Span,
    count_markers,
    render_cell,
    warn_without_markers,
)
from persona_nns.tracing import (
    KVCache,
    Piece,
    Rotation,
    closure,
    end_tokens,
    fill_cache,
    hide,
    left_pad,
    log_probabilities,
    open_window,
    read_continuation,
    read_rotation,
    splice,
    summed_kl,
)

protocol_version = 1
defaults = {"grid": "review"}

SPANS: tuple[Span, ...] = ("prefix", "persona", "task", "tail")
Origins = Mapping[Span, PromptName]
Spans = Sequence[Mapping[PromptName, Mapping[Span, range]]]  # of each row, by prompt and name


def host_with(**grafted: PromptName) -> Origins:
    """Which prompt's cache each span is taken from: the host's, but for those that are named."""
    origins: dict[Span, PromptName] = dict.fromkeys(SPANS, "BY")
    return {**origins, **grafted}  # type: ignore[dict-item]


# Spans of the clean prompt in the host; the prefix is always the host's. `persona_cached` is the
# persona span as computed once before the baseline task. (`additive` is no splice: see measure.)
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
    """The grafts of a run."""
    return parameters["grafts"].split(",")


_ONLY_PERSONA = "Bands other than 'all' are measured for the graft 'persona'."
_ONLY_CONTINUED = f"Measured for the grafts {', '.join(CONTINUED)}."
_coords = {
    "graft": graft_labels,
    "layer_band": lambda record, _: band_labels(record.n_layers),
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
        f"NaN where there is no gap. {_ONLY_PERSONA}",
        coords=_coords,
    ),
    "cache_bytes": Variable(
        "cell graft layer_band",
        "grafted keys and values",
        units="byte",
        description="Size of the keys and values that are put into the host, in the model's "
        f"precision. {_ONLY_PERSONA}",
        kind="int",
        coords=_coords,
    ),
    "n_eval": Variable(
        "cell",
        "scored tokens",
        units="token",
        description="Reference tokens the KL is summed over; fewer than asked for where the "
        "continuation ends early.",
        kind="int",
    ),
    "text": Variable(
        "cell graft",
        "continuation",
        description=f"Greedy continuation of the grafted host. {_ONLY_CONTINUED}",
        kind="text",
        coords={"graft": graft_labels},
    ),
    "any_marker": Variable(
        "cell graft",
        "any persona marker",
        description=f"Whether a marker of the persona occurs in it. {_ONLY_CONTINUED}",
        kind="bool",
        coords={"graft": graft_labels},
    ),
    "distinct_markers": Variable(
        "cell graft",
        "distinct persona markers",
        description="How many different markers of the persona occur in it; −1 where nothing was "
        f"generated. {_ONLY_CONTINUED}",
        kind="int",
        coords={"graft": graft_labels},
    ),
}

figures = {
    "closure_heatmap": closure_heatmap,
    "closure_by_graft": closure_by_graft,
    "closure_by_band": closure_by_band,
}


def measure(
    model: TransformersModel,
    cells: list[Cell],
    *,
    grafts: Annotated[str, AfterValidator(check_grafts)] = ",".join(LABELS),
    n_eval: Annotated[int, Field(ge=1)] = 10,
    n_tokens: Annotated[int, Field(ge=1)] = 80,
    reuse: bool = True,
) -> dict[str, Any]:
    """Measure a batch of cells.

    Args:
        model: from `load_model`.
        cells: the cells; the leading axis of every result.
        grafts: which grafts, by label; ``none,all`` move no key, whatever the model's positions.
        n_eval: reference tokens that the KL is summed over.
        n_tokens: greedy tokens that markers are looked for in.
        reuse: in a band, go on from the host's residual at its first layer.
    """
    warn_without_markers(cells)
    asked = grafts.split(",")
    prompts = [render_cell(model.tokenizer, cell) for cell in cells]
    n_layers = len(model.layers)
    bands = [band_layers(label, n_layers) for label in band_labels(n_layers)]
    spans: Spans = [
        {name: spans_before_last(prompt[name]) for name in ROLE_PROMPTS} for prompt in prompts
    ]

    warn_about_prefixes(cells, prompts, spans)

    # Everything before p_last of each prompt, once; and how this model's keys are moved.
    source: dict[PromptName, KVCache] = {
        name: fill_cache(model, [prompt[name].ids[:-1] for prompt in prompts])
        for name in ROLE_PROMPTS
    }
    rotation = read_rotation(model, reach=max(cache.width for cache in source.values()))
    if rotation.refusal:  # said only if a key has to move
        hint = f"{rotation.refusal} With --grafts none,all no key moves."
        rotation = replace(rotation, refusal=hint)

    # The reference: what the model says, greedily, to the clean XY prompt.
    rows = [prompt["XY"].ids for prompt in prompts]
    xy = left_pad(rows, device=model.device)
    with model.generate(
        xy.tokens,
        past_key_values=source["XY"].cache(),
        max_new_tokens=n_eval,
        do_sample=False,
        num_beams=1,
    ) as tracer:
        said = save(tracer.result)
    reference = read_continuation(said, xy.input_ids.shape[1], n_eval, end_tokens(model))
    reference.warn_if_short([cell.label for cell in cells], n_eval)
    scored = reference.scored("p_last", n_eval)
    forced = reference.ids[:, :-1]
    window = open_window(rows, forced, source["XY"])
    with model.trace(window.inputs(), logits_to_keep=n_eval):
        clean = save(log_probabilities(model.output.logits))

    # Each graft in all layers: the spans spliced at their own length, every key that moves rotated
    # by its distance; p_last and the reference tokens run on it at the positions that follow.
    kl = torch.full((len(cells), len(asked), len(bands)), torch.nan, device=model.device)
    cache_bytes = torch.full(kl.shape, -1, dtype=torch.long)
    grafted: dict[str, tuple[list[list[int]], KVCache]] = {}
    for g, graft in enumerate(asked):
        if graft == "additive":
            rows = tokens_of(GRAFTS["none"], prompts, spans)
            cache, sizes = add_persona(source, spans, rotation)
        else:
            rows = tokens_of(GRAFTS[graft], prompts, spans)
            cache = splice(pieces_of(GRAFTS[graft], source, spans), rotation)
            sizes = grafted_tokens(GRAFTS[graft], spans)
        window = open_window(rows, forced, cache)
        with model.trace(window.inputs(), logits_to_keep=n_eval):
            kl[:, g, 0] = save(summed_kl(clean, log_probabilities(model.output.logits), scored))
        cache_bytes[:, g, 0] = torch.tensor(sizes) * cache.token_bytes * n_layers
        if graft in CONTINUED:
            grafted[graft] = rows, cache

    # The persona in a band of layers. Its slot is as long as the longer of the two persona spans;
    # each layer holds one of them at the slot's end and hides the spare places before it.
    if "persona" in asked:
        slots = [max(len(of["XY"]["persona"]), len(of["BY"]["persona"])) for of in spans]
        host = splice(pieces_of(GRAFTS["none"], source, spans, slots), rotation)
        persona = splice(pieces_of(GRAFTS["persona"], source, spans, slots), rotation)
        rows = [
            max(pair, key=len)
            for pair in zip(
                tokens_of(GRAFTS["none"], prompts, spans),
                tokens_of(GRAFTS["persona"], prompts, spans),
                strict=True,
            )
        ]
        window = open_window(rows, forced, host)
        place_is_taken = window.attention_mask[:, : host.width] > 0
        host_lacks = place_is_taken & (host.attention_mask == 0)
        persona_lacks = place_is_taken & (persona.attention_mask == 0)
        if reuse:
            with model.trace(window.inputs(), logits_to_keep=1):
                residual = save([])
                for block in model.layers:
                    residual.append(block.input)
                    args, kwargs = block.attn.inputs
                    mask = hide(kwargs["attention_mask"], host_lacks)
                    block.attn.inputs = (args, {**kwargs, "attention_mask": mask})
            window = replace(window, clean=torch.stack(residual))
        g = asked.index("persona")
        sizes = torch.tensor(grafted_tokens(GRAFTS["persona"], spans)) * persona.token_bytes
        for b, band in list(enumerate(bands))[1:]:
            window = replace(window, prefix=persona.only_in(band, host))
            with model.trace(window.inputs(), logits_to_keep=n_eval):
                window.resume(model, band.start)
                for layer in range(band.start if reuse else 0, n_layers):
                    block = model.layers[layer]
                    args, kwargs = block.attn.inputs
                    lacks = persona_lacks if layer in band else host_lacks
                    mask = hide(kwargs["attention_mask"], lacks)
                    block.attn.inputs = (args, {**kwargs, "attention_mask": mask})
                kl[:, g, b] = save(summed_kl(clean, log_probabilities(model.output.logits), scored))
            cache_bytes[:, g, b] = sizes * len(band)

    # What the host goes on to say, under three of the grafts.
    text = [[""] * len(asked) for _ in cells]
    distinct = torch.full((len(cells), len(asked)), -1)
    for graft, (rows, cache) in grafted.items():
        batch = left_pad(rows, device=model.device)
        with model.generate(
            batch.tokens,
            past_key_values=cache.cache(),
            max_new_tokens=n_tokens,
            do_sample=False,
            num_beams=1,
        ) as tracer:
            said = save(tracer.result)
        spoken = read_continuation(said, batch.input_ids.shape[1], n_tokens, end_tokens(model))
        for c, words in enumerate(spoken.texts(model.tokenizer)):
            text[c][asked.index(graft)] = words
            distinct[c, asked.index(graft)] = count_markers(words, cells[c])

    gap = kl[:, asked.index("none"), 0, None, None]
    return {
        "kl": kl,
        "closure": closure(kl, gap),
        "cache_bytes": cache_bytes,
        "n_eval": scored.sum(1),
        "text": text,
        "any_marker": distinct > 0,
        "distinct_markers": distinct,
    }


def warn_about_prefixes(
    cells: Sequence[Cell], prompts: Sequence[Mapping[PromptName, Prompt]], spans: Spans
) -> None:
    """Warn of cells in which a token joins what stands before the persona with its first word.

    The prefix is the host's, so that there no graft, ``all`` included, gives the clean run.
    """
    joined = [
        cell.label
        for cell, prompt, of in zip(cells, prompts, spans, strict=True)
        if prompt["XY"].ids[: of["XY"]["prefix"].stop]
        != prompt["BY"].ids[: of["BY"]["prefix"].stop]
    ]
    if joined:
        warnings.warn(
            f"In {', '.join(joined)} the tokens before the persona are not the host's (one of "
            "them takes up a part of it): no graft can give the clean run.",
            stacklevel=3,
        )


def spans_before_last(prompt: Prompt) -> dict[Span, range]:
    """The spans of a prompt without p_last, which runs forward on the cache."""
    last = len(prompt) - 1
    return {
        name: range(prompt.spans[name].start, min(prompt.spans[name].stop, last)) for name in SPANS
    }


def tokens_of(
    origins: Origins, prompts: Sequence[Mapping[PromptName, Prompt]], spans: Spans
) -> list[list[int]]:
    """Token ids of the spliced rows, p_last included."""
    return [
        [
            *(
                token
                for span, name in origins.items()
                for token in prompt[name].ids[of[name][span].start : of[name][span].stop]
            ),
            prompt["BY"].ids[-1],
        ]
        for prompt, of in zip(prompts, spans, strict=True)
    ]


def pieces_of(
    origins: Origins,
    source: Mapping[PromptName, KVCache],
    spans: Spans,
    slots: Sequence[int] | None = None,
) -> list[Piece]:
    """The spans to splice; ``slots`` are the places that the persona takes."""
    return [
        Piece(source[name], [of[name][span] for of in spans], slots if span == "persona" else None)
        for span, name in origins.items()
    ]


def grafted_tokens(origins: Origins, spans: Spans) -> list[int]:
    """How many tokens of each row are not the host's."""
    return [
        sum(len(of[name][span]) for span, name in origins.items() if name != "BY") for of in spans
    ]


def add_persona(
    source: Mapping[PromptName, KVCache], spans: Spans, rotation: Rotation
) -> tuple[KVCache, list[int]]:
    """KV_BB + ΔX + ΔY on the task and tail spans of the host: KV_BY + (KV_XB − KV_BB).

    Tasks differ in length, so the spans are aligned from their ends; the first tokens of the
    longer ones are left out, and the host's stay as they are. Keys are moved to the host's
    positions before they are added.

    Returns:
        The cache, and how many tokens of each row are changed.
    """
    n_task, n_tail = (
        [min(len(of[name][span]) for name in ("BB", "XB", "BY")) for of in spans]
        for span in ("task", "tail")
    )

    def last(name: PromptName, span: Span, lengths: Sequence[int]) -> list[range]:
        ends = [of[name][span] for of in spans]
        return [end[len(end) - n :] for end, n in zip(ends, lengths, strict=True)]

    def in_place_of_host(name: PromptName) -> KVCache:
        task, tail = ([of["BY"][span] for of in spans] for span in ("task", "tail"))
        before = [range(span.stop - n) for span, n in zip(task, n_task, strict=True)]
        between = [range(s.start, s.stop - n) for s, n in zip(tail, n_tail, strict=True)]
        return splice(
            [
                Piece(source["BY"], before),
                Piece(source[name], last(name, "task", n_task)),
                Piece(source["BY"], between),
                Piece(source[name], last(name, "tail", n_tail)),
            ],
            rotation,
        )

    host = in_place_of_host("BY")
    changed = [a + b for a, b in zip(n_task, n_tail, strict=True)]
    return host.plus(in_place_of_host("XB"), in_place_of_host("BB")), changed
