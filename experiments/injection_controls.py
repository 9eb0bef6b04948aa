"""Why does an injected residual fail to bring the persona back? Host injection under controls.

In host injection (`host_injection`; "As X, Do Y" §7) the host BY gets the long persona's residual
at p_last, and most of the gap to the long persona XY stays. The paper blames missing attention
to the persona's tokens. But host and clean run differ in more: the size of the vector and its
normalisation, the length of the prompt, the one site, the keys and values of all other
positions, and that the injection happens once. Each is matched here, alone and together:

`norm` rescales what is injected to the norm of the host's own residual there; `rms` rescales the
output of the next norm to the RMS that the host's own has there. `persona_length` pads the host's
persona with neutral text to the persona's token count; `total_length` puts neutral text before
the role prompt until all that follows stands where it stands in XY. `tail` injects at every
position of the template tail, `tail+task` at the last tokens of the task too, aligned from the
end. `kv` gives the task and tail before p_last the clean run's keys and values at every layer;
what is left of the host is prefix and persona. `every_step` injects at p_last and, as they are
reached, at all generated positions. `together` is all of these (with `persona_length`, and
`tail+task`), `together_own_size` the same without `norm` and `rms`.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from nnsight import TransformersModel, save
from pydantic import Field
from torch import Tensor
from transformers import DynamicCache

from persona_nns.declarations import Variable, label_layer_set
from persona_nns.figures import by_control
from persona_nns.prompts import (
    NEUTRAL,
    ROLE_PROMPTS,
    Cell,
    Prompt,
    Span,
    pad_persona,
    pad_total,
    render_cell,
)
from persona_nns.tracing import (
    CleanRun,
    additive,
    closure,
    end_tokens,
    last_columns,
    left_pad,
    log_probabilities,
    open_window,
    prefill,
    put,
    read_cache,
    read_continuation,
    root_mean_square,
    span_columns,
    summed_kl,
)

protocol_version = 1
# Layer 14 of the 26 of Gemma-2-2B, and the layer nearest to that depth elsewhere.
defaults = {"grid": "review", "layer_sets": "0.5385"}

SOURCES = ("none", "cached", "oracle")


@dataclass(frozen=True)
class Control:
    """What of host and injection is made equal to the clean run.

    Attributes:
        host: the prompt injected into: BY, or BY with neutral text.
        norm: rescale the vector to the norm of the host's own residual.
        rms: rescale the next norm's output to the RMS of the host's own.
        site: where before the continuation it is injected.
        kv: task and tail before p_last have the clean run's keys and values.
        every_step: inject at every generated position too.
    """

    host: Literal["BY", "persona_length", "total_length"] = "BY"
    norm: bool = False
    rms: bool = False
    site: Literal["p_last", "tail", "tail+task"] = "p_last"
    kv: bool = False
    every_step: bool = False


CONTROLS = {
    "uncontrolled": Control(),
    "norm": Control(norm=True),
    "rms": Control(rms=True),
    "persona_length": Control(host="persona_length"),
    "total_length": Control(host="total_length"),
    "tail": Control(site="tail"),
    "tail+task": Control(site="tail+task"),
    "kv": Control(kv=True),
    "every_step": Control(every_step=True),
    "together": Control(
        host="persona_length", norm=True, rms=True, site="tail+task", kv=True, every_step=True
    ),
    "together_own_size": Control(host="persona_length", site="tail+task", kv=True, every_step=True),
}

_COORDS = {
    "layer_set": lambda _, parameters: [label_layer_set(s) for s in parameters["layer_sets"]],
    "control": tuple(CONTROLS),
    "source": SOURCES,
}

variables = {
    "kl": Variable(
        "cell layer_set control source",
        "KL to the long persona",
        units="nat",
        description="KL(long persona ‖ host) summed over the scored reference tokens, with the "
        "source injected under the control at each layer of the set. none injects nothing: it is "
        "the control's own host, under kv and together with the clean keys and values. NaN where "
        "the host is too long to be padded, and for rms in a model without input norms.",
        coords=_COORDS,
    ),
    "closure": Variable(
        "cell layer_set control source",
        "closure",
        description="1 − KL / KL of the control's own host prompt (padded or not) with nothing "
        "injected and its own keys and values; NaN where that is no gap.",
        coords=_COORDS,
    ),
    "n_neutral": Variable(
        "cell control",
        "neutral tokens",
        units="token",
        description="Neutral tokens in the control's host; −1 where it is too long already.",
        kind="int",
        coords={"control": tuple(CONTROLS)},
    ),
    "n_eval": Variable(
        "cell",
        "scored tokens",
        units="token",
        description="Reference tokens the KL is summed over; fewer than asked for where the "
        "continuation ends early.",
        kind="int",
    ),
}

figures = {
    "closure": lambda ds: by_control(ds, "closure"),
    "kl": lambda ds: by_control(ds, "kl"),
}


def measure(
    model: TransformersModel,
    cells: list[Cell],
    *,
    layer_sets: list[list[int]],
    n_eval: Annotated[int, Field(ge=1)] = 10,
    task_tokens: Annotated[int, Field(ge=1)] = 8,
    neutral: Annotated[str, Field(min_length=1)] = NEUTRAL,
    reuse: bool = True,
) -> dict[str, Tensor]:
    """Measure a batch of cells.

    Args:
        model: from `load_model`.
        cells: the cells; the leading axis of every result.
        layer_sets: sets of layers to inject at.
        n_eval: reference tokens that the KL is summed over.
        task_tokens: how many of the task's last tokens belong to the site tail+task; fewer,
            where the task of one of the cell's prompts is shorter.
        neutral: the text that hosts are padded with, repeated as often as needed.
        reuse: run shared prefixes once and resume at the lowest layer of an injection.
    """
    of_cell = [render_cell(model.tokenizer, cell) for cell in cells]
    prompts = {name: [prompt[name] for prompt in of_cell] for name in ROLE_PROMPTS}
    pairs = list(zip(prompts["BY"], prompts["XY"], strict=True))
    padded = {
        "persona_length": [
            pad_persona(model.tokenizer, cell, *pair, neutral)
            for cell, pair in zip(cells, pairs, strict=True)
        ],
        "total_length": [pad_total(model.tokenizer, *pair, neutral) for pair in pairs],
    }
    every: dict[str, list[Prompt]] = {
        **prompts,
        **{name: [host.prompt for host in hosts] for name, hosts in padded.items()},
    }

    # The reference: what the model says, greedily, to the long-persona prompt.
    rows = [prompt.ids for prompt in prompts["XY"]]
    prefix = prefill(model, [ids[:-1] for ids in rows], reuse=reuse)
    xy = left_pad(rows, device=model.device)
    with model.generate(
        xy.tokens,
        past_key_values=prefix.cache() if prefix is not None else None,
        max_new_tokens=n_eval,
        do_sample=False,
        num_beams=1,
    ) as tracer:
        said = save(tracer.result)
    reference = read_continuation(said, xy.input_ids.shape[1], n_eval, end_tokens(model))
    reference.warn_if_short([cell.label for cell in cells], n_eval)
    scored = reference.scored("p_last", n_eval)

    # Every prompt followed by the reference: residuals at the input of every block and the RMS of
    # what the next norm makes of them, [layer, cell, column, d_model or 1], and distributions.
    # Columns are counted from the end, where prompts are alike: those of task, tail and reference.
    n_shown = max(len(prompt) - prompt.spans["task"].start for prompt in prompts["XY"])
    width = n_shown + n_eval - 1
    has_norm = all(hasattr(block, "input_norm") for block in model.layers)
    runs: dict[str, CleanRun] = {}
    residual: dict[str, Tensor] = {}
    rms: dict[str, Tensor] = {}
    for name, of_name in every.items():
        rows = [prompt.ids for prompt in of_name]
        prefix = prefill(model, [ids[:-n_shown] for ids in rows], reuse=reuse)
        window = open_window(rows, reference.ids[:, :-1], prefix)
        inputs: Any = window.inputs()
        if reuse and prefix is None:  # a prompt without a token before the window
            inputs |= {"past_key_values": DynamicCache(), "use_cache": True}
        with model.trace(inputs, logits_to_keep=n_eval):
            read, size = save([]), save([])
            for block in model.layers:
                read.append(block.input)
                if has_norm:
                    size.append(root_mean_square(block.input_norm.output))
            cache = save(model.output.past_key_values)
            predicted = save(log_probabilities(model.output.logits))
        runs[name] = CleanRun(
            window=window,
            n_prompt=window.input_ids.shape[1] - n_eval + 1,
            logits=predicted,
            residual=torch.stack(read),
            cache=read_cache(cache, window.attention_mask) if reuse else None,
        )
        residual[name] = last_columns(torch.stack(read).float(), width)
        rms[name] = last_columns(torch.stack(size), width) if has_norm else residual[name][..., :1]
    clean = runs["XY"].logits
    source = {
        "none": residual["XY"],  # put nowhere
        "cached": additive(residual["BB"], residual["XB"], residual["BY"]),
        "oracle": residual["XY"],
    }

    # The control's host again with a source at its sites, at each layer of a set at once, and
    # under kv with the clean residuals at task and tail at every layer, which give the clean keys
    # and values at the host's positions.
    shape = (len(layer_sets), len(CONTROLS), len(SOURCES), len(cells))
    kl = torch.full(shape, torch.nan, device=model.device)
    host_gap = torch.empty(len(CONTROLS), len(cells), device=model.device)
    for c, control in enumerate(CONTROLS.values()):
        host = runs[control.host]
        if control.rms and not has_norm:
            continue
        host_gap[c] = summed_kl(clean, host.logits, scored)
        site, given = columns_of(control, every, width, n_eval - 1, task_tokens)
        own_norm = residual[control.host].norm(dim=-1, keepdim=True)
        for s, layers in enumerate(layer_sets):
            for k, (name, value) in enumerate(source.items()):
                injected = [] if name == "none" else layers
                if not (injected or control.kv):
                    kl[s, c, k] = host_gap[c]
                    continue
                if control.norm:
                    value = value * own_norm / value.norm(dim=-1, keepdim=True).clamp(min=1e-12)
                lowest = 0 if control.kv else layers[0]
                window = host.narrow(first_token(host, site | given), n_eval)
                n_columns = window.input_ids.shape[1]
                at, kept = (
                    last_columns(where[..., None], n_columns)[..., 0].to(model.device)
                    for where in (site, given)
                )
                sourced, state, size = (
                    last_columns(values, n_columns)
                    for values in (value, residual["XY"], rms[control.host])
                )
                with model.trace(window.inputs(), logits_to_keep=n_eval):
                    window.resume(model, lowest)
                    for layer in range(lowest, len(model.layers)):
                        block = model.layers[layer]
                        hidden = block.input
                        if control.kv:
                            hidden = put(hidden, kept, state[layer])
                        if layer in injected:
                            hidden = put(hidden, at, sourced[layer])
                        block.input = hidden
                        if layer in injected and control.rms:
                            normed = block.input_norm.output
                            scale = size[layer] / root_mean_square(normed).clamp(min=1e-12)
                            block.input_norm.output = put(normed, at, normed.float() * scale)
                    predicted = log_probabilities(model.output.logits)
                    moved = save(summed_kl(clean, predicted, scored))
                kl[s, c, k] = moved

    n_neutral = torch.zeros(len(cells), len(CONTROLS), dtype=torch.long)
    for c, control in enumerate(CONTROLS.values()):
        if control.host in padded:
            n_neutral[:, c] = torch.tensor([host.n_neutral for host in padded[control.host]])
    fits = (n_neutral >= 0).T[None, :, None].to(model.device)
    kl = torch.where(fits, kl, torch.nan)
    return {
        "kl": kl.permute(3, 0, 1, 2),
        "closure": closure(kl, host_gap[None, :, None]).permute(3, 0, 1, 2),
        "n_neutral": n_neutral,
        "n_eval": scored.sum(1),
    }


def columns_of(
    control: Control, prompts: dict[str, list[Prompt]], width: int, n_after: int, task_tokens: int
) -> tuple[Tensor, Tensor]:
    """Where a control injects, and where it gives the clean keys and values.

    Args:
        control: which one.
        prompts: by name; a position is one that all prompts of the cell have in the same span.
        width: columns, counted from the end.
        n_after: how many of them follow the prompts.
        task_tokens: how many of the task's last tokens belong to the site ``tail+task``.

    Returns:
        Both [cell, column]. What is given is not injected at.
    """

    def shared(span: Span, names: tuple[str, ...]) -> Tensor:
        return torch.stack(
            [span_columns(prompts[name], span, width, n_after) for name in names]
        ).all(0)

    pair = ("XY", control.host)
    place = torch.arange(width).expand(len(prompts["XY"]), -1) - (width - n_after - 1)
    p_last, generated = place == 0, place > 0
    given = (shared("task", pair) | shared("tail", pair)) & (place < 0) & control.kv
    site = p_last | (generated & control.every_step)
    if control.site != "p_last":
        site = site | shared("tail", (*ROLE_PROMPTS, control.host))
    if control.site == "tail+task":
        task = shared("task", (*ROLE_PROMPTS, control.host))
        from_end = task.flip(1).cumsum(1).flip(1)
        site = site | (task & (from_end <= task_tokens))
    return site & ~given, given


def first_token(run: CleanRun, where: Tensor) -> Tensor:
    """The token of each row that stands in the first column in which anything is done, [row]."""
    window = run.window
    first = int(where.any(0).nonzero()[0]) - where.shape[1] + window.input_ids.shape[1]
    return first + window.start - window.padding
