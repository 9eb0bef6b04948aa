"""How few heads bring a persona? Attention heads, patched into a host that has none.

The host is the prompt with the baseline persona and the cell's task (BY), the clean run the prompt
with the cell's persona (XY); both are followed by what the model says to XY. Behind the persona the
two are the same tokens, the *places*. There a head's output in the host becomes what it is in the
clean run, and all that follows is computed anew: one head alone, which is its effect, or the best
heads of a ranking, as many as a budget allows. All heads together make the host the clean run.
"""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from nnsight import TransformersModel, save
from pydantic import AfterValidator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_nns.declarations import (
    Count,
    Kind,
    Plan,
    Variable,
    agreement,
    budget_labels,
    budget_sizes,
    random_scores,
    scored_tokens,
)
from persona_nns.errors import UsageError
from persona_nns.figures import closure_by_budget, head_maps, needed_by_persona
from persona_nns.prompts import Cell, TwinCell, find_twins
from persona_nns.tracing import (
    TwinRuns,
    attribute,
    closure,
    finish_last_columns,
    has_rotary_positions,
    has_weights,
    log_probabilities,
    run_twins,
    share_out,
    within_budget,
)

protocol_version = 1
defaults = {"grid": "review"}

RANKINGS = ("effect", "attribution", "attention", "transfer", "random")
BY_GRADIENT = ("attribution", "transfer")
#: What is there only where one of these rankings is asked for.
OF_RANKINGS = {
    "effect": ("effect",),
    "agreement": ("effect",),
    "attribution": BY_GRADIENT,
    "transfer_tasks": ("transfer",),
}


def check_rankings(rankings: str) -> str:
    """The labels asked for, in one order."""
    asked = [label.strip() for label in rankings.split(",")]
    if unknown := [label for label in asked if label not in RANKINGS]:
        raise ValueError(f"there is no ranking {', '.join(unknown)}; use {', '.join(RANKINGS)}")
    return ",".join(label for label in RANKINGS if label in asked)


_LABELS: dict[str, Any] = {
    "layer": lambda record, _: range(record.n_layers),
    "head": lambda record, _: range(record.n_heads),
    "ranking": lambda _, asked: asked["rankings"].split(","),
    "budget": lambda record, _: budget_labels(record.n_layers * record.n_heads),
}


def _array(
    dims: str, long_name: str, description: str, units: str = "1", kind: Kind = "float"
) -> Variable:
    """A variable with the labels of its own dimensions; nothing where prompts differ."""
    said = f"{description} Nothing is measured where the prompts differ behind the persona."
    labels = {axis: _LABELS[axis] for axis in dims.split() if axis in _LABELS}
    unmeasured = -1 if kind == "int" else None
    return Variable(dims, long_name, units, said, kind, unmeasured=unmeasured, coords=labels)


variables = {
    "closure": _array(
        "cell ranking budget",
        "closure",
        "Share of the host gap removed by the best heads of a ranking: 1 − KL / KL(none), in each "
        "cell; NaN where there is no gap, or the ranking has no scores.",
    ),
    "kl": _array(
        "cell ranking budget",
        "causal KL",
        "KL(clean XY ‖ patched host) summed over the scored tokens of the clean greedy "
        "continuation, with the best heads of a ranking patched; NaN where it has no scores.",
        "nat",
    ),
    "kl_none": _array("cell", "KL(clean ‖ host)", "The gap, with no head patched.", "nat"),
    "effect": _array(
        "cell layer head", "effect", "KL(none) − KL with this head alone patched.", "nat"
    ),
    "attribution": _array(
        "cell layer head",
        "attribution",
        "Effect to first order, from one backward pass: Σ over places of (clean − host) · ∂(−KL)/∂ "
        "the head's output at the unpatched host.",
        "nat",
    ),
    "attention": _array(
        "cell layer head",
        "attention to the persona",
        "Weight on the persona's tokens in the clean run, mean over places; NaN where the model "
        "gives no weights.",
    ),
    "agreement": _array(
        "cell ranking",
        "agreement with the effect",
        "Spearman correlation of a ranking's scores of all heads with their effects.",
    ),
    "values": _array(
        "cell budget",
        "patched numbers",
        "Numbers patched at each place: heads times the width of one.",
        kind="int",
    ),
    "transfer_tasks": _array(
        "cell",
        "tasks behind the transfer",
        "Other tasks of the persona in the grid, asked for or not, whose attributions the ranking "
        "'transfer' averages.",
        kind="int",
    ),
    "n_eval": replace(scored_tokens(), unmeasured=-1),
}

