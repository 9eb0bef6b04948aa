"""Can one residual stand in for the persona's text? Injection into a host without it (§7).

The host is the BY prompt: baseline persona, the cell's task. At its p_last, at each layer of a
set, its residual is replaced by a source's: `cached`, h_BB + ΔX + ΔY, or `oracle`, the long
persona's own h_XY. How much nearer does that bring its next-token distributions, teacher-forced
on what the long-persona prompt says, to those of the long-persona prompt?

And does what the host then says of its own carry the persona? 80 greedy tokens under each source,
injected at p_last alone, or at p_last, g1 and g2 as each of them is reached.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated, Any

import torch
from nnsight import TransformersModel, save
from pydantic import Field
from torch import Tensor

from persona_nns.declarations import Variable, label_layer_set, marker_variables, scored_tokens
from persona_nns.figures import closure_figure, estimates, host_markers
from persona_nns.prompts import ROLE_PROMPTS, Cell, render_cell, warn_without_markers
from persona_nns.tracing import (
    Continuation,
    KVCache,
    Window,
    additive,
    closure,
    end_tokens,
    greedily,
    left_pad,
    log_probabilities,
    mark,
    open_window,
    prefill,
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
    ),
    "clean_text": Variable(
        "cell",
        "greedy continuation of the long persona",
        description="What the long-persona prompt says, special tokens left out.",
        kind="text",
    ),
}

figures = {
    "kl": lambda ds: estimates(ds, {"kl": "median"}, x="layer_set", hue="source"),
    "closure": closure_figure,
    "markers": host_markers,
}


def measure(
    model: TransformersModel,
    cells: list[Cell],
    *,
    layer_sets: list[list[int]],
    n_eval: Annotated[int, Field(ge=1)] = 10,
    n_tokens: Annotated[int, Field(ge=1)] = 80,
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
    batch = read_batch(model, cells, n_eval, n_tokens, reuse=reuse)
    runs = {name: force(model, batch, name) for name in ROLE_PROMPTS}
    bb, xb, by, xy = (run.residual for run in runs.values())
    source = {"cached": additive(bb, xb, by), "oracle": xy}

    clean, host, scored = runs["XY"], runs["BY"], batch.reference.scored("p_last", n_eval)
    none = summed_kl(clean.predicted, host.predicted, scored)
    kl = none[:, None, None].repeat(1, len(layer_sets), len(SOURCES))
    for (s, layers), (name, value) in product(enumerate(layer_sets), source.items()):
        predicted = inject(model, batch, host.window, layers, value)
        kl[:, s, SOURCES.index(name)] = summed_kl(clean.predicted, predicted, scored)

    text = say_injected(model, batch, source, layer_sets[0], n_tokens)
    clean_text = batch.reference.first(n_tokens).texts(model.tokenizer)
    return {
        "kl": kl,
        "closure": closure(kl, none[:, None, None]),
        "n_eval": scored.sum(1),
        **mark(text, cells),
        **{f"clean_{name}": value for name, value in mark(clean_text, cells).items()},
    }


@dataclass(frozen=True)
class Batch:
    """The four prompts of each cell, and what the model says, greedily, to the long persona's."""

    rows: Mapping[str, Sequence[tuple[int, ...]]]
    prefix: Mapping[str, KVCache | None]  # everything before p_last
    reference: Continuation
    n_eval: int

    @property
    def n_columns(self) -> int:
        """Columns of every pass from p_last on: those that are scored, and the joint site."""
        return max(self.n_eval, len(JOINT_SITE))


def read_batch(
    model: TransformersModel, cells: Sequence[Cell], n_eval: int, n_tokens: int, *, reuse: bool
) -> Batch:
    """Run everything before p_last once, and let the model speak."""
    prompts = [render_cell(model.tokenizer, cell) for cell in cells]
    rows = {name: [prompt[name].ids for prompt in prompts] for name in ROLE_PROMPTS}
    before = [ids[:-1] for of_name in rows.values() for ids in of_name]
    shared = prefill(model, before, reuse=reuse)
    prefix = {
        name: shared and shared.rows(slice(k * len(cells), (k + 1) * len(cells)))
        for k, name in enumerate(rows)
    }
    reference = say(model, rows["XY"], prefix["XY"], max(n_tokens, n_eval, len(JOINT_SITE) - 1))
    reference.warn_if_short([cell.label for cell in cells], n_eval)
    return Batch(rows, prefix, reference, n_eval)


