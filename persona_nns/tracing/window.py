"""Prefix reuse and layer resume: compute only what an intervention can change.

An intervention at (layer, position) leaves everything before the position and below the layer as
it was. So the tokens before the first site, the *prefix*, are run once for each distinct prompt
and kept as a key-value cache; every later pass runs the *window* of columns that follows, and one
that intervenes at layer L takes the clean run's residual as the input of block L instead of
running the blocks below.

``reuse=False`` gives the plain protocol through the same code: no prefix, no resumed layer, every
pass over whole rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from nnsight import TransformersModel
from torch import Tensor
from transformers import Cache, DynamicCache

from persona_nns.tracing.batches import Batch, left_pad
from persona_nns.tracing.kv.cache import KVCache, stack


@dataclass(frozen=True)
class Window:
    """The columns that a pass runs, on top of a prefix.

    Attributes:
        input_ids: [row, column].
        attention_mask: [row, prefix column + column].
        position_ids: [row, column].
        start: columns before the window; 0 where nothing is reused.
        padding: [row], token ``i`` of a row stands in column ``padding + i - start``.
        prefix: the cache of the columns before, None where there are none.
        clean: the clean run's residuals, [layer, row, column, d_model], where a pass may take
            them up instead of running the blocks below; None where it may not.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    start: int
    padding: Tensor
    prefix: KVCache | None = None
    clean: Tensor | None = None

    def inputs(self, *, cached: bool = False) -> dict[str, Any]:
        """What a trace needs to run the window; a new cache each time.

        Args:
            cached: give it a cache even where there is no prefix, to read what the pass leaves.
        """
        cache = self.prefix.cache() if self.prefix is not None else None
        if cached and cache is None:
            cache = DynamicCache()
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "past_key_values": cache,
            "use_cache": cache is not None,
        }

    def column(self, index: Tensor) -> Tensor:
        """Columns of the window in which tokens stand, [row, …], by their place in the row."""
        return index + self.padding.view(-1, *[1] * (index.dim() - 1)) - self.start

    def rows(self, index: Tensor, layer: int, width: int) -> "Window":
        """Some of the rows, or some of them several times, for a pass that resumes at a layer.

        Args:
            index: [row], rows of this window.
            layer: where the pass resumes.
            width: the columns of these rows that are not all padding on the right.
        """
        clean = None if self.clean is None else self.clean[layer, index, :width]
        return Window(
            input_ids=self.input_ids[index, :width],
            attention_mask=self.attention_mask[index, : self.start + width],
            position_ids=self.position_ids[index, :width],
            start=self.start,
            padding=self.padding[index],
            prefix=None if self.prefix is None else self.prefix.rows(index),
            # A view that repeats the one layer that is read, so that the others are not copied.
            clean=None if clean is None else clean.expand(layer + 1, -1, -1, -1),
        )

    def times(self, n_rows: int) -> "Window":
        """Its one row so many times, for a pass that resumes at any layer; views."""
        return replace(
            self,
            input_ids=self.input_ids.expand(n_rows, -1),
            attention_mask=self.attention_mask.expand(n_rows, -1),
            position_ids=self.position_ids.expand(n_rows, -1),
            padding=self.padding.expand(n_rows),
            prefix=None if self.prefix is None else self.prefix.times(n_rows),
            clean=None if self.clean is None else self.clean.expand(-1, n_rows, -1, -1),
        )

    def until(self, stop: int) -> "Window":
        """Its first columns; a view."""
        return replace(
            self,
            input_ids=self.input_ids[:, :stop],
            attention_mask=self.attention_mask[:, : self.start + stop],
            position_ids=self.position_ids[:, :stop],
            clean=None if self.clean is None else self.clean[:, :, :stop],
        )

    def behind(self, cache: KVCache) -> "Window":
        """The columns that a cache does not hold, on top of it in place of the prefix.

        Args:
            cache: of each row, the prefix and the first columns of the window, if any.
        """
        first = cache.width - self.start
        return replace(
            self,
            input_ids=self.input_ids[:, first:],
            position_ids=self.position_ids[:, first:],
            start=cache.width,
            prefix=cache if cache.width else None,
            clean=None if self.clean is None else self.clean[:, :, first:],
        )

    def read_cache(self, cache: Cache) -> KVCache:
        """What a pass over the window has left in the cache that it was given.

        Blocks that it has not run hold the prefix alone; a pass that resumes at the same layer
        does not read them, and finds zeros.
        """
        layers: Any = cache.layers
        width = self.attention_mask.shape[1]

        def whole(held: Tensor) -> Tensor:
            return torch.nn.functional.pad(held, (0, 0, 0, width - held.shape[2]))

        return KVCache(
            tuple(whole(layer.keys) for layer in layers),
            tuple(whole(layer.values) for layer in layers),
            self.attention_mask,
            (self.attention_mask.cumsum(1) - 1).clamp(min=0),
        )

    def resume(self, model: TransformersModel, layer: int) -> None:
        """Inside a trace: go on from the clean run's residual at the input of block ``layer``.

        The blocks below are not run. Without a clean run to go on from, they are.
        """
        if self.clean is not None:
            for block in model.layers[:layer]:
                block.skip(self.clean[layer])


