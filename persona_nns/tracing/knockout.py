"""Attention knockout: keep some queries of a prompt from the persona's keys.

The blocked logits become the most negative number of their precision, or −inf, before the softmax,
in every head, so their weights are exactly zero and the others share what they had.

Columns are those of whole left-padded rows, prompt and continuation, whatever part of them a
pass runs. `block_keys` runs inside tracing contexts: torch only.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from persona_nns.errors import PersonaError
from persona_nns.prompts.render import Prompt
from persona_nns.tracing.attention import MASKED, computed_by, read_mask
from persona_nns.tracing.window import Window

Blocked = Literal["last", "task", "task+last", "later"]

# What the rows of one pass may take: their caches, masks and distributions.
_BYTES_OF_A_PASS = 2**30

_Condition = TypeVar("_Condition")

#: Which queries are blocked: p_last and what is generated; the task; both; all after the persona.
BLOCKED: tuple[Blocked, ...] = ("last", "task", "task+last", "later")


def block_keys(attention: Any, queries: Tensor | None, keys: Tensor) -> None:
    """Inside a trace: keep queries of an attention module from keys.

    Args:
        attention: the module, which has not run yet. Its mask is replaced and not changed, since
            one mask may serve all layers.
        queries: [row, column], True where a query is blocked; columns to come may be among them.
            None blocks all.
        keys: [row, column], True where a key is blocked; those after its last column are not. Or
            [row, key-value head, column], where it is blocked for the queries of that head alone.

    Raises:
        PersonaError: the model computes attention in a way that takes no such mask.
    """
    positional, named = inputs = attention.inputs
    mask = read_mask(attention, inputs)
    if mask is None:
        raise PersonaError(
            f"The model computes attention by {computed_by(attention)!r}, which takes no mask of "
            f"queries and keys; load it with {' or '.join(MASKED)}."
        )
    n_queries, n_keys = mask.shape[-2:]
    # Columns are added to what is narrower than the mask, and cut off what is wider.
    blocked = torch.nn.functional.pad(keys, (0, n_keys - keys.shape[-1]))
    if blocked.dim() == 2:
        blocked = blocked[:, None]
    else:
        n_heads = attention.config.num_attention_heads
        blocked = blocked.repeat_interleave(n_heads // blocked.shape[1], dim=1)
    blocked = blocked[:, :, None]  # [row, 1 or head, 1, key]
    if queries is not None:
        blocked = blocked & queries[:, None, n_keys - n_queries : n_keys, None]
    nothing = False if mask.dtype is torch.bool else torch.finfo(mask.dtype).min
    mask = mask.masked_fill(blocked.to(mask.device), nothing)
    attention.inputs = positional, {**named, "attention_mask": mask}


def persona_keys(prompts: Sequence[Prompt], padding: Tensor, width: int) -> Tensor:
    """Where the tokens of the persona stand, [row, column].

    Args:
        prompts: the prompt of each row.
        padding: [row], columns before each prompt.
        width: columns of prompt and continuation.
    """
    return _columns([prompt.spans["persona"] for prompt in prompts], padding, width)


def blocked_queries(
    prompts: Sequence[Prompt], blocked: Blocked, padding: Tensor, width: int
) -> Tensor:
    """Which queries are kept from the persona, [row, column]; arguments as for `persona_keys`."""
    task = _columns([prompt.spans["task"] for prompt in prompts], padding, width)
    last = _columns([range(len(prompt) - 1, width) for prompt in prompts], padding, width)
    later = [range(prompt.spans["persona"].stop, width) for prompt in prompts]
    return {
        "last": last,
        "task": task,
        "task+last": task | last,
        "later": _columns(later, padding, width),
    }[blocked]


def share_out(
    conditions: Sequence[_Condition], window: Window, distributions: Tensor
) -> Iterator[Sequence[_Condition]]:
    """Cut conditions into parts that can be the rows of one pass.

    Args:
        conditions: each of them is run on every row of the window.
        window: what a pass runs.
        distributions: what a pass gives, [row, token, vocabulary].
    """
    caches = (*window.prefix.keys, *window.prefix.values) if window.prefix is not None else ()
    residual = () if window.clean is None else (window.clean,)
    # The logits, their logarithms of probabilities, and the two references, a row each.
    taken = sum(t.nbytes for t in (*caches, *residual)) + 4 * distributions.nbytes
    at_a_time = max(1, _BYTES_OF_A_PASS // taken)
    for start in range(0, len(conditions), at_a_time):
        yield conditions[start : start + at_a_time]


def _columns(tokens: Sequence[range], padding: Tensor, width: int) -> Tensor:
    """Ranges of tokens, counted from the start of each prompt, as columns."""
    place = torch.arange(width, device=padding.device) - padding[:, None]
    start = torch.tensor([span.start for span in tokens], device=padding.device)
    stop = torch.tensor([span.stop for span in tokens], device=padding.device)
    return (place >= start[:, None]) & (place < stop[:, None])
