"""What a process at work on a run has claimed, and what it has written.

Nothing here knows about models.
"""

import os
import socket
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from persona_nns.declarations.plans import Unit
from persona_nns.errors import PersonaError
from persona_nns.results.allocation import attach, units_per_chunk
from persona_nns.results.block import Block
from persona_nns.results.store import RunGroup, begin_group, begun_group, find_group

_SIGN_EVERY = 15.0  # seconds between two signs of life of a process that gives them
#: A process that gives signs of life is gone where it was not seen to give one for so many seconds.
SILENCE = 120.0
_LATE = 5.0  # seconds by which clocks may differ on when a process began
_COLLECTED_FOR = 1.0  # seconds for which measured units may wait for others of their block
_OVER = "over"  # what the group of the sessions says
_LONG_AGO = timedelta(minutes=15)  # a sign as old as this is no sign, whosever clock is right


class Claims:
    """One process's part in a run, noted in ``sessions/<name>`` beside the units.

    The note says who computes (host, process, versions), which units (say, cells) it is at now,
    and in the end how many it wrote. A claim is no lock: nobody has to wait for it, and the
    claims of a process that has died mean nothing. Of a process on another machine nobody knows
    that; one that waits for long gives signs of life (`join`, `stay`), whose absence tells.
    """

    def __init__(
        self, store: str | Path, blocks: Sequence[Block], name: str, attrs: Mapping[str, Any]
    ) -> None:
        """Begin; nothing is written before there is something to write.

        Args:
            store: path or URL of the store.
            blocks: the groups that a unit is written to; the last one's ``completed`` is
                written last.
            name: of the session, unlike any other's.
            attrs: what is known of the process.
        """
        self._store = store
        self._blocks = blocks
        self.name = name
        self._note = {
            **attrs,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "claims": [],
            "n_written": 0,
            "n_repeated": 0,
        }
        self._groups: list[RunGroup] = []
        self._joined: RunGroup | None = None
        self._over: set[str] = set()
        self._said_over: set[str] | None = None  # of those, what the run says; None is not known
        self._signs: dict[str, tuple[str, float]] = {}  # of others: the last one, and when it came
        self._signed = 0.0
        self._held: list[tuple[Sequence[Unit], Mapping[str, NDArray[Any]], float]] = []
        self._written = 0.0

    def begin(self) -> None:
        """Allocate the run before anything is measured, so that the first claims are seen too.

        Raises:
            PersonaError: the store cannot be written.
        """
        if not self._groups:
            self._groups = [attach(self._store, block) for block in self._blocks]

    @property
    def has_joined(self) -> bool:
        """Whether others can see what this process claims, and that it lives."""
        return self._joined is not None

    def is_begun(self) -> bool:
        """Whether somebody is, or was, at work on the run."""
        return begun_group(self._store, self._last.experiment, self._last.run) is not None

    def join(self) -> None:
        """Note this process before the run is allocated, and give signs of life from now on.

        For a run of which not all is known yet that its group says.
        """
        self._joined = begin_group(self._store, self._last.experiment, self._last.run)
        self._write_note()

    def stay(self) -> None:
        """Give a sign of life if the last one was a while ago."""
        if self.has_joined and time.monotonic() - self._signed > _SIGN_EVERY:
            self._write_note()

    def know(self, blocks: Sequence[Block], facts: Mapping[str, Any]) -> None:
        """Learn what was not known at the beginning.

        Args:
            blocks: the groups that a unit is written to.
            facts: of the process.
        """
        self._blocks = blocks
        self._note |= facts

    def completed(self, units: Sequence[Unit]) -> set[str]:
        """Labels of those of these units that are complete now."""
        groups = self._groups or [self._found(block) for block in self._blocks]
        return set.intersection(
            *(group.completed(units) if group is not None else set() for group in groups)
        )

    def blocks_of(self, units: Sequence[Unit]) -> dict[str, int]:
        """The number of each unit's block by label; none where a chunk is one unit."""
        block = self._last
        per_chunk = units_per_chunk(self._store, block)
        if per_chunk == 1:
            return {}
        axis = block.plan.unit_axes[0]
        group = self._found(block)
        labels = block.plan.axes[axis] if group is None else group.labels(axis)
        index = {label: place for place, label in enumerate(labels)}
        return {unit.label: index[unit.place[axis]] // per_chunk for unit in units}

    def claim(self, units: Sequence[Unit]) -> None:
        """Say which units this process is at."""
        held = [unit for of_batch, *_ in self._held for unit in of_batch]
        self._note["claims"] = [unit.label for unit in (*held, *units)]
        if self._groups or self.has_joined:
            self._write_note()

    def claimed_by_others(self) -> Counter[str]:
        """Labels of the units that other processes are at, and how many of them are."""
        return Counter(label for note in self.others().values() for label in note.get("claims", ()))

    def others(self) -> dict[str, Mapping[str, Any]]:
        """What the other processes that are at work on the run say of themselves, by session."""
        group = self._group
        if group is None:
            group = begun_group(self._store, self._last.experiment, self._last.run)
        if group is None:
            return {}
        if self._said_over is None:
            self._said_over = sessions_over(group)
            self._over |= self._said_over
        living: dict[str, Mapping[str, Any]] = {}
        for name, note in group.sessions(but=self._over | {self.name}).items():
            if note.get("ended") or _has_died(note):
                self._over.add(name)
            elif not self._is_silent(name, note.get("seen")):
                living[name] = note
        return living

    def _is_silent(self, name: str, seen: str | None) -> bool:
        """Whether a process that gives signs of life has given none for long.

        How long is told by the clock here, from when a sign was first seen: clocks differ.
        """
        if seen is None:
            return False
        moment = time.monotonic()
        if self._signs.get(name, ("", 0.0))[0] != seen:
            self._signs[name] = (seen, moment)
        is_old = datetime.now(UTC) - datetime.fromisoformat(seen) > _LONG_AGO
        return is_old or moment - self._signs[name][1] > SILENCE

    def collect(
        self, units: Sequence[Unit], arrays: Mapping[str, NDArray[Any]], seconds: float
    ) -> None:
        """Write units, where chunks hold several with those of batches that follow at once.

        Whatever takes less than a second to measure would take longer to write. `settle` writes
        what is held; the arguments are those of `write`.
        """
        self.begin()
        self._held.append((units, arrays, seconds))
        size = max(group.per_chunk for group in self._groups)
        enough = sum(len(of_batch) for of_batch, *_ in self._held) >= size
        if enough or time.monotonic() - self._written > _COLLECTED_FOR:
            self.settle()

    def settle(self) -> None:
        """Write what was collected."""
        held, self._held = self._held, []
        if held:
            units = [unit for of_batch, *_ in held for unit in of_batch]
            names = held[0][1]
            arrays = {name: np.concatenate([of[name] for _, of, _ in held]) for name in names}
            self.write(units, arrays, np.repeat([s for *_, s in held], [len(u) for u, *_ in held]))
            self._written = time.monotonic()

    def write(
        self,
        units: Sequence[Unit],
        arrays: Mapping[str, NDArray[Any]],
        seconds: float | NDArray[np.floating],
    ) -> None:
        """Write units, but those that somebody else has completed meanwhile.

        Args:
            units: the units.
            arrays: by name, leading axis = unit.
            seconds: time of one unit, or of each.

        Raises:
            PersonaError: the store cannot be written.
        """
        self.begin()
        each = np.broadcast_to(seconds, len(units))
        done = self.completed(units)
        rows = {row: unit for row, unit in enumerate(units) if unit.label not in done}
        try:
            for group, block in zip(self._groups, self._blocks, strict=True):
                axes = {name: variable.axes for name, variable in block.variables.items()}
                measured = [
                    (
                        unit,
                        {"seconds": each[row], **{name: arrays[name][row, ...] for name in names}},
                    )
                    for row, unit in rows.items()
                    for names in [block.plan.names_written(unit, axes)]
                ]
                group.write_units(measured, 0.0)
            self._note["n_written"] += len(rows)
            self._note["n_repeated"] += len(done)
        except OSError as error:
            raise PersonaError(
                f"The store {str(self._store)!r} cannot be written ({error}); what is "
                "complete is kept, and the same command goes on."
            ) from error

    def end(self, when: str) -> None:
        """Give up what is claimed, and note the end; a store that is gone stays as it is."""
        self._note |= {"claims": [], "ended": when}
        if (group := self._group) is not None:
            try:
                self._write_note()
                say_over(group, [self.name, *self._over])
            except OSError:
                return  # the claims of a process that is gone mean nothing

    def _found(self, block: Block) -> RunGroup | None:
        return find_group(self._store, block.experiment, block.run)

    @property
    def _group(self) -> RunGroup | None:
        """Where this process can note what it does."""
        return self._groups[-1] if self._groups else self._joined

    @property
    def _last(self) -> Block:
        return self._blocks[-1]

    def _write_note(self) -> None:
        if self._joined is not None:
            self._signed = time.monotonic()
            self._note["seen"] = datetime.now(UTC).isoformat(timespec="milliseconds")
        group = self._group
        assert group is not None
        group.note("sessions", self.name, self._note)


def sessions_over(group: RunGroup) -> set[str]:
    """Sessions that a run says are over: nobody has to read their notes to know what goes on."""
    return set(group.about_notes("sessions").get(_OVER, ()))


def say_over(group: RunGroup, names: Iterable[str]) -> None:
    """Say which sessions are over, beside those of which that was said.

    What two processes say at once may be lost of one: then some notes are read once more.
    """
    group.say_about_notes("sessions", {_OVER: sorted({*sessions_over(group), *names})})


def _has_died(note: Mapping[str, Any]) -> bool:
    """Whether a process of this machine is no more; of another machine, nobody knows."""
    return note.get("host") == socket.gethostname() and not _is_running(note)


def _is_running(note: Mapping[str, Any]) -> bool:
    """Whether there is the process of a note, and not a later one of the same number."""
    try:
        began = psutil.Process(int(note.get("process", -1))).create_time()
    except (psutil.NoSuchProcess, ValueError):
        return False
    except psutil.AccessDenied:
        return True
    started = note.get("started")
    return started is None or began < datetime.fromisoformat(started).timestamp() + _LATE


def at_work(group: RunGroup) -> tuple[list[str], list[str]]:
    """Who computes units of a run: processes of this machine that live, and others that may.

    Args:
        group: of the run.

    Returns:
        Processes of this machine as ``process 12 on host``, and those of others that have not said
        that they have ended.
    """
    here: list[str] = []
    elsewhere: list[str] = []
    for note in group.sessions(but=sessions_over(group)).values():
        if not note.get("ended") and not _has_died(note):
            is_here = note.get("host") == socket.gethostname()
            shown = f"process {note.get('process')} on {note.get('host')}"
            (here if is_here else elsewhere).append(shown)
    return here, elsewhere
