"""Plain transformers with forward pre-hooks: one prompt, unpadded, without a cache.

Shares nothing with the library, for tests that recompute what it measures.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

# (layer, token) → what its residual is replaced by, [d_model]
Writes = Mapping[tuple[int, int], Tensor]


def blocks_of(plain: Any) -> Any:
    if hasattr(plain, "gpt_neox"):
        return plain.gpt_neox.layers
    return plain.transformer.h if hasattr(plain, "transformer") else plain.model.layers


def logits_with(plain: Any, ids: list[int], writes: Writes) -> Tensor:
    """Logits [token, vocabulary] with residuals replaced at the inputs of blocks."""
    handles = []

    def overwrite_in(layer: int) -> Any:
        def overwrite(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = (args[0] if args else kwargs["hidden_states"]).clone()
            for (at_layer, token), value in writes.items():
                if at_layer == layer and token < hidden.shape[1]:
                    hidden[0, token] = value
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        return overwrite

    for layer in {layer for layer, _ in writes}:
        block = blocks_of(plain)[layer]
        handles.append(block.register_forward_pre_hook(overwrite_in(layer), with_kwargs=True))
    try:
        return plain(torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def residuals(plain: Any, ids: list[int]) -> Tensor:
    """Residual streams [layer, token, d_model], the last layer after the final norm."""
    output = plain(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    return torch.stack(output.hidden_states)[:, 0]


def greedy(
    plain: PreTrainedModel, ids: list[int], count: int, end: int, writes: Writes | None = None
) -> list[int]:
    """Greedy tokens up to an end token; residuals are replaced as soon as a token is there."""
    said: list[int] = []
    while len(said) < count and end not in said:
        said.append(int(logits_with(plain, [*ids, *said], writes or {})[-1].argmax()))
    return said


def prompt_ids(tokenizer: Any, persona: str | None, task: str) -> list[int]:
    content = task if persona is None else f"As {persona}, {task}"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def summed_kl(clean: Tensor, moved: Tensor) -> float:
    """Σ KL(clean ‖ moved) over rows of logits [token, vocabulary], in nats."""
    p, q = clean.double().log_softmax(-1), moved.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum())
