"""Grafts in plain transformers: one cell at a time, no padding, caches edited in loops.

Shares nothing with the library but the rendered prompts. It rotates keys by formula from the
configuration, and gives every attention module a mask of its own, computed from the positions of
queries and keys.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from persona_nns.prompts.grids import Cell
from persona_nns.prompts.render import Prompt, render_cell


def blocks_of(plain: Any) -> list[Any]:
    """The attention modules."""
    if hasattr(plain, "gpt_neox"):
        return [block.attention for block in plain.gpt_neox.layers]
    if hasattr(plain, "transformer"):
        return [block.attn for block in plain.transformer.h]
    return [block.self_attn for block in plain.model.layers]


def window_of(plain: Any, layer: int) -> float:
    """How many positions back a layer sees."""
    types = getattr(plain.config, "layer_types", None)
    if types is not None and types[layer] != "sliding_attention":
        return math.inf
    return getattr(plain.config, "sliding_window", None) or math.inf


def rotated(plain: Any, key: Tensor, distance: int, layer: int) -> Tensor:
    """A key [kv_head, d_head] moved by a distance, pair by pair, by the formula of RoPE."""
    if distance == 0:
        return key
    rope = plain.config.rope_parameters
    rope = rope if "rope_theta" in rope else rope[plain.config.layer_types[layer]]
    n_rotary = int(key.shape[-1] * rope.get("partial_rotary_factor", 1.0))
    half = n_rotary // 2
    angle = torch.tensor(
        [distance * rope["rope_theta"] ** (-2 * i / n_rotary) for i in range(half)]
    )
    moved = key.clone()
    moved[:, :half] = key[:, :half] * angle.cos() - key[:, half:n_rotary] * angle.sin()
    moved[:, half:n_rotary] = key[:, half:n_rotary] * angle.cos() + key[:, :half] * angle.sin()
    return moved


def filled(plain: Any, ids: Sequence[int]) -> Any:
    cache = DynamicCache()
    plain(torch.tensor([list(ids)]), past_key_values=cache)
    return cache.layers


# A place in a head's cache: the prompt and token it is taken from, or None where nothing is seen.
Place = tuple[str, int] | None
# What stands in the cache, [layer][place], or [layer][key-value head][place].
Layout = Sequence[Sequence[Place]] | Sequence[Sequence[Sequence[Place]]]


def by_head(plain: Any, layout: Layout) -> list[list[list[Place]]]:
    """The same in every key-value head, where it is not said for each."""
    config = plain.config
    n_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return [
        of if of and isinstance(of[0], list) else [of] * n_heads  # type: ignore[misc]
        for of in layout
    ]


def run_on(plain: Any, layout: Layout, caches: Any, forced: list[int]) -> Tensor:
    """Log-probabilities [token, vocabulary] of forced tokens on the cache that is laid out."""
    pairs, heads = [], by_head(plain, layout)
    for layer, of_heads in enumerate(heads):
        template = caches["XY"][layer].keys[0]
        keys, values = torch.zeros(2, template.shape[0], len(of_heads[0]), template.shape[2])
        for head, places in enumerate(of_heads):
            for position, place in enumerate(places):
                if place is not None:
                    held = caches[place[0]][layer]
                    key = held.keys[0, head : head + 1, place[1]]
                    keys[head, position] = rotated(plain, key, position - place[1], layer)[0]
                    values[head, position] = held.values[0, head, place[1]]
        pairs.append((keys[None], values[None]))

    n_cached = len(heads[0][0])
    position = torch.arange(n_cached, n_cached + len(forced))

    def masked(layer: int) -> Any:
        key = torch.arange(n_cached + len(forced))
        distance = position[:, None] - key
        seen = (distance >= 0) & (distance < window_of(plain, layer))
        seen = seen.repeat(plain.config.num_attention_heads, 1, 1)
        shared = len(seen) // len(heads[layer])
        for head, places in enumerate(heads[layer]):
            for spare, place in enumerate(places):
                if place is None:
                    seen[head * shared : (head + 1) * shared, :, spare] = False
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None]

        def replace(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            assert "attention_mask" in kwargs
            return args, {**kwargs, "attention_mask": mask}

        return replace

    handles = [
        attention.register_forward_pre_hook(masked(layer), with_kwargs=True)
        for layer, attention in enumerate(blocks_of(plain))
    ]
    try:
        logits = plain(
            torch.tensor([forced]),
            past_key_values=DynamicCache(pairs),
            position_ids=position[None],
        ).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return torch.log_softmax(logits.float(), dim=-1)


def cut(prompt: Prompt) -> dict[str, list[int]]:
    """Tokens of each span before p_last."""
    last = len(prompt) - 1
    return {name: [k for k in span if k < last] for name, span in prompt.spans.items()}


class Oracle:
    """One cell of one model."""

    def __init__(self, plain: PreTrainedModel, tokenizer: Any, cell: Cell) -> None:
        self.plain = plain
        self.prompts = render_cell(tokenizer, cell)
        self.caches = {
            name: filled(plain, prompt.ids[:-1]) for name, prompt in self.prompts.items()
        }
        self.spans = {name: cut(prompt) for name, prompt in self.prompts.items()}
        ids = list(self.prompts["XY"].ids)
        for _ in range(10):
            logits = plain(torch.tensor([ids]), use_cache=False).logits[0, -1]  # type: ignore[operator]
            ids.append(int(logits.argmax()))
        self.said = ids[-10:]
        self.clean = self.uncached("XY")

    def uncached(self, name: str) -> Tensor:
        """A prompt's own distributions over the reference tokens, without any cache."""
        ids = [*self.prompts[name].ids, *self.said[:-1]]  # type: ignore[index]
        logits = self.plain(torch.tensor([ids]), use_cache=False).logits[0, -10:]  # type: ignore[operator]
        return torch.log_softmax(logits.float(), dim=-1)

    def kl(self, distribution: Tensor) -> float:
        ended = [k for k, token in enumerate(self.said) if token == 2]
        stop = ended[0] + 1 if ended else 10
        return float((self.clean.exp() * (self.clean - distribution)).sum(-1)[:stop].sum())

    def graft(self, grafted: str, cached: str = "XY") -> float:
        places: list[Place] = []
        for span in ("prefix", "persona", "task", "tail"):
            mine = span != "prefix" and (grafted == "all" or span in grafted.split("+"))
            name = cached if mine else "BY"
            places += [(name, token) for token in self.spans[name][span]]
        return self.kl_of([places] * len(self.caches["XY"]))

    def band(self, band: range) -> float:
        slot = max(len(self.spans[name]["persona"]) for name in ("XY", "BY"))
        layout = []
        for layer in range(len(self.caches["XY"])):
            name = "XY" if layer in band else "BY"
            persona: list[Place] = [(name, token) for token in self.spans[name]["persona"]]
            spare: list[Place] = [None] * (slot - len(persona))
            before: list[Place] = [("BY", token) for token in self.spans["BY"]["prefix"]]
            after: list[Place] = [
                ("BY", token) for span in ("task", "tail") for token in self.spans["BY"][span]
            ]
            layout.append([*spare, *before, *persona, *after])
        return self.kl_of(layout)

    def additive(self) -> float:
        """Keys and values of the host plus what the persona changes, from the end of each span."""
        host = [self.prompts["BY"].ids[k] for k in range(len(self.prompts["BY"]) - 1)]
        layers = []
        for layer, own in enumerate(self.caches["BY"]):
            keys, values = own.keys.clone(), own.values.clone()
            for span in ("task", "tail"):
                aligned = min(len(self.spans[name][span]) for name in ("BB", "XB", "BY"))
                for back in range(1, aligned + 1):
                    at = self.spans["BY"][span][-back]
                    for name, sign in (("XB", 1.0), ("BB", -1.0)):
                        token = self.spans[name][span][-back]
                        held = self.caches[name][layer]
                        key = rotated(self.plain, held.keys[0, :, token], at - token, layer)
                        keys[0, :, at] += sign * key
                        values[0, :, at] += sign * held.values[0, :, token]
            layers.append(type("Layer", (), {"keys": keys, "values": values}))
        places: list[Place] = [("sum", k) for k in range(len(host))]
        caches = {**self.caches, "sum": layers}
        forced = [self.prompts["BY"].ids[-1], *self.said[:-1]]
        return self.kl(run_on(self.plain, [places] * len(layers), caches, forced))

    def kl_of(self, layout: Layout) -> float:
        forced = [self.prompts["BY"].ids[-1], *self.said[:-1]]
        return self.kl(run_on(self.plain, layout, self.caches, forced))
