"""Does the persona act through attention to its tokens? Attention knockout, layer by layer.

"As X, Do Y" (§7) holds that a persona steers what follows through attention back to the persona's
tokens, all through the prompt. Here that attention is cut in the clean prompt XY: the attention
logits from some queries to every persona key become −inf before the softmax, in every head of a
band of layers; the other weights share what is left, and no position moves. If the explanation
holds, the run moves away from the clean distribution and towards the host's (BY, the baseline
persona).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any

import torch
from nnsight import TransformersModel, save
from pydantic import AfterValidator
from torch import Tensor
from transformers import DynamicCache

from persona_nns.declarations import (
    EVERY_BAND,
    LATER,
    Count,
    Variable,
    bands_of,
    check_bands,
    choose_bands,
    marker_variables,
    scored_tokens,
)
from persona_nns.figures import kl_by_band, markers_by_blocked
from persona_nns.prompts import Cell, Prompt, render_cell, warn_without_markers
from persona_nns.tracing import (
    BLOCKED,
    Blocked,
    CleanRun,
    Continuation,
    Prefilled,
    Window,
    block_keys,
    blocked_queries,
    end_tokens,
    force,
    greedily,
    has_weights,
    left_pad,
    log_probabilities,
    mark,
    persona_keys,
    prefill_rows,
    read_continuation,
    run_clean,
    share_out,
    stack_windows,
    summed_kl,
    until_end_of_text,
)

protocol_version = 1
defaults = {"grid": "review"}

_BANDS = {
    "blocked": BLOCKED,
    "layer_band": lambda record, asked: choose_bands(asked["bands"], record.n_layers),
}

variables = {
    "kl": Variable(
        "cell blocked layer_band",
        "KL(clean ‖ knocked out)",
        units="nat",
        description="How far the knockout moves the clean run, summed over the scored reference "
        "tokens.",
        coords=_BANDS,
    ),
    "kl_host": Variable(
        "cell blocked layer_band",
        "KL(host ‖ knocked out)",
        units="nat",
        description="How far the knocked-out run is from the host BY on the same tokens: 0 where "
        "the knockout leaves what the baseline persona would have given.",
        coords=_BANDS,
    ),
    "kl_clean_host": Variable(
        "cell",
        "KL(clean ‖ host)",
        units="nat",
        description="The gap between the two prompts, measured from the clean run.",
    ),
    "kl_host_clean": Variable(
        "cell",
        "KL(host ‖ clean)",
        units="nat",
        description="The gap between the two prompts, measured from the host: what kl_host is "
        "where nothing is knocked out.",
    ),
    "n_eval": scored_tokens(measured="KLs are"),
    **marker_variables(
        "cell blocked",
        "continuation",
        {"blocked": BLOCKED},
        any_marker="Whether the greedy continuation under the knockout in all layers, kept up at "
        "every step, holds a marker of the persona.",
        distinct_markers="How many of the persona's markers that continuation holds.",
        text="The greedy continuation under the knockout in all layers.",
    ),
}

figures = {"kl_by_band": kl_by_band, "markers": markers_by_blocked}


def measure(
    model: TransformersModel,
    cells: list[Cell],
    *,
    bands: Annotated[str, AfterValidator(check_bands), LATER] = EVERY_BAND,
    n_eval: Count = 10,
    n_tokens: Count = 80,
    reuse: bool = True,
) -> dict[str, Any]:
    """Measure a batch of cells.

    Args:
        model: from `load_model`.
        cells: the cells; the leading axis of every result.
        bands: layers of a knockout, as ``all,3,0:4`` (the end is not in it).
        n_eval: reference tokens that the KLs are summed over.
        n_tokens: length of the continuations that are searched for markers.
        reuse: run shared prefixes once and resume at the first layer of a band.
    """
    warn_without_markers(cells)
    prompts = [render_cell(model.tokenizer, cell, ("XY", "BY")) for cell in cells]
    reference, clean = run_xy(model, [prompt["XY"] for prompt in prompts], n_eval, reuse=reuse)
    reference.warn_if_short([cell.label for cell in cells], n_eval)
    # The host on the same tokens: where the knockouts are expected to lead.
    by = prefill_rows(model, [prompt["BY"].ids for prompt in prompts], reuse=reuse)
    host = log_probabilities(force(model, by, reference.ids[:, :-1]).logits)

    parts = bands_of(len(model.layers), bands)
    kl = torch.empty(2, len(cells), len(BLOCKED), len(parts), device=model.device)
    for window, conditions in passes(clean, parts):
        moved = knock_out(model, clean, host, window, conditions)
        for (blocked, band), of_condition in zip(conditions, moved, strict=True):
            kl[:, :, BLOCKED.index(blocked), parts.index(band)] = of_condition
    return {
        "kl": kl[0],
        "kl_host": kl[1],
        "kl_clean_host": summed_kl(clean.predicted, host, clean.scored),
        "kl_host_clean": summed_kl(host, clean.predicted, clean.scored),
        "n_eval": clean.scored.sum(1),
        **mark(say_knocked_out(model, clean, n_tokens), cells),
    }


@dataclass(frozen=True)
class Clean:
    """The clean prompts XY, and the run in which the model speaks to them."""

    prompts: Sequence[Prompt]
    run: CleanRun
    predicted: Tensor  # log-probabilities, [cell, token, vocabulary]
    scored: Tensor  # [cell, token]

    @property
    def after(self) -> Tensor:
        """The first token after the persona, [cell]: the knockouts change nothing before it."""
        stops = [prompt.spans["persona"].stop for prompt in self.prompts]
        return torch.tensor(stops, device=self.predicted.device)

    def masks(self, n_after: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Keys of the persona and queries that are kept from them, [cell, column].

        Columns are those of the prompts and of ``n_after`` tokens that follow.
        """
        columns = self.run.window.padding, max(map(len, self.prompts)) + n_after
        queries = {name: blocked_queries(self.prompts, name, *columns) for name in BLOCKED}
        return persona_keys(self.prompts, *columns), queries


