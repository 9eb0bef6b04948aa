"""How few keys and values carry a persona? The grafted persona, cut down to its best parts.

The host is the prompt with the baseline persona and the cell's task (BY). The persona's keys and
values, as they are in the clean prompt (XY), are grafted into it as `kv_graft` does, but only a
part of them: some key-value heads of some layers, or some of the persona's tokens. Parts are taken
in an order, the best ones first by one of several scores. How much of the distance to the clean
run does each budget close, and how many bytes is that?
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
from nnsight import TransformersModel, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_nns.declarations import (
    Count,
    Kind,
    ModelRecord,
    Plan,
    Variable,
    agreement,
    budget_labels,
    budget_sizes,
    scored_tokens,
    some_of,
)
from persona_nns.figures import (
    closure_by_budget,
    closure_by_bytes,
    kv_head_maps,
    needed_by_persona,
    persona_tokens,
)
from persona_nns.prompts import Cell, PersonaCell, label_tokens
from persona_nns.tracing import (
    GraftedTokens,
    Hosts,
    PersonaSlots,
    Prefilled,
    block_keys,
    closure,
    each_once,
    first_texts,
    log_probabilities,
    look_at,
    open_hosts,
    open_persona_slots,
    open_tokens,
    read_host,
    share_out,
    shuffled,
    spend,
    stack_layers,
    summed_kl,
    tell,
    weigh_parts,
    weights_of,
)

protocol_version = 1
defaults = {"grid": "review"}

UNITS = ("layer_head", "token")
RANKINGS = ("effect", "attention", "attention_value", "random")
N_TOP = 10


def _budgets(record: ModelRecord, asked: Mapping[str, Any]) -> list[str]:
    return budget_labels(max(record.n_layers * record.n_kv_heads, len(asked["token"])))


_LABELS: dict[str, Any] = {
    "unit": lambda _, asked: asked["units"].split(","),
    "ranking": lambda _, asked: asked["rankings"].split(","),
    "budget": _budgets,
    "layer": lambda record, _: range(record.n_layers),
    "kv_head": lambda record, _: range(record.n_kv_heads),
    "place": range(N_TOP),
}


def _array(
    dims: str, long_name: str, description: str, units: str = "1", kind: Kind = "float"
) -> Variable:
    """A variable with the labels of its own dimensions."""
    labels = {axis: _LABELS[axis] for axis in dims.split() if axis in _LABELS}
    return Variable(dims, long_name, units, description, kind, coords=labels)


_CURVE = "cell unit ranking budget"
_WEIGHT = "Attention of the clean run, mean over p_last and the forced tokens that are scored"
variables = {
    "kl": _array(
        _CURVE,
        "causal KL",
        "KL(clean XY ‖ host with the best parts of the persona), summed over the scored tokens of "
        "the clean greedy continuation. A budget beyond a cell's own number of parts is all of it.",
        "nat",
    ),
    "closure": _array(
        _CURVE,
        "closure",
        "Share of the host gap removed: 1 − KL / KL(none), in each cell; NaN without a gap.",
    ),
    "cache_bytes": _array(
        "cell unit budget",
        "kept keys and values",
        "Size of the persona's keys and values that are kept, in the model's precision.",
        "byte",
        "int",
    ),
    "agreement": _array(
        "cell unit ranking",
        "agreement with the effect",
        "Spearman's correlation of a ranking's scores with the effects, over the parts of a cell.",
    ),
    "effect": _array(
        "cell layer kv_head",
        "effect",
        "KL(none) − KL(the persona in this key-value head of this layer alone).",
        "nat",
    ),
    "attention": _array(
        "cell layer kv_head",
        "attention to the persona",
        f"{_WEIGHT} and over the query heads of a key-value head, summed over the persona.",
    ),
    "attention_value": _array(
        "cell layer kv_head",
        "value-weighted attention to the persona",
        "As attention, each token's weight times the norm of its value in that key-value head.",
    ),
    "token_effect": _array(
        "cell token", "effect of a token", "KL(all tokens but this one) − KL(all of them).", "nat"
    ),
    "token_attention": _array(
        "cell token", "attention to a token", f"{_WEIGHT} and over all layers and heads."
    ),
    "token_attention_value": _array(
        "cell token",
        "value-weighted attention to a token",
        "As attention, each weight times the norm of the token's value in that layer and head.",
    ),
    "token_text": _array("cell token", "token", "The persona's tokens as text.", kind="text"),
    "top_tokens": _array(
        "cell ranking place", "best tokens", "The first tokens of each ranking.", kind="text"
    ),
    "kl_none": _array("cell", "KL(clean ‖ host)", "The gap: the graft `none` of kv_graft.", "nat"),
    "n_eval": scored_tokens(),
}

# What is measured of one unit alone, and what is said of effects.
_OF_UNIT = {
    "layer_head": {"effect", "attention", "attention_value"},
    "token": {name for name in variables if "token" in name},
}
_OF_EFFECTS = {"effect", "token_effect", "agreement"}


figures = {
    "persona_tokens": persona_tokens,
    "closure": closure_by_budget,
    "closure_by_bytes": closure_by_bytes,
    "needed": needed_by_persona,
    "heads": kv_head_maps,
}


def arrange(
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    _: Sequence[Cell],
    *,
    units: str = ",".join(UNITS),
    rankings: str = ",".join(RANKINGS),
) -> Plan:
    """Give every token of the longest persona a label, and leave out what is not asked for."""
    left_out = {name for unit in UNITS if unit not in units.split(",") for name in _OF_UNIT[unit]}
    left_out |= set() if "effect" in rankings.split(",") else _OF_EFFECTS
    asked = [name for name in variables if name not in left_out]
    return replace(label_tokens(tokenizer, plan), variables=asked, within_window=True)


def measure(
    model: TransformersModel,
    cells: list[PersonaCell],
    *,
    units: Annotated[str, some_of("unit", UNITS)] = ",".join(UNITS),
    rankings: Annotated[str, some_of("ranking", RANKINGS)] = ",".join(RANKINGS),
    seed: int = 0,
    n_eval: Count = 10,
    reuse: bool = True,
) -> dict[str, Any]:
    """Measure a batch of cells.

    Args:
        model: from `load_model`.
        cells: the cells; the leading axis of every result.
        units: what the persona is cut into: layer_head (a key-value head of a layer), token.
        rankings: the orders in which parts are taken; without effect, few passes are run.
        seed: of the random order.
        n_eval: reference tokens that the KL is summed over.
        reuse: for the effect of a key-value head, go on from the host's residual at its layer.
    """
    hosts, n_longest = open_hosts(model, [each.cell for each in cells], n_eval), cells[0].n_longest
    weights = weigh_parts(hosts.sources, look_at_all(model, hosts), n_longest)
    asked, labels = rankings.split(","), budget_labels(max(math.prod(hosts.shape), n_longest))
    measured: dict[str, Any] = {"kl_none": hosts.kl, "n_eval": hosts.reference.scored.sum(1)}
    curves: list[tuple[Tensor, Tensor]] = []
    for unit in units.split(","):
        cut = cut_heads if unit == "layer_head" else cut_tokens
        parts = cut(model, hosts, n_longest, reuse=reuse)
        known = {**weights[unit], **({"effect": parts.effects()} if "effect" in asked else {})}
        known = {name: of.where(parts.exists, torch.nan) for name, of in known.items()}
        measured |= parts.named(known)
        scores = known | {"random": shuffled(seed, [cell.label for cell in cells], parts.exists)}
        measured[f"{unit}_scores"] = torch.stack([scores[name] for name in asked], dim=1)
        sizes = [budget_sizes(labels, count) for count in parts.exists.sum(1).tolist()]
        kl = spend(parts.score, measured[f"{unit}_scores"], parts.exists, sizes)
        curves.append((kl, parts.bytes_each[:, None] * torch.tensor(sizes, device=kl.device)))
    kl, kept = (torch.stack(of_units, dim=1) for of_units in zip(*curves, strict=True))
    measured |= {"kl": kl, "closure": closure(kl, hosts.kl[:, None, None, None])}
    return measured | {"cache_bytes": kept}


@dataclass(frozen=True)
class Parts:
    """What the personas of a batch are cut into.

    Attributes:
        shape: of the dimensions of its scores, layers and heads or tokens.
        exists: [cell, part].
        bytes_each: [cell], of one part.
        score: KL, [choice, cell], with the parts that are kept, [choice, cell, part].
        effects: of each part, [cell, part].
    """

    shape: tuple[int, ...]
    exists: Tensor
    bytes_each: Tensor
    score: Callable[[Tensor], Tensor]
    effects: Callable[[], Tensor]

    def named(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scores as they are stored."""
        prefix = "token_" if len(self.shape) == 1 else ""
        return {f"{prefix}{name}": of.unflatten(1, self.shape) for name, of in scores.items()}


