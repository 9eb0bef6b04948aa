"""Swapping residuals between training examples at the last prompt token.

A transformer this small would gather persona and task at the last prompt token in its first
block. Larger models let later blocks read them again, which is why an additive substitution in an
early layer is harmless there. Training under swaps at an early layer asks for the same: whatever
reaches that layer at that token belongs to another example and cannot be relied upon.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Module


@contextmanager
def swap_last_residuals(block: Module, last: Tensor) -> Iterator[None]:
    """Permute the residuals entering ``block`` at the last prompt tokens over the batch.

    Args:
        block: a decoder block.
        last: index of each row's last prompt token, [batch].
    """
    rows = torch.arange(len(last))
    source = torch.randperm(len(last))

    def edit(
        _: Module, args: tuple[Tensor, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[Tensor, ...], dict[str, object]]:
        hidden = args[0].clone()
        hidden[rows, last] = args[0][source, last[source]]
        return (hidden, *args[1:]), kwargs

    handle = block.register_forward_pre_hook(edit, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
