"""Changing the residual that enters a block at one token: overwritten, or swapped.

A transformer this small would gather persona and task at the last prompt token in its first
block. Larger models let later blocks read them again, which is why an additive substitution in an
early layer is harmless there. Training under swaps at an early layer asks for the same: whatever
reaches that layer at that token belongs to another example and cannot be relied upon.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from torch.nn import Module


@contextmanager
def _edit_input(block: Module, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a block run on what ``edit`` makes of its input, [batch, seq, d_model]."""
    handle = block.register_forward_pre_hook(lambda _, args: (edit(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def swap_last_residuals(block: Module, last: Tensor) -> AbstractContextManager[None]:
    """Permute the residuals entering ``block`` at the last prompt tokens over the batch.

    Args:
        block: a decoder block.
        last: index of each row's last prompt token, [batch].
    """
    rows, source = torch.arange(len(last)), torch.randperm(len(last))

    def edit(hidden: Tensor) -> Tensor:
        swapped = hidden.clone()
        swapped[rows, last] = hidden[source, last[source]]
        return swapped

    return _edit_input(block, edit)


def overwrite(
    block: Module, position: int, value: Tensor, row: int | None = None
) -> AbstractContextManager[None]:
    """Replace the residual entering a block at one position; ``value`` is [d_model].

    Passes that do not reach ``position`` (later decoding steps) are left alone.

    Args:
        block: the decoder block whose input changes.
        position: index in the sequence.
        value: the new residual.
        row: the batch row to change; every row where it is None.
    """

    def edit(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        if hidden.shape[1] > position:
            hidden[slice(None) if row is None else row, position] = value
        return hidden

    return _edit_input(block, edit)
