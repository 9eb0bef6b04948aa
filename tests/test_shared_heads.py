"""Shared heads: rows that begin alike, cut so that the fewest tokens are run."""

from itertools import takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_nns.tracing.prefixes import head_lengths


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], []),
        ([[1, 2, 3]], [0]),
        ([[1, 2], [3, 4]], [0, 0]),
        ([[1, 2, 3], [9, 9], [1, 2, 4]], [2, 0, 2]),
        ([[1, 2], [1, 2, 3]], [1, 1]),  # a head leaves something of every row
        # One head of five tokens for three rows beats one of two tokens for all five.
        ([[1, 2, 3, 4, 5, k] for k in (6, 7, 8)] + [[1, 2, 8], [1, 2, 9]], [5, 5, 5, 2, 2]),
    ],
)
def test_heads_by_hand(rows: list[list[int]], expected: list[int]) -> None:
    assert head_lengths(rows) == expected


def tokens_run(rows: list[tuple[int, ...]], lengths: list[int]) -> int:
    heads = {row[:n] for row, n in zip(rows, lengths, strict=True)}
    return sum(map(len, heads)) + sum(len(row) - n for row, n in zip(rows, lengths, strict=True))


def fewest_by_trying(rows: list[tuple[int, ...]]) -> int:
    """Over all ways to cut the sorted rows into groups, each with the longest head it can have."""
    ordered = sorted(rows)
    fewest = sum(map(len, rows))
    for cuts in range(2 ** max(0, len(rows) - 1)):
        groups: list[list[tuple[int, ...]]] = [[]]
        for place, row in enumerate(ordered):
            if place and cuts >> (place - 1) & 1:
                groups.append([])
            groups[-1].append(row)
        total = 0
        for group in groups:
            alike = sum(1 for _ in takewhile(lambda c: len(set(c)) == 1, zip(*group, strict=False)))
            head = min([alike, *(len(row) - 1 for row in group)]) if len(group) > 1 else 0
            total += sum(map(len, group)) - (len(group) - 1) * head
        fewest = min(fewest, total)
    return fewest


@given(st.sets(st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple), max_size=7))
def test_no_cut_runs_fewer_tokens(rows: set[tuple[int, ...]]) -> None:
    listed = list(rows)
    lengths = head_lengths(listed)
    assert all(n < len(row) for row, n in zip(listed, lengths, strict=True))
    assert tokens_run(listed, lengths) <= fewest_by_trying(listed)
