"""Prefixes: the first tokens of rows, run once and kept as a key-value cache.

What rows have in common is run once for all of them: prompts of one persona begin with the same
tokens, whatever their task. Rows are put into groups, each with a head that all its rows begin
with, such that heads and what follows them are the fewest tokens. One level of sharing comes close
to the least: on the paper's grids a tree of all shared prefixes would save 5 % more.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from nnsight import TransformersModel, save
from torch import Tensor

from persona_nns.tracing.batches import keep_last, left_pad
from persona_nns.tracing.kv.cache import KVCache, read_cache, stack
from persona_nns.tracing.window import Window, open_batch, open_window

# Rows are prefilled together while padding is less than this share of their columns.
_MOST_PADDING = 0.15


@dataclass(frozen=True)
class Prefilled:
    """Prompts, and the caches of their first tokens.

    Attributes:
        rows: token ids of the prompts.
        prefix: caches of their first tokens, p_last not among them. What is left of the prompts
            is equally long in every row. None where nothing is reused.
    """

    rows: Sequence[Sequence[int]]
    prefix: KVCache | None

    def some(self, which: slice | Sequence[int]) -> "Prefilled":
        """Some of the prompts, or some of them several times."""
        if isinstance(which, slice):
            return Prefilled(self.rows[which], self.prefix and self.prefix.rows(which))
        prefix = self.prefix and self.prefix.rows(torch.tensor(which))
        return Prefilled([self.rows[row] for row in which], prefix)

    def followed_by(self, said: Tensor) -> Window:
        """What the prefix does not hold, and tokens that follow the prompts, [row, token]."""
        return open_window(self.rows, said, self.prefix)


def prefill_rows(
    model: TransformersModel, rows: Sequence[Sequence[int]], n_shown: int = 1, *, reuse: bool
) -> Prefilled:
    """Run all but the last ``n_shown`` tokens of prompts once."""
    return Prefilled(rows, prefill(model, [ids[:-n_shown] for ids in rows], reuse=reuse))


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
    n_head = dict(zip(distinct, head_lengths(distinct), strict=True))
    heads = sorted({row[:n] for row, n in n_head.items() if n}, key=len)
    held = _run_rows(model, heads, None, [(0, 0)] * len(heads)) if heads else None
    order = sorted(distinct, key=lambda row: len(row) - n_head[row])
    begun = [(heads.index(row[:n]), n) if (n := n_head[row]) else (0, 0) for row in order]
    prefix = _run_rows(model, order, held, begun)
    place = {row: k for k, row in enumerate(order)}
    return prefix.rows(torch.tensor([place[tuple(row)] for row in rows], device=model.device))


def _run_rows(
    model: TransformersModel,
    rows: Sequence[Sequence[int]],
    heads: KVCache | None,
    begun: Sequence[tuple[int, int]],
) -> KVCache:
    """Run rows behind heads that have been run, as few padded tokens as can be.

    Args:
        model: from `load_model`.
        rows: token ids, heads included, sorted by what follows the heads.
        heads: the caches of the heads, if there are any.
        begun: of each row, which of the heads it begins with, and how many tokens that has.
    """
    parts: list[KVCache] = []
    for part in _similar([len(ids) - n for ids, (_, n) in zip(rows, begun, strict=True)]):
        batch = left_pad([rows[row] for row in part], device=model.device)
        # Tokens stand side by side behind their head: a window over columns stays one over
        # tokens. Where a head is longer than the columns before, its last tokens are run again.
        before = batch.width - max(len(rows[row]) - begun[row][1] for row in part)
        prefix = None
        if heads is not None and before > 0:
            which = torch.tensor([begun[row][0] for row in part], device=model.device)
            prefix = heads.begin(which, before - batch.padding)
        with model.trace(
            open_batch(batch, prefix).inputs(cached=True), logits_to_keep=keep_last(0)
        ):
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


def head_lengths(rows: Sequence[Sequence[int]]) -> list[int]:
    """How many first tokens of each row are run as a head that other rows share.

    Rows with the same head are those that agree in these tokens. A head is shorter than its row,
    and 0 where a row shares none.

    Args:
        rows: token ids, all different.
    """
    order = sorted(range(len(rows)), key=lambda row: tuple(rows[row]))
    ordered = [rows[row] for row in order]
    # Of all ways to cut the sorted rows into groups, the cheapest, by dynamic programming.
    fewest = [0]
    choice: list[tuple[int, int]] = [(0, 0)]
    for stop in range(1, len(ordered) + 1):
        options: list[tuple[int, int, int]] = []
        shared, n_tokens = len(ordered[stop - 1]) - 1, 0
        for start in reversed(range(stop)):
            if start < stop - 1:
                shared = min(shared, _agreement(ordered[start], ordered[start + 1]))
                shared = min(shared, len(ordered[start]) - 1)
            n_tokens += len(ordered[start])
            size = stop - start
            head = shared if size > 1 else 0
            options.append((fewest[start] + n_tokens - (size - 1) * head, start, head))
        n_tokens, start, head = min(options)
        fewest.append(n_tokens)
        choice.append((start, head))
    lengths = [0] * len(rows)
    stop = len(rows)
    while stop:
        start, head = choice[stop]
        for place in range(start, stop):
            lengths[order[place]] = head
        stop = start
    return lengths


def _agreement(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two rows have in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
