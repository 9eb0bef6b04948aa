"""Can one residual stand in for the persona's text? Injection into a host without it (§7).

The host is the BY prompt: baseline persona, the cell's task. At its p_last, at each layer of a
set, its residual is replaced by a source's: `cached`, h_BB + ΔX + ΔY, or `oracle`, the long
persona's own h_XY. How much nearer does that bring its next-token distributions, teacher-forced
on what the long-persona prompt says, to those of the long-persona prompt?

And does what the host then says of its own carry the persona? 80 greedy tokens under each source,
injected at p_last alone, or at p_last, g1 and g2 as each of them is reached.
"""

import warnings
from dataclasses import replace
from typing import Annotated, Any

import torch
from nnsight import TransformersModel, save
from pydantic import Field
from torch import Tensor

from persona_nns.declarations import Variable, label_layer_set
from persona_nns.figures import closure_figure, estimates, host_markers
from persona_nns.prompts import ROLE_PROMPTS, Cell, count_markers, render_cell, warn_without_markers
from persona_nns.tracing import (
    additive,
    closure,
    end_tokens,
    left_pad,
    log_probabilities,
    open_window,
    prefill,
    read_continuation,
    substitute,
    summed_kl,
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
_by_site = {"site": SITES, "source": SOURCES}

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
    "n_eval": Variable(
        "cell",
        "scored tokens",
        units="token",
        description="Reference tokens the KL is summed over; fewer than asked for where the "
        "continuation ends early.",
        kind="int",
    ),
    "any_marker": Variable(
        "cell site source",
        "any persona marker",
        description="Whether a marker of the cell's persona occurs in the host's continuation, "
        "with the source injected at the first layer set; none repeats over sites.",
        kind="bool",
        coords=_by_site,
    ),
    "distinct_markers": Variable(
        "cell site source",
        "distinct persona markers",
        description="How many different markers of the cell's persona occur in it.",
        kind="int",
        coords=_by_site,
    ),
    "text": Variable(
        "cell site source",
        "greedy continuation of the host",
        description="What the host says, special tokens left out, with the source injected at "
        "the first layer set.",
        kind="text",
        coords=_by_site,
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
    prompts = [render_cell(model.tokenizer, cell) for cell in cells]
    rows = {name: [prompt[name].ids for prompt in prompts] for name in ROLE_PROMPTS}
    everything = [ids for name in ROLE_PROMPTS for ids in rows[name]]
    shared = prefill(model, [ids[:-1] for ids in everything], reuse=reuse)
    prefix = {
        name: shared.rows(slice(k * len(cells), (k + 1) * len(cells))) if shared else None
        for k, name in enumerate(ROLE_PROMPTS)
    }

    # The reference: what the model says, greedily, to the long-persona prompt.
    n_said = max(n_tokens, n_eval, len(JOINT_SITE) - 1)
    xy = left_pad(rows["XY"], device=model.device)
    cached_xy = prefix["XY"]
    with model.generate(
        xy.tokens,
        past_key_values=cached_xy.cache() if cached_xy is not None else None,
        max_new_tokens=n_said,
        do_sample=False,
        num_beams=1,
    ) as tracer:
        said = save(tracer.result)
    n_prompt, ends = xy.input_ids.shape[1], end_tokens(model)
    reference = read_continuation(said, n_prompt, n_said, ends)
    reference.warn_if_short([cell.label for cell in cells], n_eval)
    clean_text = read_continuation(said, n_prompt, n_tokens, ends).texts(model.tokenizer)
    scored = reference.scored("p_last", n_eval)

    # The four prompts, each followed by the same reference tokens: from p_last on, residuals at
    # the input of every block [layer, cell, column, d_model], and distributions
    # [cell, token, vocabulary]. p_last, g1, g2 are the first three of these columns.
    n_columns = max(n_eval, len(JOINT_SITE))
    residual, predicted, window = {}, {}, {}
    for name in ROLE_PROMPTS:
        window[name] = open_window(rows[name], reference.ids[:, : n_columns - 1], prefix[name])
        with model.trace(window[name].inputs(), logits_to_keep=n_columns):
            read = save([block.input[:, -n_columns:] for block in model.layers])
            logits = save(log_probabilities(model.output.logits[:, -n_columns:][:, :n_eval]))
        residual[name] = torch.stack(read)
        if name in ("XY", "BY"):
            predicted[name] = logits
    at_site = {name: of[:, :, : len(JOINT_SITE)].float() for name, of in residual.items()}
    source = {
        "cached": additive(*(at_site[name] for name in ("BB", "XB", "BY"))),
        "oracle": at_site["XY"],
    }

    # The host again with a source at its p_last, at each layer of a set at once.
    host = replace(window["BY"], clean=residual["BY"] if prefix["BY"] is not None else None)
    p_last = host.column(torch.tensor([len(ids) - 1 for ids in rows["BY"]], device=model.device))
    none = summed_kl(predicted["XY"], predicted["BY"], scored)
    kl = none[:, None, None].repeat(1, len(layer_sets), len(SOURCES))
    for s, layers in enumerate(layer_sets):
        for name, value in source.items():
            with model.trace(host.inputs(), logits_to_keep=n_columns):
                host.resume(model, layers[0])
                for layer in layers:
                    model.layers[layer].input = substitute(
                        model.layers[layer].input, p_last, value[layer, :, 0]
                    )
                injected = log_probabilities(model.output.logits[:, -n_columns:][:, :n_eval])
                moved = save(summed_kl(predicted["XY"], injected, scored))
            kl[:, s, SOURCES.index(name)] = moved

    # What the host says: once as it is for each task, and for each cell with a source at p_last,
    # or at p_last and then at g1 and g2 as each is reached. A site that the reference, which the
    # sources are read on, does not have is left as it is.
    hosts = list(dict.fromkeys(rows["BY"]))
    injections = [(site, name) for site in SITES for name in source]
    asked = [*hosts, *(rows["BY"] * len(injections))]
    own = torch.zeros(len(hosts), len(JOINT_SITE), dtype=torch.bool, device=model.device)
    exists = torch.stack([reference.reaches(position) for position in JOINT_SITE], dim=1)
    only_p_last = exists & (torch.arange(len(JOINT_SITE), device=model.device) == 0)
    reached = {SITES[0]: only_p_last, SITES[1]: exists}
    where = torch.cat([own, *(reached[site] for site, _ in injections)])  # [row, step]
    value = torch.cat([source[name] for _, name in injections], dim=1)
    value = torch.nn.functional.pad(value, (0, 0, 0, 0, len(hosts), 0))  # [layer, row, step, d]
    place = torch.tensor([rows["BY"].index(ids) for ids in asked], device=model.device)
    cache = prefix["BY"].rows(place).cache() if prefix["BY"] is not None else None
    batch = left_pad(asked, device=model.device)
    with warnings.catch_warnings():
        # Where every continuation ends sooner, the loop over steps is cut short, as it should be.
        warnings.filterwarnings("ignore", message=".*was never reached")
        with model.generate(
            past_key_values=cache,
            max_new_tokens=n_tokens,
            do_sample=False,
            num_beams=1,
        ) as tracer:
            with tracer.invoke(batch.tokens):
                for step in tracer.iter[: min(n_tokens, len(JOINT_SITE))]:
                    for layer in layer_sets[0]:
                        model.layers[layer].input = overwrite_last(
                            model.layers[layer].input, value[layer, :, step], where[:, step]
                        )
            with tracer.invoke():
                said = save(tracer.result)
    answers = read_continuation(said, batch.input_ids.shape[1], n_tokens, ends)
    texts = answers.texts(model.tokenizer)
    unmoved = dict(zip(hosts, texts, strict=False))

    def text(row: int, site: str, name: str) -> str:
        if name == "none":
            return unmoved[rows["BY"][row]]
        return texts[len(hosts) + injections.index((site, name)) * len(cells) + row]

    by_cell = [  # [cell][site][source]
        [[text(row, site, name) for name in SOURCES] for site in SITES] for row in range(len(cells))
    ]
    distinct = torch.tensor(
        [
            [[count_markers(text, cell) for text in of_site] for of_site in of_cell]
            for cell, of_cell in zip(cells, by_cell, strict=True)
        ]
    )
    in_clean = torch.tensor(
        [count_markers(text, cell) for cell, text in zip(cells, clean_text, strict=True)]
    )
    return {
        "kl": kl,
        "closure": closure(kl, none[:, None, None]),
        "n_eval": scored.sum(1),
        "any_marker": distinct > 0,
        "distinct_markers": distinct,
        "text": by_cell,
        "clean_any_marker": in_clean > 0,
        "clean_distinct_markers": in_clean,
        "clean_text": clean_text,
    }


def overwrite_last(hidden: Tensor, value: Tensor, where: Tensor) -> Tensor:
    """Put a value in place of the last column's residual in some rows.

    Args:
        hidden: [row, column, d_model]; not changed.
        value: [row, d_model].
        where: [row], True where it is put.
    """
    hidden = hidden.clone()
    hidden[:, -1] = torch.where(where[:, None], value.to(hidden), hidden[:, -1])
    return hidden