@dataclass(frozen=True)
class Run:
    """One of the four prompts, followed by the same reference tokens as the others."""

    window: Window  # from p_last on, with residuals to go on from
    residual: Tensor  # p_last, g1, g2 at the input of every block, [layer, cell, step, d_model]
    predicted: Tensor  # log-probabilities, [cell, token, vocabulary]


def force(model: TransformersModel, batch: Batch, name: str) -> Run:
    """Run a prompt and the reference tokens."""
    n_columns = batch.n_columns
    forced = batch.reference.ids[:, : n_columns - 1]
    window = open_window(batch.rows[name], forced, batch.prefix[name])
    with model.trace(window.inputs(), logits_to_keep=n_columns):
        read = save([block.input[:, -n_columns:] for block in model.layers])
        predicted = save(log_probabilities(model.output.logits[:, : batch.n_eval]))
    residual = torch.stack(read)
    window = replace(window, clean=residual if window.prefix is not None else None)
    return Run(window, residual[:, :, : len(JOINT_SITE)].float(), predicted)


def inject(
    model: TransformersModel, batch: Batch, host: Window, layers: Sequence[int], value: Tensor
) -> Tensor:
    """The host's distributions with a source at its p_last, at each layer of a set at once."""
    p_last = torch.full((len(host.input_ids),), -batch.n_columns, device=model.device)
    with model.trace(host.inputs(), logits_to_keep=batch.n_columns):
        host.resume(model, layers[0])
        for layer in layers:
            hidden = model.layers[layer].input
            model.layers[layer].input = substitute(hidden, p_last, value[layer, :, 0])
        predicted = save(log_probabilities(model.output.logits[:, : batch.n_eval]))
    return predicted  # noqa: RET504 - there only once the trace has run


def say_injected(
    model: TransformersModel,
    batch: Batch,
    source: Mapping[str, Tensor],
    layers: Sequence[int],
    n_tokens: int,
) -> list[list[list[str]]]:
    """What the host says, once as it is for each task, and for each cell with a source.

    It is put at p_last, or at p_last and then at g1 and g2 as each is reached. A site that the
    reference, which the sources are read on, does not have is left as it is.

    Returns:
        [cell][site][source]
    """
    rows, prefix, n_steps = batch.rows["BY"], batch.prefix["BY"], len(JOINT_SITE)
    hosts, injections = list(dict.fromkeys(rows)), list(product(SITES, source))
    exists = torch.stack([batch.reference.reaches(position) for position in JOINT_SITE], dim=1)
    reached = {
        SITES[0]: exists & (torch.arange(n_steps, device=model.device) == 0),
        SITES[1]: exists,
    }
    nowhere = exists.new_zeros(len(hosts), n_steps)
    where = torch.cat([nowhere, *(reached[site] for site, _ in injections)])  # [row, step]
    value = torch.cat([source[name] for _, name in injections], dim=1)
    value = torch.nn.functional.pad(value, (0, 0, 0, 0, len(hosts), 0))  # [layer, row, step, d]
    asked = [*hosts, *(ids for _ in injections for ids in rows)]
    row = torch.tensor([rows.index(ids) for ids in asked], device=model.device)
    tokens = left_pad(asked, device=model.device)
    settings = greedily(prefix and prefix.rows(row), n_tokens)
    with until_end_of_text(), model.generate(**settings) as tracer:
        with tracer.invoke(tokens.tokens):
            for step in tracer.iter[: min(n_tokens, n_steps)]:
                for layer in layers:
                    hidden = model.layers[layer].input
                    column = torch.arange(hidden.shape[1], device=hidden.device)
                    at = where[:, step, None] & (column == hidden.shape[1] - 1)
                    model.layers[layer].input = put(hidden, at, value[layer, :, step, None])
        with tracer.invoke():
            said = save(tracer.result)
    said = read_continuation(said, tokens.width, n_tokens, end_tokens(model))
    texts = said.texts(model.tokenizer)
    own = dict(zip(hosts, texts, strict=False))
    answers = {(site, "none"): [own[ids] for ids in rows] for site in SITES}
    for k, injection in enumerate(injections):
        answers[injection] = texts[len(hosts) + k * len(rows) :]
    return [
        [[answers[site, name][c] for name in SOURCES] for site in SITES] for c in range(len(rows))
    ]
