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
from nnsight import TransformersModel, save
from torch import Tensor
from transformers import Cache, DynamicCache

from persona_nns.tracing.batches import left_pad
from persona_nns.tracing.kv.cache import KVCache, read_cache, stack
from persona_nns.tracing.prefixes import head_lengths

# Rows are prefilled together while padding is less than this share of their columns.
_MOST_PADDING = 0.15


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

    def behind(self, cache: KVCache) -> "Window":
        """The columns that a cache does not hold, on top of it in place of the prefix.

        Args:
            cache: of each row, the prefix and the first columns of the window.
        """
        first = cache.width - self.start
        return replace(
            self,
            input_ids=self.input_ids[:, first:],
            position_ids=self.position_ids[:, first:],
            start=cache.width,
            prefix=cache,
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


def prefill(
    model: TransformersModel, rows: Sequence[Sequence[int]], *, reuse: bool = True
) -> KVCache | None:
    """Run rows of tokens once and keep their caches, if there is anything to keep.

    Args:
        model: from `load_model`.
        rows: token ids of the prefixes, one row for each row of the result.
        reuse: False keeps nothing and runs nothing.

    Returns:
        The caches, as `fill_cache` gives them; None where there is nothing to keep.
    """
    return fill_cache(model, rows) if reuse and all(rows) else None


def fill_cache(model: TransformersModel, rows: Sequence[Sequence[int]]) -> KVCache:
    """Run rows of tokens and keep their caches.

    Equal rows are run once, and so is a head that several rows begin with.

    Args:
        model: from `load_model`.
        rows: token ids, one row for each row of the result; none is empty.

    Returns:
        The caches, padded on the left to the longest row.
    """
    distinct = list(dict.fromkeys(map(tuple, rows)))
    n_head = head_lengths(distinct)
    head = [row[:n] for row, n in zip(distinct, n_head, strict=True)]
    shared = sorted({ids for ids in head if ids}, key=len)
    heads = _run_rows(model, shared, None, [0] * len(shared), [0] * len(shared)) if shared else None
    order = sorted(range(len(distinct)), key=lambda row: len(distinct[row]) - n_head[row])
    prefix = _run_rows(
        model,
        [distinct[row] for row in order],
        heads,
        [shared.index(head[row]) if head[row] else 0 for row in order],
        [n_head[row] for row in order],
    )
    place = {distinct[row]: k for k, row in enumerate(order)}
    return prefix.rows(torch.tensor([place[tuple(row)] for row in rows], device=model.device))


def _run_rows(
    model: TransformersModel,
    rows: Sequence[Sequence[int]],
    heads: KVCache | None,
    head: Sequence[int],
    n_head: Sequence[int],
) -> KVCache:
    """Run rows behind heads that have been run, as few padded tokens as can be.

    Args:
        model: from `load_model`.
        rows: token ids, heads included, sorted by what follows the heads.
        heads: the caches of the heads, if there are any.
        head: of each row, which of the heads it begins with.
        n_head: of each row, how many tokens its head has.
    """
    parts: list[KVCache] = []
    for part in _similar([len(ids) - n for ids, n in zip(rows, n_head, strict=True)]):
        batch = left_pad([rows[row] for row in part], device=model.device)
        # Tokens stand side by side behind their head: a window over columns stays one over
        # tokens. Where a head is longer than the columns before, its last tokens are run again.
        before = batch.width - max(len(rows[row]) - n_head[row] for row in part)
        cache = DynamicCache()
        if heads is not None and before > 0:
            which = torch.tensor([head[row] for row in part], device=model.device)
            cache = heads.begin(which, before - batch.padding).cache()
        else:
            before = 0
        inputs = {
            "input_ids": batch.input_ids[:, before:],
            "attention_mask": batch.attention_mask,
            "position_ids": batch.position_ids[:, before:],
            "past_key_values": cache,
            "use_cache": True,
        }
        with model.trace(inputs, logits_to_keep=1):
            cache = save(model.output.past_key_values)
        parts.append(read_cache(cache, batch.attention_mask))
    return stack(parts)


def _similar(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Cut rows whose lengths ascend into parts that need little padding."""
    part: list[int] = []
    for row, length in enumerate(lengths):
        width = length * (len(part) + 1)
        if part and width - sum(lengths[k] for k in part) - length > _MOST_PADDING * width:
            yield part
            part = []
        part.append(row)
    yield part


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
    batch = left_pad(rows, device=continuation.device)
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


@dataclass(frozen=True)
class CleanRun:
    """The greedy run on clean prompts: what interventions are made in and compared with.

    Attributes:
        window: prompts and continuation, from the end of the prefix on.
        n_prompt: columns of the window that belong to the prompts.
        logits: [row, token, vocabulary], the distribution of each generated token.
        residual: [layer, row, column of the window, d_model], with layer n_layers after the
            final norm.
        cache: keys and values of prefix and window; None where nothing is reused.
    """

    window: Window
    n_prompt: int
    logits: Tensor
    residual: Tensor
    cache: KVCache | None

    def narrow(self, site: Tensor, n_generated: int) -> Window:
        """The part of the run that an intervention can change and that is scored.

        Args:
            site: [row], the place of the intervention in each row.
            n_generated: the window ends with the column that predicts this generated token.

        Returns:
            From the first column of a site on; from the first column of all where nothing is
            reused.
        """
        stop = self.n_prompt + n_generated - 1
        if self.cache is None:
            return self._columns(0, stop, None, None)
        first = int(self.window.column(site).min())
        prefix = self.cache.until(self.window.start + first)
        return self._columns(first, stop, prefix, self.residual[:, :, first:stop])

    def _columns(
        self, first: int, stop: int, prefix: KVCache | None, clean: Tensor | None
    ) -> Window:
        before = self.window.start + first
        return Window(
            input_ids=self.window.input_ids[:, first:stop],
            attention_mask=self.window.attention_mask[:, : self.window.start + stop],
            position_ids=self.window.position_ids[:, first:stop],
            start=before,
            padding=self.window.padding,
            prefix=prefix if before > 0 else None,
            clean=clean,
        )


def read_clean_run(
    said: Any, prompts: Sequence[Sequence[int]], continuation: Tensor, prefix: KVCache | None
) -> CleanRun:
    """Read a greedy run off what ``generate`` returned.

    Args:
        said: its result, with logits, hidden states and cache (``return_dict_in_generate``).
        prompts: the token ids it was given.
        continuation: [row, token], what it said; where all rows ended early, its last columns
            were never run and hold zeros in the result.
        prefix: the caches it was given.
    """
    n_tokens = continuation.shape[1]
    steps = [torch.stack(step) for step in said.hidden_states]
    missing = n_tokens - len(steps)
    residual = torch.nn.functional.pad(torch.cat(steps, dim=2), (0, 0, 0, missing))
    logits = torch.nn.functional.pad(torch.stack(said.logits, dim=1), (0, 0, 0, missing))
    window = open_window(prompts, continuation[:, :-1], prefix)
    return CleanRun(
        window=window,
        n_prompt=steps[0].shape[2],
        logits=logits,
        residual=residual,
        cache=None if prefix is None else read_cache(said.past_key_values, window.attention_mask),
    )
