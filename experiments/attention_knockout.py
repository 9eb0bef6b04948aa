"""Does the persona act through attention to its tokens? Attention knockout, layer by layer.

"As X, Do Y" (§7) holds that a persona steers what follows through attention back to the persona's
tokens, all through the prompt. Here that attention is cut in the clean prompt XY: the attention
logits from some queries to every persona key become −inf before the softmax, in every head of a
band of layers; the other weights share what is left, and no position moves. If the explanation
holds, the run moves away from the clean distribution and towards the host's (BY, the baseline
persona).
"""

import warnings
from itertools import product
from typing import Annotated

import torch
from nnsight import TransformersModel, save
from pydantic import Field
from torch import Tensor
from transformers import DynamicCache

from persona_nns.declarations import Variable, band_labels, band_layers
from persona_nns.figures import kl_by_band, markers_by_blocked
from persona_nns.prompts import Cell, count_markers, render_cell, warn_without_markers
from persona_nns.tracing import (
    BLOCKED,
    block_keys,
    blocked_queries,
    end_tokens,
    left_pad,
    log_probabilities,
    open_window,
    persona_keys,
    prefill,
    read_clean_run,
    read_continuation,
    share_out,
    stack_windows,
    summed_kl,
)

protocol_version = 1
defaults = {"grid": "review"}

_BANDS = {
    "blocked": BLOCKED,
    "layer_band": lambda record, _: band_labels(record.n_layers),
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
    "n_eval": Variable(
        "cell",
        "scored tokens",
        units="token",
        description="Reference tokens the KLs are summed over; fewer than asked for where the "
        "continuation ends early.",
        kind="int",
    ),
    "any_marker": Variable(
        "cell blocked",
        "any persona marker",
        description="Whether the greedy continuation under the knockout in all layers, kept up "
        "at every step, holds a marker of the persona.",
        kind="bool",
        coords={"blocked": BLOCKED},
    ),
    "distinct_markers": Variable(
        "cell blocked",
        "distinct persona markers",
        description="How many of the persona's markers that continuation holds.",
        kind="int",
        coords={"blocked": BLOCKED},
    ),
    "text": Variable(
        "cell blocked",
        "continuation",
        description="The greedy continuation under the knockout in all layers.",
        kind="text",
        coords={"blocked": BLOCKED},
    ),
}

figures = {"kl_by_band": kl_by_band, "markers": markers_by_blocked}


