"""Which units (say, cells) a process measures next, when any number of processes share a run.

There is no lock and no coordinator. Each process goes through the batches in an order of its
own, asks before each batch what is complete, says which units it is at, and leaves alone what
others say they are at as long as there is anything else. Two that claim one batch at the same
moment both see it, and both turn to another. In the end a process waits for what others are at
about as long as one of its own batches took, and then computes it too: whoever had claimed it is
slow, or gone. So nothing is lost, and at most the batch that a process is at is computed twice.

Where a chunk holds a block of units, a process stays in its block, and others go to other blocks:
they would wait for each other to write into it.
"""

import random
import time
from collections.abc import Iterator, Sequence

from persona_nns.declarations.plans import Unit
from persona_nns.results.claims import Claims

_POLL = 0.5  # seconds between two looks at what others are at, at most
_FIRST_PATIENCE = 10.0  # seconds to wait for others before a batch of its own was measured


class Queue:
    """The batches of units that this process measures."""

    def __init__(
        self,
        units: Sequence[Unit],
        batch_size: int,
        claims: Claims,
        *,
        order: random.Random | None = None,
    ) -> None:
        """Begin with units that are not known to be complete.

        Args:
            units: in the order of the plan; neighbours share prompts, and stay together.
            batch_size: units at a time.
            claims: of this process.
            order: chooses the order of the batches; by default a different one each time.
        """
        self._order = order or random.Random()  # noqa: S311
        self._block = claims.blocks_of(units)
        self._batches = self._begin(units, batch_size)
        self._claims = claims
        self._patience = _FIRST_PATIENCE
        self._waiting_since: float | None = None

    def _begin(self, units: Sequence[Unit], batch_size: int) -> list[list[Unit]]:
        """Batches in an order of their own; those of a block, which are written to it, in a row."""
        if not self._block:
            batches = _cut(units, batch_size)
            self._order.shuffle(batches)
            return batches
        blocks: dict[int, list[Unit]] = {}
        for unit in units:
            blocks.setdefault(self._block[unit.label], []).append(unit)
        shuffled = list(blocks.values())
        self._order.shuffle(shuffled)
        return [batch for block in shuffled for batch in _cut(block, batch_size)]

    def __iter__(self) -> Iterator[list[Unit]]:
        """Yield batches to measure and write until every unit is complete."""
        while batch := self._next():
            started = time.monotonic()
            yield batch
            self._patience = time.monotonic() - started
            self._waiting_since = None

    def put_back(self, batch: Sequence[Unit], batch_size: int) -> None:
        """Take a batch back that did not fit; it and all others are yielded in smaller ones."""
        batches = [list(batch), *self._batches]
        self._batches = [part for whole in batches for part in _cut(whole, batch_size)]

    @property
    def n_left(self) -> int:
        """Units that were not complete when this process last looked."""
        return sum(map(len, self._batches))

    @property
    def n_batches(self) -> int:
        """Batches that were not complete when this process last looked."""
        return len(self._batches)

    def _next(self) -> list[Unit]:
        while True:
            claimed = self._claims.claimed_by_others()  # by label
            free = self._first(avoid=set(claimed))
            if not self._batches:
                return []
            if free:
                self._claims.claim(free)
                if not self._claims.claimed_by_others().keys() & _labels(free):
                    return self._take(self._batches[0], free)
                self._claims.claim([])
                self._batches.append(self._batches.pop(0))
                time.sleep(self._order.uniform(0, 0.1))
            elif self._is_impatient():
                abandoned = min(self._batches, key=lambda batch: claimed[batch[0].label])
                self._claims.claim(abandoned)
                return self._take(abandoned, abandoned)
            else:
                time.sleep(min(_POLL, max(0.02, self._patience / 10)))

    def _first(self, *, avoid: set[str]) -> list[Unit]:
        """Units of the first batch that has any to measure, put first; complete batches go.

        One of a block that somebody else is at comes only where there is no other.
        """
        blocks = {self._block[label] for label in avoid if label in self._block}
        if blocks and (found := self._first_of(avoid, blocks)):
            return found
        return self._first_of(avoid, set())

    def _first_of(self, avoid: set[str], blocks: set[int]) -> list[Unit]:
        place = 0
        while place < len(self._batches):
            batch = self._batches[place]
            if blocks and self._block[batch[0].label] in blocks:
                place += 1
                continue
            done = self._claims.completed(batch)
            left = [unit for unit in batch if unit.label not in done]
            free = [unit for unit in left if unit.label not in avoid]
            if not left:
                del self._batches[place]
            elif free:
                del self._batches[place]
                self._batches.insert(0, left)
                return free
            else:
                self._batches[place] = left
                place += 1
        return []

    def _take(self, batch: list[Unit], units: list[Unit]) -> list[Unit]:
        """Take units of one of the batches; what is left of it stays."""
        taken = _labels(units)
        place = next(i for i, each in enumerate(self._batches) if each is batch)
        left = [unit for unit in batch if unit.label not in taken]
        self._batches[place : place + 1] = [left] if left else []
        return units

    def _is_impatient(self) -> bool:
        now = time.monotonic()
        if self._waiting_since is None:
            self._waiting_since = now
        return now - self._waiting_since > 1.5 * self._patience


def _cut(units: Sequence[Unit], size: int) -> list[list[Unit]]:
    return [list(units[start : start + size]) for start in range(0, len(units), size)]


def _labels(units: Sequence[Unit]) -> set[str]:
    return {unit.label for unit in units}