def look_at_all(model: TransformersModel, hosts: Hosts) -> Tensor:
    """Where the clean run looks while it says what it says, [cell, layer, head, column].

    Mean over p_last and the forced tokens, those alone that come before a scored one.
    """
    sources, scored = hosts.sources, hosts.reference.scored
    prompts = [prompt["XY"].ids for prompt in sources.prompts]
    window = Prefilled(prompts, sources.caches["XY"]).followed_by(hosts.reference.forced)
    asking = torch.arange(scored.shape[1], device=scored.device).expand(len(scored), -1)
    counts, told = scored[:, None, :, None], tell(model, window)
    with model.trace(window.inputs(), logits_to_keep=1):
        each = zip(model.layers, told, strict=True)
        looks = [look_at(block.attn, asking, given)[0] for block, given in each]
        each = zip(model.layers, looks, model.output.past_key_values.layers, strict=True)
        weights = [weights_of(block.attn, look, held).float() for block, look, held in each]
        total = save(
            stack_layers([of.where(counts.to(of.device), 0.0).sum(2) for of in weights], dim=1)
        )
    return total / scored.sum(1)[:, None, None, None]


def cut_heads(model: TransformersModel, hosts: Hosts, _: int, *, reuse: bool) -> Parts:
    """The key-value heads of every layer; where the persona's are not kept, the host's are."""
    slots = open_persona_slots(hosts.sources, hosts.reference.forced)
    if reuse:
        slots = read_host(model, slots)
    (n_layers, n_heads), n_cells = hosts.shape, len(hosts.kl)
    alone = torch.eye(n_layers * n_heads, dtype=torch.bool, device=hosts.kl.device)
    length = [len(of["XY"]["persona"]) for of in hosts.sources.spans]
    bytes_of_token = hosts.sources.caches["XY"].token_bytes // n_heads

    def effects() -> Tensor:
        """What each does alone; it changes nothing below its layer."""
        of_layers = alone[:, None].expand(-1, n_cells, -1).split(n_heads)
        lowest = range(n_layers) if reuse else [0] * n_layers
        each = zip(of_layers, lowest, strict=True)
        kl = [score_heads(model, hosts, slots, of, layer) for of, layer in each]
        return (hosts.kl - torch.cat(kl)).T

    return Parts(
        shape=hosts.shape,
        exists=alone.any(0).expand(n_cells, -1),
        bytes_each=torch.tensor(length, device=alone.device) * bytes_of_token,
        score=lambda kept: score_heads(model, hosts, slots, kept),
        effects=effects,
    )