figures = {
    "closure_by_budget": closure_by_budget,
    "needed_by_persona": needed_by_persona,
    "head_maps": lambda ds: head_maps(ds) if "attribution" in ds or "effect" in ds else None,
}


def prepare(
    model: TransformersModel, store: str | Path, options: dict[str, Any], *, progress: bool
) -> dict[str, Any]:
    """See that the model can be patched, and gives the gradients that are asked for."""
    del store, progress
    if not has_rotary_positions(model):
        kind = model.config.get_text_config().model_type
        raise UsageError(
            f"The heads of a {kind} model cannot be patched from a prompt of another length: its "
            "positions are learned, so that the same tokens enter it as something else; use a "
            "model with rotary positions."
        )
    asked = str(options.get("rankings", ",".join(RANKINGS)))
    if not has_weights(model) and any(label in asked for label in BY_GRADIENT):
        others = ",".join(label for label in RANKINGS if label not in BY_GRADIENT)
        raise UsageError(
            f"The rankings {' and '.join(BY_GRADIENT)} take gradients, which a server does not "
            f"give; the other rankings run there: --rankings {others}."
        )
    return options


def prepares(_: Mapping[str, Any]) -> bool:
    """Nothing has to be there first."""
    return False


def arrange(
    tokenizer: PreTrainedTokenizerBase, plan: Plan, cells: Sequence[Cell], *, rankings: str
) -> Plan:
    """Each cell with its kin, whichever are asked for; all of a persona that are, at a time."""
    every = [unit for unit in plan.units if isinstance(unit, Cell)]
    twins = find_twins(tokenizer, every)
    if differing := [cell.label for cell in cells if not twins[cell.label].n_shared]:
        warnings.warn(
            "Behind the persona, the prompts with it and without are not the same tokens: NaN in "
            f"{', '.join(differing)}.",
            stacklevel=2,
        )
    kin = {
        cell: [of for of in every if of.persona == cell.persona and of != cell] for cell in every
    }
    content = {
        cell.label: {**plan.content[cell.label], "others": [of.task_text for of in others]}
        for cell, others in kin.items()
    }
    return replace(
        plan,
        units=[
            TwinCell(twins[cell.label], tuple(twins[of.label] for of in others))
            for cell, others in kin.items()
        ],
        # Grids share what they measure of a cell, if it does not hang on the others.
        content=content if "transfer" in rankings else plan.content,
        batch_size=max(Counter(cell.persona for cell in cells).values()),
        variables=given_by(rankings.split(",")),
    )


def given_by(rankings: Sequence[str]) -> list[str]:
    """The variables that these rankings give."""
    needed = {name: OF_RANKINGS.get(name, rankings) for name in variables}
    return [name for name in variables if set(needed[name]) & set(rankings)]


