"""Why does an injected residual fail to bring the persona back? Host injection under controls.

In host injection (`host_injection`; "As X, Do Y" §7) the host BY gets the long persona's residual
at p_last, and most of the gap to the long persona XY stays. The paper blames missing attention
to the persona's tokens. But host and clean run differ in more: the size of the vector and its
normalisation, the length of the prompt, the one site, the keys and values of all other
positions, and that the injection happens once. Each is matched here, alone and together:

`norm` rescales what is injected to the norm of the host's own residual there; `rms` rescales the
output of the next norm to the RMS that the host's own has there. `persona_length` pads the host's
persona with neutral text to the persona's token count; `total_length` opens the message that
holds the persona with neutral text until all that follows stands where it stands in XY. `tail`
injects at every position of the template tail, `tail+task` at the last tokens of the task too,
aligned from the end. `kv` gives the task and tail before p_last the clean run's keys and values at
every layer; what is left of the host is prefix and persona. `every_step` injects at p_last and, as
they are reached, at all generated positions. `together` is all of these (with `persona_length`,
and `tail+task`), `together_own_size` the same without `norm` and `rms`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Literal

import torch
from nnsight import TransformersModel, save
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_nns.declarations import Count, Variable, label_layer_set, scored_tokens
from persona_nns.figures import by_control
from persona_nns.prompts import (
    NEUTRAL,
    ROLE_PROMPTS,
    Cell,
    PaddedPrompt,
    Prompt,
    Span,
    pad_persona,
    pad_total,
    render_cell,
)
from persona_nns.tracing import (
    CleanRun,
    Continuation,
    additive,
    closure,
    force,
    has_input_norms,
    last_columns,
    log_probabilities,
    prefill_rows,
    put,
    root_mean_square,
    say,
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
        description="Neutral tokens in the control's host; NaN where it is too long already.",
        kind="int",
        unmeasured=-1,
        coords={"control": tuple(CONTROLS)},
    ),
    "n_eval": scored_tokens(),
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
    n_eval: Count = 10,
    task_tokens: Count = 8,
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
    prompts, n_neutral = render_prompts(model.tokenizer, cells, neutral)
    xy = prefill_rows(model, [prompt.ids for prompt in prompts["XY"]], reuse=reuse)
    reference = say(model, xy, n_eval)
    reference.warn_if_short([cell.label for cell in cells], n_eval)
    runs = run_prompts(model, prompts, reference, reuse=reuse)
    shape = (len(cells), len(layer_sets), len(CONTROLS), len(SOURCES))
    kl, gap = torch.empty(2, *shape, device=model.device)
    for c, control in enumerate(CONTROLS.values()):
        columns = columns_of(control, runs, task_tokens)
        gap[:, :, c] = runs.gap(control)[:, None, None]
        for (s, layers), (k, source) in product(enumerate(layer_sets), enumerate(SOURCES)):
            kl[:, s, c, k] = inject(model, runs, control, layers, source, *columns)
    kl[(n_neutral < 0)[:, None, :, None].expand(shape)] = torch.nan
    return {
        "kl": kl,
        "closure": closure(kl, gap),
        "n_neutral": n_neutral,
        "n_eval": runs.scored.sum(1),
    }


def render_prompts(
    tokenizer: PreTrainedTokenizerBase, cells: Sequence[Cell], neutral: str
) -> tuple[dict[str, list[Prompt]], Tensor]:
    """The four prompts and the padded hosts of each cell, and neutral tokens [cell, control]."""
    of_cell = [render_cell(tokenizer, cell) for cell in cells]
    hosts = {
        "BY": [PaddedPrompt(prompt["BY"], 0) for prompt in of_cell],
        "persona_length": [
            pad_persona(tokenizer, cell, prompt["BY"], prompt["XY"], neutral)
            for cell, prompt in zip(cells, of_cell, strict=True)
        ],
        "total_length": [
            pad_total(tokenizer, cell, prompt["BY"], prompt["XY"], neutral)
            for cell, prompt in zip(cells, of_cell, strict=True)
        ],
    }
    prompts = {
        **{name: [prompt[name] for prompt in of_cell] for name in ROLE_PROMPTS},
        **{name: [host.prompt for host in of_name] for name, of_name in hosts.items()},
    }
    n_neutral = [[host.n_neutral for host in hosts[control.host]] for control in CONTROLS.values()]
    return prompts, torch.tensor(n_neutral).T


@dataclass(frozen=True)
class Runs:
    """Every prompt of a batch of cells, by name, followed by the reference.

    Columns are counted from the end, where prompts are alike: those of task, tail and reference.
    """

    prompts: Mapping[str, Sequence[Prompt]]
    whole: Mapping[str, CleanRun]
    predicted: Mapping[str, Tensor]  # log-probabilities, [cell, token, vocabulary]
    residual: Mapping[str, Tensor]  # at the input of every block, [layer, cell, column, d_model]
    source: Mapping[str, Tensor]  # what is injected, as `residual`
    scored: Tensor  # [cell, reference token]

    def gap(self, control: Control) -> Tensor:
        """KL of a control's own host with nothing injected, [cell]."""
        return summed_kl(self.predicted["XY"], self.predicted[control.host], self.scored)