def score_heads(
    model: TransformersModel, hosts: Hosts, slots: PersonaSlots, kept: Tensor, lowest: int = 0
) -> Tensor:
    """KL with the persona in some heads of some layers, the host in the others, [choice, cell].

    Args:
        model: from `load_model`.
        hosts: of the batch.
        slots: theirs.
        kept: [choice, cell, head], the heads of all layers, those of the first one first.
        lowest: the layer to go on from, below which no head is kept.
    """
    reference, kl = hosts.reference, list[Tensor]()
    for some in share_out(list(kept), slots.window, reference.clean):
        row = torch.arange(len(hosts.kl), device=kept.device).repeat(len(some))
        mine = torch.cat(list(some)).unflatten(1, hosts.shape)
        window, hidden = slots.choose(row, mine, lowest)
        clean, scored = reference.clean[row], reference.scored[row]
        with model.trace(window.inputs(), logits_to_keep=scored.shape[1]):
            window.resume(model, lowest)
            for layer, columns in hidden.items():
                block_keys(model.layers[layer].attn, None, columns)
            moved = save(summed_kl(clean, log_probabilities(model.output.logits), scored))
        kl.append(moved.unflatten(0, (len(some), -1)))
    return torch.cat(kl)


def cut_tokens(model: TransformersModel, hosts: Hosts, n_longest: int, *, reuse: bool) -> Parts:
    """The persona's tokens, grafted at their own length; those that are not kept are hidden."""
    del reuse  # a token that is hidden is hidden from the first layer on
    grafted = open_tokens(hosts.sources, hosts.reference.forced, n_longest)
    exists, cache = grafted.exists, hosts.sources.caches["XY"]

    def score(kept: Tensor) -> Tensor:
        return score_tokens(model, hosts, grafted, kept)

    def effects() -> Tensor:
        """What is lost without each."""
        others = ~torch.eye(n_longest, dtype=torch.bool, device=exists.device)
        kept = torch.cat([torch.ones_like(others[:1]), others])[:, None] & exists
        kl = each_once(score, kept)
        return (kl[1:] - kl[0]).T

    size = cache.token_bytes * cache.n_layers
    bytes_each = torch.full((len(exists),), size, device=exists.device)
    return Parts((n_longest,), exists, bytes_each, score, effects)