def open_window(
    prompts: Sequence[Sequence[int]], continuation: Tensor, prefix: KVCache | None
) -> Window:
    """The window of prompts and what is said to follow them, behind a prefix.

    Args:
        prompts: token ids of each row's prompt, the prefix included. What the prefixes leave of
            them is equally long in every row.
        continuation: [row, token], the tokens that follow.
        prefix: caches of the prompts' first tokens, or None: the window is the whole rows.
    """
    follow = continuation.tolist()
    rows = [[*prompt, *said] for prompt, said in zip(prompts, follow, strict=True)]
    return open_batch(left_pad(rows, device=continuation.device), prefix)


def open_batch(batch: Batch, prefix: KVCache | None) -> Window:
    """The columns of a batch that a prefix does not hold, behind it."""
    start = 0 if prefix is None else prefix.width
    return Window(
        input_ids=batch.input_ids[:, start:],
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids[:, start:],
        start=start,
        padding=batch.padding,
        prefix=prefix,
    )


def stack_windows(windows: Sequence[Window]) -> Iterator[tuple[list[int], Window]]:
    """Windows of equal width as the rows of one.

    Args:
        windows: of the same prompts; all with a prefix, or none.

    Yields:
        Which of the windows are stacked, and the window of their rows, one window's after
        another's.
    """
    widths = [window.input_ids.shape[1] for window in windows]
    for width in dict.fromkeys(widths):
        which = [place for place, each in enumerate(widths) if each == width]
        yield which, _stack([windows[place] for place in which])


def _stack(windows: Sequence[Window]) -> Window:
    start = max(window.start for window in windows)
    prefixes = [window.prefix for window in windows if window.prefix is not None]
    cleans = [window.clean for window in windows if window.clean is not None]
    return Window(
        input_ids=torch.cat([window.input_ids for window in windows]),
        attention_mask=torch.cat(
            [
                torch.nn.functional.pad(window.attention_mask, (start - window.start, 0))
                for window in windows
            ]
        ),
        position_ids=torch.cat([window.position_ids for window in windows]),
        start=start,
        padding=torch.cat([window.padding + start - window.start for window in windows]),
        prefix=stack(prefixes) if prefixes else None,
        clean=torch.cat(cleans, dim=1) if cleans else None,
    )


def open_ragged_window(
    rows: Sequence[Sequence[int]], prefix: KVCache | None, *, device: torch.device
) -> Window:
    """The window of rows that share their first tokens and then differ in length.

    It is padded on the right, where nothing attends to the padding, so that the columns of a row
    stay as far apart as its tokens (a sliding window counts columns) and token ``i`` of every row
    stands in column ``i - start``. The last token of a row is not in the last column.

    Args:
        rows: token ids, the prefix included.
        prefix: caches of the first tokens, equally many of every row; or None.
        device: where the batch goes.
    """
    start = 0 if prefix is None else prefix.width
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    column = torch.arange(width, device=device)
    length = torch.tensor([len(row) for row in rows], device=device)
    return Window(
        input_ids=ids[:, start:],
        attention_mask=(column < length[:, None]).long(),
        position_ids=column[start:].expand(len(rows), -1),
        start=start,
        padding=torch.zeros_like(length),
        prefix=prefix,
    )
