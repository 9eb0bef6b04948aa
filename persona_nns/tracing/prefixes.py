"""Which first tokens rows have in common, so that they are run once for all of them.

Prompts of one persona begin with the same tokens, whatever their task. Rows are put into groups,
each with a head that all its rows begin with, such that heads and what follows them are the
fewest tokens. One level of sharing comes close to the least: on the paper's grids a tree of all
shared prefixes would save 5 % more.
"""

from collections.abc import Sequence
from itertools import takewhile


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