def measure(
    model: TransformersModel,
    cells: list[Cell],
    *,
    n_eval: Annotated[int, Field(ge=1)] = 10,
    n_tokens: Annotated[int, Field(ge=1)] = 80,
    reuse: bool = True,
) -> dict[str, Tensor | list[list[str]]]:
    """Measure a batch of cells.

    Args:
        model: from `load_model`.
        cells: the cells; the leading axis of every result.
        n_eval: reference tokens that the KLs are summed over.
        n_tokens: length of the continuations that are searched for markers.
        reuse: run shared prefixes once and resume at the first layer of a band.
    """
    warn_without_markers(cells)
    prompts = [render_cell(model.tokenizer, cell, ("XY", "BY")) for cell in cells]
    clean_prompts = [prompt["XY"] for prompt in prompts]
    n_layers = len(model.layers)

    # The reference: what the model says, greedily, to the clean XY prompt. The knockouts change
    # nothing before the end of the persona, so that is where the window begins.
    rows = [prompt.ids for prompt in clean_prompts]
    n_shown = max(len(prompt) - prompt.spans["persona"].stop for prompt in clean_prompts)
    prefix = prefill(model, [ids[:-n_shown] for ids in rows], reuse=reuse)
    xy = left_pad(rows, device=model.device)
    with model.generate(
        xy.tokens,
        past_key_values=prefix.cache() if prefix is not None else None,
        max_new_tokens=n_eval,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        output_hidden_states=True,
        return_dict_in_generate=True,
    ) as tracer:
        said = save(tracer.result)
    n_prompt = xy.input_ids.shape[1]
    reference = read_continuation(said.sequences, n_prompt, n_eval, end_tokens(model))
    reference.warn_if_short([cell.label for cell in cells], n_eval)
    run = read_clean_run(said, rows, reference.ids, prefix)
    clean = log_probabilities(run.logits)
    scored = reference.scored("p_last", n_eval)

    # The host on the same tokens: where the knockouts are expected to lead.
    rows = [prompt["BY"].ids for prompt in prompts]
    window = open_window(
        rows,
        reference.ids[:, :-1],
        prefill(model, [ids[:-1] for ids in rows], reuse=reuse),
    )
    with model.trace(window.inputs(), logits_to_keep=n_eval):
        host = save(log_probabilities(model.output.logits))

    # The clean run again, once for each choice of queries and band of layers: from the first
    # blocked query and the lowest layer of the band on, several of them as rows of one pass.
    width = n_prompt + max(n_eval, n_tokens)
    keys = persona_keys(clean_prompts, xy.padding, width)
    queries = {name: blocked_queries(clean_prompts, name, xy.padding, width) for name in BLOCKED}
    bands = [band_layers(label, n_layers) for label in band_labels(n_layers)]
    kl = torch.empty(len(BLOCKED), len(bands), len(cells), device=model.device)
    kl_host = torch.empty_like(kl)
    p_last = torch.tensor([len(prompt) - 1 for prompt in clean_prompts], device=model.device)
    after = torch.tensor([p.spans["persona"].stop for p in clean_prompts], device=model.device)
    for first, names in ((p_last, ["last"]), (after, ["task", "task+last", "later"])):
        window = run.narrow(first, n_eval)
        for lowest in range(n_layers):
            of_band = [k for k, layers in enumerate(bands) if layers.start == lowest]
            for conditions in share_out(list(product(names, of_band)), window, clean):
                index = torch.arange(len(cells), device=model.device).repeat(len(conditions))
                asking = torch.stack(
                    [
                        torch.cat([queries[name] * (layer in bands[k]) for name, k in conditions])
                        for layer in range(n_layers)
                    ]
                )
                _, passed = next(stack_windows([window] * len(conditions)))
                with model.trace(passed.inputs(), logits_to_keep=n_eval):
                    passed.resume(model, lowest)
                    for layer in range(lowest, n_layers):
                        attention = model.layers[layer].attn
                        attention.inputs = block_keys(attention.inputs, asking[layer], keys[index])
                    knocked_out = log_probabilities(model.output.logits)
                    from_clean = save(summed_kl(clean[index], knocked_out, scored[index]))
                    from_host = save(summed_kl(host[index], knocked_out, scored[index]))
                for c, (name, k) in enumerate(conditions):
                    rows_of = slice(c * len(cells), (c + 1) * len(cells))
                    kl[BLOCKED.index(name), k] = from_clean[rows_of]
                    kl_host[BLOCKED.index(name), k] = from_host[rows_of]

    # What is said under the knockout in all layers, blocked at every step of decoding.
    index = torch.arange(len(cells), device=model.device).repeat(len(BLOCKED))
    asking = torch.cat([queries[name] for name in BLOCKED])
    start = run.narrow(after, n_eval).prefix
    # A cache of the model's own kind would forget what has left a sliding window.
    cache = DynamicCache() if start is None else start.rows(index).cache()
    with warnings.catch_warnings():  # that the loop was longer than the texts
        warnings.filterwarnings("ignore", message=".*was never reached")
        with model.generate(
            past_key_values=cache,
            max_new_tokens=n_tokens,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
        ) as tracer:
            with tracer.invoke({name: tokens[index] for name, tokens in xy.tokens.items()}):
                for _step in tracer.iter[:n_tokens]:
                    for block in model.layers:
                        block.attn.inputs = block_keys(block.attn.inputs, asking, keys[index])
            with tracer.invoke():  # reached even where every text ends early
                said = save(tracer.result)
    continuation = read_continuation(said.sequences, n_prompt, n_tokens, end_tokens(model))
    texts = continuation.texts(model.tokenizer)
    by_cell = [texts[row :: len(cells)] for row in range(len(cells))]
    found = torch.tensor(
        [
            [count_markers(text, cell) for text in of_cell]
            for cell, of_cell in zip(cells, by_cell, strict=True)
        ]
    )
    return {
        "kl": kl.permute(2, 0, 1),
        "kl_host": kl_host.permute(2, 0, 1),
        "kl_clean_host": summed_kl(clean, host, scored),
        "kl_host_clean": summed_kl(host, clean, scored),
        "n_eval": scored.sum(1),
        "any_marker": found > 0,
        "distinct_markers": found,
        "text": by_cell,
    }