def measure(
    model: TransformersModel,
    units: list[TwinCell],
    *,
    rankings: Annotated[str, AfterValidator(check_rankings)] = ",".join(RANKINGS),
    n_eval: Count = 10,
    seed: int = 0,
    reuse: bool = True,
) -> dict[str, Tensor]:
    """Measure a batch of cells.

    Args:
        model: from `load_model`.
        units: the cells, with their kin; the leading axis of every result.
        rankings: by what heads are ranked: effect (a pass a head), attribution, attention,
            transfer (attribution on the grid's other tasks of the persona), random.
        n_eval: reference tokens that the KL is summed over.
        seed: of the ranking ``random``.
        reuse: run what stands before the places once, and resume at the layer of a patch.
    """
    asked = rankings.split(",")
    needed = {each.label: each for unit in units for each in (unit.own, *unit.others)}
    if "transfer" not in asked:
        needed = {unit.label: unit.own for unit in units}
    pairs = run_twins(model, list(needed.values()), n_eval, reuse=reuse)
    by_gradient = {}
    if set(asked) & set(BY_GRADIENT):
        by_gradient = {label: attribute_heads(model, pair) for label, pair in pairs.items()}
    measured: list[dict[str, Tensor]] = []
    for unit in units:
        results = nothing_measured(model, asked)
        if unit.label in pairs:
            pair = pairs[unit.label]
            results |= rank_heads(model, unit, pair, by_gradient, asked, seed)
            results |= spend(model, pair, results["scores"])
        measured.append(results)
    return {name: torch.stack([of[name] for of in measured]) for name in measured[0]}


def finish(_: Any, __: Any, measured: dict[str, Any], *, rankings: str) -> dict[str, Any]:
    """How well the scores of each ranking agree with the effects."""
    pairs = zip(measured["scores"], measured["effect"], strict=True)
    agreements = [[agreement(scores, effect) for scores in of_cell] for of_cell, effect in pairs]
    measured["agreement"] = np.array(agreements)
    return {name: measured[name] for name in given_by(rankings.split(","))}


def nothing_measured(model: TransformersModel, rankings: Sequence[str]) -> dict[str, Tensor]:
    """What is returned of a cell in which no heads can be compared."""
    n_heads = model.config.get_text_config().num_attention_heads
    heads = torch.full((len(model.layers), n_heads), torch.nan)
    budgets = budget_labels(heads.numel())
    curves = torch.full((len(rankings), len(budgets)), torch.nan)
    return {
        **dict.fromkeys(("effect", "attribution", "attention"), heads),
        "scores": heads.expand(len(rankings), -1, -1),
        **dict.fromkeys(("kl", "closure"), curves),
        "kl_none": torch.tensor(torch.nan),
        "values": torch.full((len(budgets),), -1),
        **dict.fromkeys(("transfer_tasks", "n_eval"), torch.tensor(-1)),
    }


def rank_heads(
    model: TransformersModel,
    unit: TwinCell,
    runs: TwinRuns,
    by_gradient: Mapping[str, Tensor],
    rankings: Sequence[str],
    seed: int,
) -> dict[str, Tensor]:
    """The scores of every head by every ranking, and what they come from."""
    nothing = torch.full_like(runs.clean.attention, torch.nan)
    kin = [by_gradient[each.label] for each in unit.others if each.label in by_gradient]
    by_chance = torch.from_numpy(random_scores(seed, unit.label, nothing.numel()))
    of_ranking = {
        "effect": patch_each(model, runs) if "effect" in rankings else nothing,
        "attribution": by_gradient.get(unit.label, nothing),
        "attention": runs.clean.attention,
        "transfer": torch.stack(kin).mean(0) if kin else nothing,
        "random": by_chance.to(nothing).view_as(nothing),
    }
    return {
        **{name: of_ranking[name] for name in ("effect", "attribution", "attention")},
        "scores": torch.stack([of_ranking[name] for name in rankings]),
        "transfer_tasks": torch.tensor(len(kin)),
    }


def attribute_heads(model: TransformersModel, runs: TwinRuns) -> Tensor:
    """What each head would add to −KL, to first order, [layer, head]."""
    host = runs.host.window
    is_place = torch.zeros_like(host.input_ids, dtype=torch.bool)
    is_place[:, -runs.n_places :] = True

    def nearness(logits: Tensor) -> Tensor:
        return -runs.kl(log_probabilities(logits))

    width, n_scored = host.input_ids.shape[1], runs.clean.predicted.shape[1]
    scored = torch.arange(width - n_scored, width, device=model.device)[None]
    clean = runs.clean.window
    return attribute(model, clean, host, nearness, places=is_place, asked=scored)[0]