def score_tokens(
    model: TransformersModel, hosts: Hosts, grafted: GraftedTokens, kept: Tensor
) -> Tensor:
    """KL with some of the persona's tokens in sight, [choice, cell, token] → [choice, cell]."""
    reference, kl = hosts.reference, list[Tensor]()
    for some in share_out(list(kept), grafted.window, reference.clean):
        row = torch.arange(len(hosts.kl), device=kept.device).repeat(len(some))
        window = grafted.show(row, torch.cat(list(some)))
        clean, scored = reference.clean[row], reference.scored[row]
        with model.trace(window.inputs(), logits_to_keep=scored.shape[1]):
            moved = save(summed_kl(clean, log_probabilities(model.output.logits), scored))
        kl.append(moved.unflatten(0, (len(some), -1)))
    return torch.cat(kl)


def finish(
    tokenizer: PreTrainedTokenizerBase,
    cells: Sequence[PersonaCell],
    measured: dict[str, Any],
    *,
    units: str,
    rankings: str,
) -> dict[str, Any]:
    """How rankings agree with the effects, and the persona's tokens as text."""
    scores = [torch.as_tensor(measured.pop(f"{unit}_scores")).cpu() for unit in units.split(",")]
    if "effect" in rankings.split(","):
        effect = rankings.split(",").index("effect")
        of_cells = [
            [of[row][:, ~of[row, effect].isnan()] for of in scores] for row in range(len(cells))
        ]
        measured["agreement"] = np.array(
            [
                [[agreement(of, ranks[effect]) for of in ranks] for ranks in cell]
                for cell in of_cells
            ]
        )
    if "token" in units.split(","):
        texts = [[str(tokenizer.decode(token)) for token in cell.tokens] for cell in cells]
        ranked = zip(texts, scores[-1], strict=True)
        empty = [""] * cells[0].n_longest
        measured["token_text"] = [[*of, *empty[len(of) :]] for of in texts]
        measured["top_tokens"] = [
            [first_texts(of, by, N_TOP) for by in some] for of, some in ranked
        ]
    return measured
