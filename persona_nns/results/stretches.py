"""Places in an array, and the stretches of neighbours that are read and written as one."""

import itertools
from collections.abc import Iterable, Sequence

# Where something stands in an array: an index for each of some of its dimensions.
Index = tuple[int, ...]


def stretches(places: Iterable[Index]) -> list[list[Index]]:
    """Places in an array as stretches without a gap along its last dimension."""
    grouped = itertools.groupby(
        enumerate(sorted(set(places))), lambda pair: (pair[1][:-1], pair[1][-1] - pair[0])
    )
    return [[index for _, index in group] for _, group in grouped]


def box_of(stretch: Sequence[Index]) -> tuple[slice, ...]:
    """The part of an array that a stretch of places is."""
    return tuple(slice(a, b + 1) for a, b in zip(stretch[0], stretch[-1], strict=True))
