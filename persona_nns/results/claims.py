"""What a process at work on a run has claimed, and what it has written.

Nothing here knows about models.
"""

import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from numpy.typing import NDArray

from persona_nns.declarations.plans import Unit
from persona_nns.errors import PersonaError
from persona_nns.results.allocation import attach
from persona_nns.results.block import Block
from persona_nns.results.store import RunGroup, find_group


class Claims:
    """One process's part in a run, noted in ``sessions/<name>`` beside the units.

    The note says who computes (host, process, versions), which units (say, cells) it is at now,
    and in the end how many it wrote. A claim is no lock: nobody has to wait for it, and the
    claims of a process that has died mean nothing.
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
        self._name = name
        self._note = {
            **attrs,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "claims": [],
            "n_written": 0,
            "n_repeated": 0,
        }
        self._groups: list[RunGroup] = []
        self._over: set[str] = set()

    def begin(self) -> None:
        """Allocate the run before anything is measured, so that the first claims are seen too.

        Raises:
            PersonaError: the store cannot be written.
        """
        if not self._groups:
            self._groups = [attach(self._store, block) for block in self._blocks]

    def completed(self, units: Sequence[Unit]) -> set[str]:
        """Labels of those of these units that are complete now."""
        groups = self._groups or [self._found(block) for block in self._blocks]
        return set.intersection(
            *(group.completed(units) if group is not None else set() for group in groups)
        )

    def claim(self, units: Sequence[Unit]) -> None:
        """Say which units this process is at."""
        self._note["claims"] = [unit.label for unit in units]
        if self._groups:
            self._write_note()

    def claimed_by_others(self) -> Counter[str]:
        """Labels of the units that other processes are at, and how many of them are."""
        claims: Counter[str] = Counter()
        group = self._groups[-1] if self._groups else self._found(self._blocks[-1])
        if group is None:
            return claims
        for name, note in group.sessions(but=self._over | {self._name}).items():
            if note.get("ended") or _has_died(note):
                self._over.add(name)
            else:
                claims.update(note.get("claims", ()))
        return claims

    def write(
        self, units: Sequence[Unit], arrays: Mapping[str, NDArray[Any]], seconds: float
    ) -> None:
        """Write units, but those that somebody else has completed meanwhile.

        Args:
            units: the units.
            arrays: by name, leading axis = unit.
            seconds: time of one unit.

        Raises:
            PersonaError: the store cannot be written.
        """
        self.begin()
        done = self.completed(units)
        rows = {row: unit for row, unit in enumerate(units) if unit.label not in done}
        try:
            for group, block in zip(self._groups, self._blocks, strict=True):
                axes = {name: variable.axes for name, variable in block.variables.items()}
                measured = [
                    (unit, {name: arrays[name][row, ...] for name in names})
                    for row, unit in rows.items()
                    for names in [block.plan.names_written(unit, axes)]
                ]
                group.write_units(measured, seconds)
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
        if self._groups:
            try:
                self._write_note()
            except OSError:
                return  # the claims of a process that is gone mean nothing

    def _found(self, block: Block) -> RunGroup | None:
        return find_group(self._store, block.experiment, block.run)

    def _write_note(self) -> None:
        self._groups[-1].note_session(self._name, self._note)


def _has_died(note: Mapping[str, Any]) -> bool:
    """Whether a process of this machine is no more; of another machine, nobody knows."""
    same = note.get("host") == socket.gethostname()
    return same and not psutil.pid_exists(int(note.get("process", -1)))