def patch_each(model: TransformersModel, runs: TwinRuns) -> Tensor:
    """The effect of each head, [layer, head]: KL(none) − KL with the head alone patched."""
    every = list(range(runs.n_heads))
    kl = [
        patch_alone(model, runs, layer, heads)
        for layer in range(len(model.layers))
        for heads in share_out(every, runs.host.window, runs.clean.predicted)
    ]
    return runs.none - torch.cat(kl).view(len(model.layers), -1)


def patch_alone(
    model: TransformersModel, runs: TwinRuns, layer: int, heads: Sequence[int]
) -> Tensor:
    """KL with one head of a block patched, [head]: each in a row of its own."""
    passed, n_scored = runs.host.window.times(len(heads)), runs.clean.predicted.shape[1]
    alone = torch.eye(runs.n_heads, dtype=torch.bool, device=model.device)[list(heads)]
    with model.trace(passed.inputs(), logits_to_keep=n_scored):
        passed.resume(model, layer)
        attention = model.layers[layer].attn
        if passed.clean is None:
            own = attention.o_proj.input
            attention.o_proj.input = runs.patch(own, layer, alone)
        else:  # below the projection, everything is as it was
            own = runs.host.heads[layer]
            attention.skip((attention.o_proj(runs.patch(own, layer, alone)), None))
            finish_last_columns(model, n_scored, attention_too=layer + 1 < len(model.layers))
        kl = save(runs.kl(log_probabilities(model.output.logits)))
    return kl  # noqa: RET504 - there only once the trace has run


def spend(model: TransformersModel, runs: TwinRuns, scores: Tensor) -> dict[str, Tensor]:
    """What the best heads of each ranking bring, in budgets of growing size.

    Args:
        model: from `load_model`.
        runs: of the cell.
        scores: [ranking, layer, head]; a ranking without scores brings NaN.
    """
    flat = scores.flatten(1)
    sizes = budget_sizes(budget_labels(flat.shape[1]), flat.shape[1])
    chosen = within_budget(flat.nan_to_num(), sizes)
    sets, which = chosen.flatten(0, 1).unique(dim=0, return_inverse=True)
    brought = runs.none.repeat(len(sets))
    some = sets.any(1).nonzero()[:, 0].tolist()
    for part in share_out(some, runs.host.window, runs.clean.predicted):
        brought[part] = patch_sets(model, runs, sets[part].view(-1, *scores.shape[1:]))
    unknown = flat.isnan().any(1, keepdim=True)
    kl = torch.where(unknown, torch.nan, brought[which].view(len(flat), -1))
    d_head = runs.host.heads[0].shape[-1] // scores.shape[-1]
    return {
        "kl": kl,
        "closure": closure(kl, runs.none),
        "kl_none": runs.none,
        "values": torch.tensor(sizes) * d_head,
        "n_eval": torch.tensor(runs.clean.predicted.shape[1]),
    }


def patch_sets(model: TransformersModel, runs: TwinRuns, heads: Tensor) -> Tensor:
    """KL with sets of heads of all blocks patched at once, [row].

    Args:
        model: from `load_model`.
        runs: of the cell.
        heads: [row, layer, head].
    """
    passed, n_scored = runs.host.window.times(len(heads)), runs.clean.predicted.shape[1]
    with model.trace(passed.inputs(), logits_to_keep=n_scored):
        for layer, block in enumerate(model.layers):
            own = block.attn.o_proj.input
            block.attn.o_proj.input = runs.patch(own, layer, heads[:, layer])
        if passed.clean is not None:
            finish_last_columns(model, n_scored, attention_too=False)
        kl = save(runs.kl(log_probabilities(model.output.logits)))
    return kl  # noqa: RET504 - there only once the trace has run
