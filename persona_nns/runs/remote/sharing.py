"""Which units (say, cells) a client sends next, when any number of clients share a run on a server.

As in `queue` there is no lock and no coordinator. A client asks before each job what is complete,
what others are at and which jobs are noted, says which units it takes, and turns to others where
somebody else has said so too. It begins at a place of its own, so that this is rare.

A job is looked after by the session that its note names. Where that has ended, has died, or gives
no signs of life, another client takes the job up: its result is waited for, not measured again. A
living client's job is left to it; it is asked about by others only where there was nothing else to
do for long. Writing is idempotent, so that two who take up one job do no harm.

Before the first job is accepted nothing is noted: a run that the server does not take leaves no
store. So clients that begin at the same moment may measure their first batches twice.
"""

import random
import time
from collections.abc import Iterable, Sequence

from persona_nns.declarations.plans import Unit
from persona_nns.results.claims import Claims
from persona_nns.runs.remote.job_book import Job, JobBook
from persona_nns.runs.remote.sizing import FIRST_UNITS


class Share:
    """The units that are left, and what becomes of them here and elsewhere."""

    def __init__(
        self,
        pending: Sequence[Unit],
        every: Iterable[Unit],
        claims: Claims,
        book: JobBook,
        order: random.Random | None = None,
    ) -> None:
        """Begin with units that are not known to be complete.

        Args:
            pending: in the order of the plan; neighbours share prompts, and stay together.
            every: all units of the plan, which another client's jobs may hold.
            claims: of this client.
            book: the jobs of the run.
            order: chooses where to begin; by default somewhere else each time.
        """
        self._random = order or random.Random()  # noqa: S311
        start = self._random.randrange(0, max(len(pending), 1), FIRST_UNITS)
        self._left = {unit.label: unit for unit in [*pending[start:], *pending[:start]]}
        self._asked = set(self._left)
        self._mine: dict[str, Unit] = {}
        self._every = {unit.label: unit for unit in every}
        self._claims = claims
        self._book = book
        self._taken: set[str] = set()
        self._living: set[str] = set()
        self.notes: list[Job] = []

    @property
    def n_left(self) -> int:
        """Units asked for that were not complete when this client last looked."""
        return len(self._left) + len(self._asked & self._mine.keys())

    def look(self) -> None:
        """See what is complete, what others are at, and which jobs there are."""
        if not self._claims.has_joined and self._claims.is_begun():
            self._claims.join()
        others = self._claims.others()
        self._living = {*others, self._claims.name}
        self._taken = {label for note in others.values() for label in note.get("claims", ())}
        self.notes = self._book.notes()
        # Last: what is given up between two looks has been completed before.
        self.settle(self._claims.completed([*self._left.values(), *self._mine.values()]))

    def settle(self, done: Iterable[str]) -> None:
        """These units are complete."""
        for label in done:
            self._left.pop(label, None)
            self._mine.pop(label, None)

    def is_complete(self, units: Sequence[Unit]) -> bool:
        """Whether units were complete when this client last looked."""
        return not any(unit.label in self._left or unit.label in self._mine for unit in units)

    def next_job(self, known: Iterable[str], *, living: bool) -> tuple[Job, list[Unit]] | None:
        """A job that waits, about units that are left, to be looked after; with its units.

        Args:
            known: ids of the jobs that are looked after here.
            living: one that another client looks after.
        """
        free = self._left.keys() if living else self._left.keys() - self._taken
        for job in self._waiting():
            is_ours = living or job.session not in self._living
            if is_ours and job.id not in known and not free.isdisjoint(job.units):
                return job, [self._every[label] for label in job.units]
        return None

    def needless(self) -> list[Job]:
        """Jobs of clients that are gone, all of whose units have been completed otherwise."""
        gone = [job for job in self._waiting() if job.session not in self._living]
        units = {label: self._every[label] for job in gone for label in job.units}
        done = self._claims.completed([*units.values()])
        return [job for job in gone if done >= set(job.units)]

    def next_units(self, size: int, *, claimed: bool = False) -> list[Unit]:
        """Units for another job: such as no job is about, and nobody is at.

        Args:
            size: of them at most.
            claimed: also such as somebody is at.
        """
        out = {label for job in self._waiting() for label in job.units}
        avoided = out if claimed else out | self._taken
        return [unit for label, unit in self._left.items() if label not in avoided][:size]

    def take(self, units: Sequence[Unit]) -> bool:
        """Say that this client is at units; False where another has come to say so too."""
        labels = {unit.label for unit in units}
        self._claims.claim([*self._mine.values(), *units])
        if (self._claims.claimed_by_others().keys() - self._taken) & labels:
            self._claims.claim([*self._mine.values()])
            time.sleep(self._random.uniform(0, 0.1))  # it sees the same, and turns away as well
            return False
        for unit in units:
            if self._left.pop(unit.label, None) or unit.label not in self._asked:
                self._mine[unit.label] = unit
        return True

    def put_back(self, units: Sequence[Unit]) -> None:
        """These units have to be measured after all."""
        back = {unit.label: unit for unit in units if self._mine.pop(unit.label, None)}
        self._left = {label: back[label] for label in back if label in self._asked} | self._left
        self._claims.claim([*self._mine.values()])

    def _waiting(self) -> list[Job]:
        """Jobs whose results nobody has taken, and which can be taken here."""
        return [
            job
            for job in self.notes
            if job.state == "waiting" and self._every.keys() >= set(job.units)
        ]