def run_xy(
    model: TransformersModel, prompts: Sequence[Prompt], n_eval: int, *, reuse: bool
) -> tuple[Continuation, Clean]:
    """The reference: what the model says, greedily, to the clean XY prompt."""
    n_shown = max(len(prompt) - prompt.spans["persona"].stop for prompt in prompts)
    rows = prefill_rows(model, [prompt.ids for prompt in prompts], n_shown, reuse=reuse)
    reference, run = run_clean(model, rows, n_eval)
    scored = reference.scored("p_last", n_eval)
    return reference, Clean(prompts, run, log_probabilities(run.logits), scored)


Condition = tuple[Blocked, range]  # whose queries are blocked, in which layers


def passes(clean: Clean, bands: Sequence[range]) -> Iterator[tuple[Window, Sequence[Condition]]]:
    """The clean run again, once for each choice of queries and band of layers.

    From the first blocked query and the lowest layer of the band on, several as rows of one pass.
    """
    for first, names in ((clean.run.p_last, BLOCKED[:1]), (clean.after, BLOCKED[1:])):
        window = clean.run.narrow(first, clean.scored.shape[1])
        for lowest in dict.fromkeys(band.start for band in bands):
            of_layer = [band for band in bands if band.start == lowest]
            for conditions in share_out(list(product(names, of_layer)), window, clean.predicted):
                yield window, conditions


def knock_out(
    model: TransformersModel,
    clean: Clean,
    host: Tensor,
    window: Window,
    conditions: Sequence[Condition],
) -> Tensor:
    """KL from the clean run and from the host, [condition, 2, cell]."""
    lowest, layers = conditions[0][1].start, range(len(model.layers))
    row = torch.arange(len(clean.prompts), device=model.device).repeat(len(conditions))
    keys, queries = clean.masks(clean.scored.shape[1])
    asking = [
        torch.cat([queries[blocked] * (layer in band) for blocked, band in conditions])
        for layer in layers
    ]
    references, keys, scored = (clean.predicted[row], host[row]), keys[row], clean.scored[row]
    _, passed = next(stack_windows([window] * len(conditions)))
    with model.trace(passed.inputs(), logits_to_keep=scored.shape[1]):
        passed.resume(model, lowest)
        for layer in layers[lowest:]:
            block_keys(model.layers[layer].attn, asking[layer], keys)
        predicted = log_probabilities(model.output.logits)
        moved = save(torch.stack([summed_kl(each, predicted, scored) for each in references]))
    return moved.unflatten(1, (len(conditions), -1)).transpose(0, 1)


def say_knocked_out(model: TransformersModel, clean: Clean, n_tokens: int) -> list[list[str]]:
    """What is said with all layers knocked out at every step of decoding, [cell][blocked]."""
    n_cells = len(clean.prompts)
    keys, queries = clean.masks(n_tokens)
    start = clean.run.narrow(clean.after, clean.scored.shape[1]).prefix
    every = [*range(n_cells)] * len(BLOCKED)
    prompts = Prefilled([prompt.ids for prompt in clean.prompts], start).some(every)
    keys, asking = keys[every], torch.cat(list(queries.values()))
    settings, tokens = greedily(prompts, n_tokens), left_pad(prompts.rows, device=model.device)
    if not has_weights(model):  # blocking its keys would hand each module a copy of the cache
        settings |= {"past_key_values": None, "use_cache": False}
    elif start is None:  # a cache of the model's own kind would forget what left a sliding window
        settings["past_key_values"] = DynamicCache()
    with until_end_of_text(), model.generate(**settings) as tracer:
        with tracer.invoke(tokens.tokens):
            for _step in tracer.iter[:n_tokens]:
                for block in model.layers:
                    block_keys(block.attn, asking, keys)
        with tracer.invoke():  # reached even where every text ends early
            said = save(tracer.result)
    said = read_continuation(said, tokens.width, n_tokens, end_tokens(model))
    texts = said.texts(model.tokenizer)
    return [texts[c::n_cells] for c in range(n_cells)]
