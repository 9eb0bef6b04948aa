"""Results on disk: labelled arrays in one Zarr v3 hierarchy, a unit (say, a cell) at a time.

Group ``/<experiment>/<run>`` holds one model's block for one grid, and plain xarray reads it:
``xr.open_zarr(store, group="localized_positions/<run>", consolidated=False)``. The block is
allocated whole, before anything is measured. One unit is whole chunks in every array, so units
are written independently of each other; in a large grid a chunk is a block of units (`blocks`). A
unit's ``completed`` is written after all the rest of it, and on a local disk only once the rest has
reached the disk: whatever cuts a run off, a unit that says it is complete is. Metadata is never
consolidated: groups that come later would not be seen.

Whoever writes writes the same numbers to the same place, so any number of processes may allocate
and write one run at once. What differs is when and by whom a run was made (`allocation`), and how
long a unit took.

Nothing here knows about models.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr
from numpy.typing import NDArray

from persona_nns.declarations.plans import Label, Unit
from persona_nns.results.block import Block
from persona_nns.results.blocks import Part, alone, read_region, write_parts
from persona_nns.results.chunks import chunk_shape, write_chunks
from persona_nns.results.groups import (
    DAMAGED,
    chunks_together,
    is_allocated,
    open_group,
    put_group,
    read_notes,
    require_group,
    subgroup,
    subgroups,
)
from persona_nns.results.locations import Location, location_of
from persona_nns.results.stretches import Index, box_of, stretches

_REQUESTS_AT_A_TIME = 8


class RunGroup:
    """The group of one run, opened for reading and writing units."""

    def __init__(
        self,
        group: zarr.Group,
        location: Location,
        arrays: Mapping[str, "zarr.Array[Any]"] | None = None,
    ) -> None:
        self._group = group
        self._location = location
        self._order: dict[str, dict[Label, int]] = {}
        self._arrays = dict(arrays or {})

    def __len__(self) -> int:
        return self.array("completed").size

    @property
    def attrs(self) -> dict[str, Any]:
        """The run's provenance."""
        return dict(self._group.attrs)

    @property
    def unit_axes(self) -> tuple[str, ...]:
        """The dimensions of ``completed``: those that every unit has a place on."""
        return _axes(self.array("completed"))

    @property
    def per_chunk(self) -> int:
        """How many units a chunk holds along the first dimension of ``completed``."""
        return chunk_shape(self.array("completed"))[1]

    def flags(self) -> NDArray[np.bool_]:
        """The array ``completed``, without what was cut off while it was written."""
        array = self.array("completed")
        if self._location.folder is None and set(array.chunks) == {1}:
            # An object is written whole or not at all, and only for a flag that is set: one
            # listing says what a request for each unit would.
            key = cast("Any", array.metadata).encode_chunk_key
            written = self._location.names(array.path)
            set_ = [key(place) in written for place in np.ndindex(array.shape)]
            return np.array(set_, dtype=bool).reshape(array.shape)
        try:
            return read_region(array, [slice(None)] * array.ndim).astype(bool)
        except DAMAGED:
            if self._location.folder is None:
                raise
        flags = np.zeros(array.shape, dtype=bool)
        for corner in np.ndindex(*map(_quotient, array.shape, array.chunks)):
            box = tuple(
                slice(i * n, (i + 1) * n) for i, n in zip(corner, array.chunks, strict=True)
            )
            flags[box] = self._read_flags(box)
        return flags

    def completed(self, units: Iterable[Unit]) -> set[str]:
        """Labels of those of the units that are complete."""
        array = self.array("completed")
        axes = _axes(array)
        places = {unit.label: self._index(axes, unit) for unit in units}
        if not places:
            return set()
        indices = np.array(list(places.values()))
        if self._location.folder is None and set(array.chunks) == {1}:
            flags = self.flags()[0]
            done = flags[tuple(indices.T)]
        else:
            done = self._flags_at(indices)
        return {label for label, flag in zip(places, done.tolist(), strict=True) if flag}

    def _flags_at(self, indices: NDArray[np.int_]) -> NDArray[np.bool_]:
        """The flags at some places, each chunk read once."""
        array = self.array("completed")
        chunks = np.array(array.chunks[1:])
        corners, of = np.unique(indices // chunks, axis=0, return_inverse=True)
        done = np.zeros(len(indices), dtype=bool)
        rows_of = np.split(np.argsort(of, kind="stable"), np.cumsum(np.bincount(of))[:-1])
        for corner, rows in zip(corners, rows_of, strict=True):
            start = corner * chunks
            box = (slice(1), *(slice(a, a + n) for a, n in zip(start, chunks, strict=True)))
            done[rows] = self._read_flags(box)[0][tuple((indices[rows] - start).T)]
        return done

    def _read_flags(self, box: tuple[slice, ...]) -> NDArray[np.bool_]:
        """Flags of one chunk; of one that was cut off while it was written, none is set."""
        array = self.array("completed")
        try:
            return read_region(array, box).astype(bool)
        except DAMAGED:
            if self._location.folder is None:
                raise
            sizes = zip(box, array.shape, strict=True)
            return np.zeros([len(range(*part.indices(size))) for part, size in sizes], dtype=bool)

    def write_units(
        self, measured: Sequence[tuple[Unit, Mapping[str, NDArray[Any]]]], seconds: float
    ) -> None:
        """Write units; they count only once ``completed`` is written, which is done last.

        Args:
            measured: each unit with the arrays that it writes, by name.
            seconds: time of one unit, where none is among its arrays.
        """
        if not measured:
            return
        folder = self._location.folder
        if folder is None or self._per_lock == 1:
            self._write_whole(measured, seconds)
            return
        blocks: dict[int, list[tuple[Unit, Mapping[str, NDArray[Any]]]]] = {}
        for unit, values in measured:
            blocks.setdefault(self._first_index(unit) // self._per_lock, []).append((unit, values))
        for number, of_block in blocks.items():
            with alone(folder / self.array("completed").path, number):
                self._write_block(of_block, seconds, number)

    def _write_whole(
        self, measured: Sequence[tuple[Unit, Mapping[str, NDArray[Any]]]], seconds: float
    ) -> None:
        """Write units that are whole chunks, or to where nobody else writes."""
        arrays = [list(parts) for parts in self._parts_of(measured, seconds)]
        if self._location.folder is None:
            with ThreadPoolExecutor(_REQUESTS_AT_A_TIME) as pool:  # each waits for a server
                list(pool.map(_write_all, arrays))
        else:
            for parts in arrays:
                _write_all(parts)
        self._location.flush()
        _write_all(self._flag_parts(measured))

    def _write_block(
        self, measured: Sequence[tuple[Unit, Mapping[str, NDArray[Any]]]], seconds: float, n: int
    ) -> None:
        """Write units of one block, whose lock this process holds."""
        first = slice(n * self._per_lock, (n + 1) * self._per_lock)
        others = [slice(None)] * (self.array("completed").ndim - 2)
        nothing = not self._read_flags((slice(1), first, *others)).any()
        parts = (part for of in self._parts_of(measured, seconds) for part in of)
        write_parts(parts, self._location.flush, in_damaged=nothing)
        # Whatever took its place before this has reached the disk when the flags do.
        write_parts(self._flag_parts(measured), self._location.flush, in_damaged=True)

    def _parts_of(
        self, measured: Sequence[tuple[Unit, Mapping[str, NDArray[Any]]]], seconds: float
    ) -> Iterator[Iterator[Part]]:
        """What units write into each array but ``completed``."""
        rows: dict[str, list[tuple[Unit, NDArray[Any]]]] = {}
        for unit, values in measured:
            for name, value in {"seconds": np.asarray(seconds), **values}.items():
                rows.setdefault(name, []).append((unit, value))
        return (self._parts(name, of_name) for name, of_name in rows.items())

    def _flag_parts(
        self, measured: Sequence[tuple[Unit, Mapping[str, NDArray[Any]]]]
    ) -> Iterator[Part]:
        return self._parts("completed", [(unit, np.asarray(True)) for unit, _ in measured])  # noqa: FBT003

    @cached_property
    def _per_lock(self) -> int:
        """Units along the first dimension of ``completed`` no chunk of which holds others too."""
        first = self.unit_axes[0]
        sizes = [1]
        for name in (*self.attrs["variables"], "seconds", "completed"):
            axes = _axes(array := self.array(name))
            if first in axes:
                sizes.append(chunk_shape(array)[1 + axes.index(first)])
        return math.lcm(*sizes)

    def _first_index(self, unit: Unit) -> int:
        axis = self.unit_axes[0]
        return self._index_of(axis)[unit.place[axis]]

    def say(self, attrs: Mapping[str, Any]) -> None:
        """Write down something beside what the run says of itself: what it is called, say."""
        if any(self.attrs.get(name) != value for name, value in attrs.items()):
            self._group.update_attributes(dict(attrs))

    def below(self) -> list[str]:
        """The groups in it that units are written to as well."""
        return [name for name, group in subgroups(self._group) if is_allocated(group)]

    def read_unit(self, unit: Unit, name: str) -> NDArray[Any]:
        """What a complete unit has written into an array: its dimensions but those of its place.

        Args:
            unit: of this run.
            name: of an array that the unit writes.
        """
        return self.read_units([unit], name)[0]

    def read_units(self, units: Sequence[Unit], name: str) -> list[NDArray[Any]]:
        """What complete units have written into an array, neighbours in one read.

        Args:
            units: of this run, with places on the same dimensions.
            name: of an array that they write.
        """
        array = self.array(name)
        axes = _axes(array)
        placed = [axis for axis in axes if axis in units[0].place]
        if not placed:  # of a run's only unit
            return [np.asarray(array[0])] * len(units)
        indices = [self._index(axes, unit) for unit in units]
        found: dict[Index, NDArray[Any]] = {}
        for stretch in stretches(indices):
            box = dict(zip(placed, box_of(stretch), strict=True))
            region = (slice(1), *(box.get(axis, slice(None)) for axis in axes))
            values = read_region(array, region)[0]
            values = np.moveaxis(values, [axes.index(axis) for axis in placed], range(len(placed)))
            rows = values.reshape(len(stretch), *values.shape[len(placed) :])
            found |= {index: rows[row, ...] for row, index in enumerate(stretch)}
        return [found[index] for index in indices]

    def unit_bytes(self) -> int:
        """About what a unit takes when it is read, texts aside."""
        return sum(self.array(name).nbytes for name in self.attrs["variables"]) // len(self)

    def labels(self, axis: str) -> list[Label]:
        """The labels of a dimension, in their order."""
        return list(np.asarray(self.array(axis)[...]).tolist())

    def axes(self, name: str) -> tuple[str, ...]:
        """The dimensions of an array after ``model``."""
        return _axes(self.array(name))

    def _parts(self, name: str, rows: Sequence[tuple[Unit, NDArray[Any]]]) -> Iterator[Part]:
        """Where in one array units are written, and what: neighbours are one part."""
        array = self.array(name)
        axes = _axes(array)
        placed = [axis for axis in axes if axis in rows[0][0].place]
        own = [axis for axis in axes if axis not in placed]
        if not placed:  # of a run's only unit
            yield array, tuple(map(slice, array.shape)), np.asarray(rows[0][1])[None]
            return
        values = {self._index(axes, unit): value for unit, value in rows}
        for stretch in stretches(values):
            stacked = np.stack([values[index] for index in stretch])
            sizes = dict(zip((placed[-1], *own), stacked.shape, strict=True))
            order = [[*sizes].index(axis) for axis in axes if axis in sizes]
            box = dict(zip(placed, box_of(stretch), strict=True))
            region = (slice(1), *(box.get(axis, slice(None)) for axis in axes))
            shape = [1, *(sizes.get(axis, 1) for axis in axes)]
            yield array, region, stacked.transpose(order).reshape(shape)

    def _index(self, axes: Iterable[str], unit: Unit) -> Index:
        """Where a unit stands, on those of some dimensions that it has a place on."""
        place = unit.place
        return tuple([self._index_of(axis)[place[axis]] for axis in axes if axis in place])

    def _index_of(self, axis: str) -> dict[Label, int]:
        """Where each label stands in this group: the order of the plan when it was allocated."""
        if axis not in self._order:
            labels = np.asarray(self.array(axis)[...]).tolist()
            self._order[axis] = {label: index for index, label in enumerate(labels)}
        return self._order[axis]

    def arrays(self) -> dict[str, "zarr.Array[Any]"]:
        """Its arrays, labels and units alike."""
        return {str(name): array for name, array in self._group.arrays()}

    def notes(self, of: str, but: Iterable[str] = ()) -> dict[str, Mapping[str, Any]]:
        """What a sub-group's groups say, by name: those of ``sessions`` or ``jobs``."""
        return read_notes(self._group, self._location, of, but)

    def note(self, of: str, name: str, attrs: Mapping[str, Any]) -> None:
        """Write such a note, in one piece and a sub-group of its own: writers never meet."""
        put_group(require_group(self._group, of), name, attrs)

    def about_notes(self, of: str) -> Mapping[str, Any]:
        """What is said of all such notes."""
        found = subgroup(self._group, of)
        return {} if found is None else dict(found.attrs)

    def say_about_notes(self, of: str, attrs: Mapping[str, Any]) -> None:
        """Say something of all such notes; what another process says meanwhile may be lost."""
        require_group(self._group, of).update_attributes(dict(attrs))

    def seconds(self) -> NDArray[np.floating]:
        """How long its units took; NaN of those that are not complete."""
        return np.asarray(self.array("seconds")[...])

    def sessions(self, but: Iterable[str] = ()) -> dict[str, Mapping[str, Any]]:
        """What the processes that compute, or computed, units of this run say of themselves.

        Args:
            but: names of sessions to leave out.
        """
        return self.notes("sessions", but)

    def array(self, name: str) -> "zarr.Array[Any]":
        """One of its arrays."""
        if name not in self._arrays:
            with chunks_together():
                self._arrays[name] = cast("zarr.Array[Any]", self._group[name])
        return self._arrays[name]


def _write_all(parts: Iterable[Part]) -> None:
    for part in parts:
        write_chunks(*part)


def _quotient(size: int, chunk: int) -> int:
    """How many chunks there are along a dimension."""
    return -(-size // chunk)


def _axes(array: "zarr.Array[Any]") -> tuple[str, ...]:
    """The dimensions of an array after ``model``."""
    return tuple(cast("Any", array.metadata).dimension_names[1:])


def check_writable(store: str | Path) -> None:
    """See that a store can be written before anything is computed for it.

    Raises:
        UsageError: the path cannot be written, or is no Zarr store.
    """
    location_of(store).check_writable()


def find_group(store: str | Path, experiment: str, run: str) -> RunGroup | None:
    """The group of a run, for reading; None where it is not there yet."""
    group = open_group(store, f"{experiment}/{run}", "r")
    if group is None or not is_allocated(group):
        return None
    return RunGroup(group, location_of(store))


def begun_group(store: str | Path, experiment: str, run: str) -> RunGroup | None:
    """The group of a run where notes of sessions may be all there is; None where it is not there.

    Only its sessions can be read and written before it is allocated.
    """
    group = open_group(store, f"{experiment}/{run}", "r")
    return None if group is None else RunGroup(group, location_of(store))


def begin_group(store: str | Path, experiment: str, run: str) -> RunGroup:
    """The group of a run, for notes of sessions before it is allocated; created if need be."""
    group = open_group(store, f"{experiment}/{run}", "a")
    assert group is not None
    return RunGroup(group, location_of(store))


def completed_units(store: str | Path, block: Block) -> set[str]:
    """Labels of the units that are complete; none where the group is not there yet."""
    group = find_group(store, block.experiment, block.run)
    return set() if group is None else group.completed(block.plan.units)
