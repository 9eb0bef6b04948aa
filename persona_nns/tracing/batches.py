"""Batches of token rows, padded on the left.

Left padding puts the last prompt token of every row into the same column. A padded row needs
explicit position ids: without them its distribution moves, and nothing is raised.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Tokens that a pass runs at most, where rows are many and independent of each other.
MOST_TOKENS = 16_384


@dataclass(frozen=True)
class Batch:
    """Token rows of one width.

    Attributes:
        input_ids: [row, column].
        attention_mask: [row, column], 0 on padding.
        position_ids: [row, column], counted from each row's first token.
        padding: [row], the number of padded columns; token ``i`` of a row stands in column
            ``padding + i``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    padding: Tensor

    @property
    def width(self) -> int:
        """Columns."""
        return self.input_ids.shape[1]

    @property
    def tokens(self) -> dict[str, Tensor]:
        """What a model needs to run the batch."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


def left_pad(rows: Sequence[Sequence[int]], *, device: torch.device | str = "cpu") -> Batch:
    """Pad rows of token ids on the left to the longest of them.

    Args:
        rows: token ids; no row is empty.
        device: where the batch goes.

    Returns:
        The batch. Padded columns hold token 0, are masked, and have position 0.
    """
    width = max(len(row) for row in rows)
    padding = torch.tensor([width - len(row) for row in rows])
    column = torch.arange(width)
    position = (column - padding[:, None]).clamp(min=0)
    mask = (column >= padding[:, None]).long()
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    return Batch(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=position.to(device),
        padding=padding.to(device),
    )


def similar_rows(lengths: Sequence[int], most_tokens: int = MOST_TOKENS) -> Iterator[list[int]]:
    """Deal rows into passes of rows of similar length.

    Args:
        lengths: tokens of each row, those still to be generated included.
        most_tokens: columns times rows of a pass; a row longer than that has one of its own.

    Yields:
        Indices of the rows of each pass.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batch and lengths[index] * (len(batch) + 1) > most_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def keep_last(n_columns: int) -> list[int]:
    """What ``logits_to_keep`` is for the last columns of a pass, or for none.

    For a number, transformers cuts a slice out of the residuals, and torch multiplies each row of
    it with the whole vocabulary by itself, in three times the time. Columns that are named are
    copied next to each other. They are named in a list: a tensor would be moved to where tokens
    enter, and the last block of a model that is spread over devices is on another.
    """
    return list(range(-n_columns, 0))
