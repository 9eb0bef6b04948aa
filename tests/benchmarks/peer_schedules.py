"""What a user would write instead: the causal KL of additive substitution in other libraries.

Written as they would be by hand, all cells in one batch, after the protocol (experiments/
localized_positions.py says what it is) and without this project's passes. Each function gives
[cell, layer, position]; prompts and the places of positions are rendered beforehand.

The first three run whole sequences. `reused_by_hand` keeps the key-value caches of the prompts and
of the clean run, and runs only the ten columns that an intervention can change, through all layers.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

N_EVAL = 10


@dataclass(frozen=True)
class Work:
    """Prompts of each cell by name, where p_last stands, and the sites."""

    prompts: dict[str, list[list[int]]]
    layers: list[int]
    generated: list[int]  # of each position, tokens of the continuation before it and at it

    @property
    def n_said(self) -> int:
        """Tokens of the continuation that are needed."""
        return max(self.generated) + N_EVAL


def left_padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Rows of tokens, with the padding in front."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


def followed(rows: Sequence[Sequence[int]], said: Tensor) -> dict[str, Tensor]:
    """Prompts with the first tokens of what is said behind them."""
    return left_padded([[*row, *ids] for row, ids in zip(rows, said.tolist(), strict=True)])


def divergence(clean: Tensor, logits: Tensor) -> Tensor:
    """KL in nats summed over tokens, [cell]."""
    moved = torch.log_softmax(logits, -1)
    return (clean.exp() * (clean - moved)).sum((-1, -2))


@contextmanager
def written(block: Any, column: int, value: Tensor) -> Any:
    """A block whose input is another in one column."""

    def hook(_module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        changed = arguments[0].clone()
        changed[:, column] = value
        return (changed, *arguments[1:])

    handle = block.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def say(model: Any, rows: Sequence[Sequence[int]], n_tokens: int, **kept: Any) -> Any:
    """Greedy continuation."""
    batch = left_padded(rows)
    del batch["position_ids"]  # generate counts them itself
    return model.generate(
        **batch,
        max_new_tokens=n_tokens,
        min_new_tokens=n_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
        **kept,
    )


@torch.no_grad()
def batched(model: Any, work: Work) -> Tensor:
    """Plain transformers and hooks; each pass over whole sequences, all cells at a time."""
    xy = work.prompts["XY"]
    said = say(model, xy, work.n_said)[:, -work.n_said :]
    forced = max(work.generated)
    values = additive_values(model, work, said[:, :forced])
    clean = torch.log_softmax(model(**followed(xy, said), logits_to_keep=work.n_said + 1).logits, 2)
    kl = torch.zeros(len(xy), len(work.layers), len(work.generated))
    for p, first in enumerate(work.generated):
        whole = followed(xy, said[:, : first + N_EVAL])
        site, window = -N_EVAL - 1, slice(first, first + N_EVAL)
        for k, layer in enumerate(work.layers):
            with written(model.model.layers[layer], site, values[layer, p]):
                logits = model(**whole, logits_to_keep=N_EVAL + 1).logits[:, :-1]
            kl[:, k, p] = divergence(clean[:, window], logits)
    return kl


def additive_values(model: Any, work: Work, forced: Tensor) -> Tensor:
    """h_BB + ΔX + ΔY at every layer and position, [layer, position, cell, d_model]."""
    hidden = {}
    for name in ("BB", "XB", "BY"):
        rows = work.prompts[name]
        out = model(**followed(rows, forced), output_hidden_states=True, logits_to_keep=1)
        hidden[name] = of_positions(torch.stack(out.hidden_states), work)
    bb, xb, by = hidden["BB"], hidden["XB"], hidden["BY"]
    return bb + (xb - bb) + (by - bb)


def of_positions(states: Tensor, work: Work) -> Tensor:
    """[layer, cell, column, d_model] at the positions: [layer, position, cell, d_model]."""
    n_forced = max(work.generated)
    columns = [first - n_forced - 1 for first in work.generated]
    return states[:, :, columns].transpose(1, 2)


@torch.no_grad()
def reused_by_hand(model: Any, work: Work) -> Tensor:
    """The same, with the caches of prompts and of the clean run kept.

    Each distinct prompt is run once, all in one batch, but for its last token; what is said goes on
    from there, the other prompts are read behind theirs, and each intervention runs ten tokens
    behind the clean run's cache.
    """
    names = ("BB", "XB", "BY", "XY")
    rows = [tuple(row) for name in names for row in work.prompts[name]]
    distinct = list(dict.fromkeys(rows))
    batch = left_padded([row[:-1] for row in distinct])
    kept = model(**batch, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)
    cache = kept.past_key_values
    n_cells, n_prefix = len(work.prompts["XY"]), batch["input_ids"].shape[1]

    def behind(some: Sequence[tuple[int, ...]], more: Tensor) -> dict[str, Any]:
        """Rows of the cache, cut to it, and the tokens that follow."""
        which = torch.tensor([distinct.index(row) for row in some])
        mask = torch.cat([batch["attention_mask"][which], torch.ones_like(more)], 1)
        held = [(layer.keys[which], layer.values[which]) for layer in cache.layers]
        return {
            "input_ids": more,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1)[:, -more.shape[1] :],
            "past_key_values": DynamicCache(held),
        }

    xy = rows[-n_cells:]
    run = behind(xy, torch.tensor([row[-1:] for row in xy]))
    said, logits = [], []
    while len(said) < work.n_said:
        logits.append(model(**run).logits[:, -1])
        said.append(logits[-1].argmax(-1))
        mask = torch.cat([run["attention_mask"], torch.ones(n_cells, 1, dtype=torch.long)], 1)
        run |= {
            "input_ids": said[-1][:, None],
            "attention_mask": mask,
            "position_ids": mask.sum(1, keepdim=True) - 1,
        }
    clean_cache, mask = run["past_key_values"], run["attention_mask"]
    clean = torch.log_softmax(torch.stack(logits, 1), -1)
    tokens = torch.cat([torch.tensor([row[-1:] for row in xy]), torch.stack(said, 1)], 1)

    others = rows[:-n_cells]
    forced = tokens[:, 1 : max(work.generated) + 1].repeat(3, 1)
    more = torch.cat([torch.tensor([row[-1:] for row in others]), forced], 1)
    out = model(**behind(others, more), output_hidden_states=True, logits_to_keep=1)
    states = of_positions(torch.stack(out.hidden_states), work)
    bb, xb, by = states.chunk(3, dim=2)
    values = bb + (xb - bb) + (by - bb)

    kl = torch.zeros(n_cells, len(work.layers), len(work.generated))
    for p, first in enumerate(work.generated):
        start = n_prefix + first
        window = {
            "input_ids": tokens[:, first : first + N_EVAL],
            "attention_mask": mask[:, : start + N_EVAL],
            "position_ids": (mask.cumsum(1) - 1)[:, start : start + N_EVAL],
        }
        for k, layer in enumerate(work.layers):
            held = [(c.keys[:, :, :start], c.values[:, :, :start]) for c in clean_cache.layers]
            with written(model.model.layers[layer], 0, values[layer, p]):
                moved = model(**window, past_key_values=DynamicCache(held)).logits
            kl[:, k, p] = divergence(clean[:, first : first + N_EVAL], moved)
    return kl


def in_nnsight(model: Any, work: Work) -> Tensor:
    """Plain nnsight: one trace for each layer and position, whole sequences, all cells at a time.

    Args:
        model: an `nnsight.TransformersModel`.
        work: what is asked.
    """
    from nnsight import save

    xy, blocks = work.prompts["XY"], model.model.layers
    batch = left_padded(xy)
    del batch["position_ids"]
    how = {"do_sample": False, "num_beams": 1, "pad_token_id": 0}
    with torch.no_grad():
        with model.generate(
            batch, max_new_tokens=work.n_said, min_new_tokens=work.n_said, **how
        ) as tracer:
            said = save(tracer.result)
        said = said[:, -work.n_said :]
        hidden = {}
        for name in ("BB", "XB", "BY"):
            tokens = followed(work.prompts[name], said[:, : max(work.generated)])
            with model.trace(tokens):
                read = save([block.input for block in blocks])
            hidden[name] = of_positions(torch.stack(read), work)
        bb, xb, by = hidden["BB"], hidden["XB"], hidden["BY"]
        values = bb + (xb - bb) + (by - bb)
        with model.trace(followed(xy, said), logits_to_keep=work.n_said + 1):
            logits = save(model.output.logits)
        clean = torch.log_softmax(logits, -1)
        kl = torch.zeros(len(xy), len(work.layers), len(work.generated))
        for p, first in enumerate(work.generated):
            whole = followed(xy, said[:, : first + N_EVAL])
            for k, layer in enumerate(work.layers):
                with model.trace(whole, logits_to_keep=N_EVAL + 1):
                    blocks[layer].input[:, -N_EVAL - 1] = values[layer, p]
                    logits = save(model.output.logits)
                expected = clean[:, first : first + N_EVAL]
                kl[:, k, p] = divergence(expected, logits[:, :-1])
    return kl


@torch.no_grad()
def in_transformer_lens(bridge: Any, work: Work) -> Tensor:
    """TransformerLens 4: hooks at ``blocks.L.hook_resid_pre``, whole sequences, all cells at once.

    Args:
        bridge: a `transformer_lens` TransformerBridge.
        work: what is asked.
    """
    xy = work.prompts["XY"]

    def run(tokens: dict[str, Tensor], hooks: list[Any]) -> Tensor:
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        return bridge.run_with_hooks(
            ids,
            attention_mask=mask,
            position_ids=tokens["position_ids"],
            fwd_hooks=hooks,
            return_type="logits",
        )

    said = say(bridge.original_model, xy, work.n_said)[:, -work.n_said :]
    names = [f"blocks.{layer}.hook_resid_pre" for layer in work.layers]
    hidden = {}
    for name in ("BB", "XB", "BY"):
        states: list[Tensor] = []

        def read(value: Tensor, hook: Any, states: list[Tensor] = states) -> None:  # noqa: ARG001
            states.append(value)

        tokens = followed(work.prompts[name], said[:, : max(work.generated)])
        run(tokens, [(site, read) for site in names])
        hidden[name] = of_positions(torch.stack(states), work)
    bb, xb, by = hidden["BB"], hidden["XB"], hidden["BY"]
    values = bb + (xb - bb) + (by - bb)
    clean = torch.log_softmax(run(followed(xy, said), [])[:, -work.n_said - 1 :], -1)
    kl = torch.zeros(len(xy), len(work.layers), len(work.generated))
    for p, first in enumerate(work.generated):
        whole = followed(xy, said[:, : first + N_EVAL])
        for k, site in enumerate(names):

            def put(value: Tensor, hook: Any, k: int = k, p: int = p) -> Tensor:  # noqa: ARG001
                value = value.clone()
                value[:, -N_EVAL - 1] = values[k, p]
                return value

            logits = run(whole, [(site, put)])[:, -N_EVAL - 1 : -1]
            kl[:, k, p] = divergence(clean[:, first : first + N_EVAL], logits)
    return kl