def run_prompts(
    model: TransformersModel,
    prompts: Mapping[str, Sequence[Prompt]],
    reference: Continuation,
    *,
    reuse: bool,
) -> Runs:
    """Run every prompt followed by the reference."""
    n_shown = max(len(prompt) - prompt.spans["task"].start for prompt in prompts["XY"])
    forced = reference.ids[:, :-1]
    whole: dict[str, CleanRun] = {}
    for name, of_name in prompts.items():
        rows = prefill_rows(model, [prompt.ids for prompt in of_name], n_shown, reuse=reuse)
        whole[name] = force(model, rows, forced)
    width = n_shown + forced.shape[1]
    residual = {name: last_columns(run.residual.float(), width) for name, run in whole.items()}
    bb, xb, by, xy = (residual[name] for name in ROLE_PROMPTS)
    return Runs(
        prompts,
        whole,
        predicted={name: log_probabilities(run.logits) for name, run in whole.items()},
        residual=residual,
        source={"cached": additive(bb, xb, by), "oracle": xy},
        scored=reference.scored("p_last", forced.shape[1] + 1),
    )


def inject(
    model: TransformersModel,
    runs: Runs,
    control: Control,
    layers: Sequence[int],
    source: str,
    site: Tensor,
    given: Tensor,
) -> Tensor:
    """KL of the control's host with a source at its sites, at each layer of a set at once, [cell].

    Under kv it has the clean residuals at task and tail at every layer, which give the clean keys
    and values at the host's positions.
    """
    if control.rms and not has_input_norms(model):
        return torch.full((len(site),), torch.nan)
    layers = layers if source in runs.source else []
    if not (layers or control.kv):
        return runs.gap(control)
    run, n_eval = runs.whole[control.host], runs.scored.shape[1]
    own, state = runs.residual[control.host], runs.residual["XY"]
    value = runs.source.get(source, state)
    if control.norm:
        norm = value.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        value = value * own.norm(dim=-1, keepdim=True) / norm
    lowest = 0 if control.kv else layers[0]
    window = run.narrow(first_token(run, site | given), n_eval)
    n_columns = window.input_ids.shape[1]
    value, state, own = (last_columns(each, n_columns) for each in (value, state, own))
    at, kept = (
        last_columns(where[..., None], n_columns)[..., 0].to(model.device)
        for where in (site, given)
    )
    with model.trace(window.inputs(), logits_to_keep=n_eval):
        window.resume(model, lowest)
        for layer in range(lowest, len(model.layers)):
            block = model.layers[layer]
            hidden = block.input
            if control.kv:
                hidden = put(hidden, kept, state[layer])
            if layer in layers:
                hidden = put(hidden, at, value[layer])
            block.input = hidden
            if layer in layers and control.rms:
                normed = block.input_norm.output
                size = root_mean_square(block.input_norm(own[layer].to(normed)))
                scale = size / root_mean_square(normed).clamp(min=1e-12)
                block.input_norm.output = put(normed, at, normed.float() * scale)
        predicted = log_probabilities(model.output.logits)
        kl = save(summed_kl(runs.predicted["XY"], predicted, runs.scored))
    return kl  # noqa: RET504 - there only once the trace has run


def columns_of(control: Control, runs: Runs, task_tokens: int) -> tuple[Tensor, Tensor]:
    """Where a control injects, and where it gives the clean keys and values; both [cell, column].

    A position of a span is one that all prompts of the cell have in the span; what is given is
    not injected at. ``task_tokens`` is how many of the task's last belong to ``tail+task``.
    """
    width, n_after = runs.residual["XY"].shape[2], runs.scored.shape[1] - 1

    def shared(span: Span, names: tuple[str, ...]) -> Tensor:
        return torch.stack(
            [span_columns(runs.prompts[name], span, width, n_after) for name in names]
        ).all(0)

    pair = ("XY", control.host)
    place = torch.arange(width).expand(len(runs.scored), -1) - (width - n_after - 1)
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
