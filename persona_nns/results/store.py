"""Results on disk: labelled arrays in one Zarr v3 hierarchy, a unit (say, a cell) at a time.

Group ``/<experiment>/<run>`` holds one model's block for one grid, and plain xarray reads it:
``xr.open_zarr(store, group="localized_positions/<run>", consolidated=False)``. The block is
allocated whole, before anything is measured. One unit is whole chunks in every array, so units
are written independently of each other. A unit's ``completed`` is written after all the rest of
it, and on a local disk only once the rest has reached the disk: whatever cuts a run off, a unit
that says it is complete is. Metadata is never consolidated: groups that come later would not be
seen.

Whoever writes writes the same numbers to the same place, so any number of processes may allocate
and write one run at once. What differs is when and by whom a run was made (`allocation`), and how
long a unit took.

Nothing here knows about models.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.metadata.v3 import ArrayV3Metadata
from zarr.errors import ContainsArrayError, ContainsGroupError
from zarr.storage import LocalStore

from persona_nns.declarations.plans import Label, Unit
from persona_nns.results.block import Block
from persona_nns.results.chunks import write_chunks
from persona_nns.results.locations import Location, location_of
from persona_nns.results.stretches import Index, box_of, stretches

_CHUNKS_AT_A_TIME = 64
_REQUESTS_AT_A_TIME = 8
# What reading a chunk raises that was cut off, whichever codec notices it.
DAMAGED = (RuntimeError, ValueError, OSError)

# Part of an array: the array, where, and what.
_Part = tuple["zarr.Array[Any]", tuple[slice, ...], NDArray[Any]]


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
        return self._array("completed").size

    @property
    def attrs(self) -> dict[str, Any]:
        """The run's provenance."""
        return dict(self._group.attrs)

    @property
    def unit_axes(self) -> tuple[str, ...]:
        """The dimensions of ``completed``: those that every unit has a place on."""
        return _axes(self._array("completed"))

    def flags(self) -> NDArray[np.bool_]:
        """The array ``completed``, without what was cut off while it was written."""
        flags = np.zeros(self._array("completed").shape, dtype=bool)
        for index in self._complete(np.ndindex(flags.shape[1:])):
            flags[0, *index] = True
        return flags

    def completed(self, units: Iterable[Unit]) -> set[str]:
        """Labels of those of the units that are complete."""
        array = self._array("completed")
        places = {unit.label: self._index(array, unit) for unit in units}
        done = self._complete(places.values())
        return {label for label, index in places.items() if index in done}

    def _complete(self, places: Iterable[Index]) -> set[Index]:
        """Those of these places in ``completed`` that are set."""
        array = self._array("completed")
        if self._location.folder is None and set(array.chunks) == {1}:
            # An object is written whole or not at all, and only for a flag that is set: one
            # listing says what a request for each unit would.
            key = cast("Any", array.metadata).encode_chunk_key
            written = self._location.names(array.path)
            return {index for index in places if key((0, *index)) in written}
        done: set[Index] = set()
        for stretch in stretches(places):
            flags = self._read_flags(array, stretch)
            done.update(index for index, flag in zip(stretch, flags, strict=True) if flag)
        return done

    def _read_flags(self, completed: "zarr.Array[Any]", stretch: Sequence[Index]) -> list[bool]:
        """Flags of a stretch of places; one that was cut off while it was written is not set."""
        try:
            found = completed[0, *box_of(stretch)]
        except DAMAGED:
            if self._location.folder is None:
                raise
            if len(stretch) == 1:
                return [False]
            return [flag for index in stretch for flag in self._read_flags(completed, [index])]
        return np.asarray(found, dtype=bool).ravel().tolist()

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
        rows: dict[str, list[tuple[Unit, NDArray[Any]]]] = {}
        for unit, values in measured:
            for name, value in {"seconds": np.asarray(seconds), **values}.items():
                rows.setdefault(name, []).append((unit, value))
        parts = [part for name, of_name in rows.items() for part in self._parts(name, of_name)]
        if self._location.folder is None:
            with ThreadPoolExecutor(_REQUESTS_AT_A_TIME) as pool:  # each waits for a server
                list(pool.map(lambda part: write_chunks(*part), parts))
        else:
            for part in parts:
                write_chunks(*part)
        self._location.flush()
        flags = [(unit, np.asarray(True)) for unit, _ in measured]  # noqa: FBT003
        for part in self._parts("completed", flags):
            write_chunks(*part)

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
        array = self._array(name)
        axes = _axes(array)
        placed = [axis for axis in axes if axis in units[0].place]
        if not placed:  # of a run's only unit
            return [np.asarray(array[0])] * len(units)
        indices = [self._index(array, unit) for unit in units]
        found: dict[Index, NDArray[Any]] = {}
        for stretch in stretches(indices):
            box = dict(zip(placed, box_of(stretch), strict=True))
            region = (0, *(box.get(axis, slice(None)) for axis in axes))
            values = np.asarray(array[region])
            values = np.moveaxis(values, [axes.index(axis) for axis in placed], range(len(placed)))
            rows = values.reshape(len(stretch), *values.shape[len(placed) :])
            found |= {index: rows[row, ...] for row, index in enumerate(stretch)}
        return [found[index] for index in indices]

    def unit_bytes(self) -> int:
        """About what a unit takes when it is read, texts aside."""
        return sum(self._array(name).nbytes for name in self.attrs["variables"]) // len(self)

    def labels(self, axis: str) -> list[Label]:
        """The labels of a dimension, in their order."""
        return list(np.asarray(self._array(axis)[...]).tolist())

    def axes(self, name: str) -> tuple[str, ...]:
        """The dimensions of an array after ``model``."""
        return _axes(self._array(name))

    def _parts(self, name: str, rows: Sequence[tuple[Unit, NDArray[Any]]]) -> Iterator[_Part]:
        """Where in one array units are written, and what: neighbours are one part."""
        array = self._array(name)
        axes = _axes(array)
        placed = [axis for axis in axes if axis in rows[0][0].place]
        own = [axis for axis in axes if axis not in placed]
        if not placed:  # of a run's only unit
            yield array, tuple(map(slice, array.shape)), np.asarray(rows[0][1])[None]
            return
        values = {self._index(array, unit): value for unit, value in rows}
        for stretch in stretches(values):
            stacked = np.stack([values[index] for index in stretch])
            sizes = dict(zip((placed[-1], *own), stacked.shape, strict=True))
            order = [[*sizes].index(axis) for axis in axes if axis in sizes]
            box = dict(zip(placed, box_of(stretch), strict=True))
            region = (slice(1), *(box.get(axis, slice(None)) for axis in axes))
            shape = [1, *(sizes.get(axis, 1) for axis in axes)]
            yield array, region, stacked.transpose(order).reshape(shape)

    def _index(self, array: "zarr.Array[Any]", unit: Unit) -> Index:
        """Where a unit stands in an array, on those dimensions that it has a place on."""
        place = unit.place
        return tuple(self._index_of(axis)[place[axis]] for axis in _axes(array) if axis in place)

    def _index_of(self, axis: str) -> dict[Label, int]:
        """Where each label stands in this group: the order of the plan when it was allocated."""
        if axis not in self._order:
            labels = np.asarray(self._array(axis)[...]).tolist()
            self._order[axis] = {label: index for index, label in enumerate(labels)}
        return self._order[axis]

    def arrays(self) -> dict[str, "zarr.Array[Any]"]:
        """Its arrays, labels and units alike."""
        return {str(name): array for name, array in self._group.arrays()}

    def notes(self, of: str, but: Iterable[str] = ()) -> dict[str, Mapping[str, Any]]:
        """What a sub-group's groups say, by name: those of ``sessions`` or ``jobs``."""
        groups = subgroups(self._group, of, but=frozenset(but))
        return {name: dict(group.attrs) for name, group in groups}

    def note(self, of: str, name: str, attrs: Mapping[str, Any]) -> None:
        """Write such a note, in one piece and a sub-group of its own: writers never meet."""
        put_group(require_group(self._group, of), name, attrs)

    def seconds(self) -> NDArray[np.floating]:
        """How long its units took; NaN of those that are not complete."""
        return np.asarray(self._array("seconds")[...])

    def sessions(self, but: Iterable[str] = ()) -> dict[str, Mapping[str, Any]]:
        """What the processes that compute, or computed, units of this run say of themselves.

        Args:
            but: names of sessions to leave out.
        """
        return self.notes("sessions", but)

    def _array(self, name: str) -> zarr.Array[Any]:
        if name not in self._arrays:
            with _chunks_together():
                self._arrays[name] = cast("zarr.Array[Any]", self._group[name])
        return self._arrays[name]


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


def open_root(store: str | Path) -> zarr.Group | None:
    """The root of a store for reading; None where there is no Zarr store."""
    return location_of(store).open_root()


def _subgroup(group: zarr.Group, name: str) -> zarr.Group | None:
    """A group in a group; None where there is none, or its metadata were cut off."""
    try:
        found = group[name]
    except (KeyError, *DAMAGED):
        return None
    return found if isinstance(found, zarr.Group) else None


def subgroups(
    group: zarr.Group, *path: str, but: Collection[str] = ()
) -> Iterator[tuple[str, zarr.Group]]:
    """The groups in a group, or in one below it, by name; without any whose metadata are gone.

    Args:
        group: a group.
        *path: names of groups from there.
        but: names to leave out, unread on a disk.
    """
    parent: zarr.Group | None = group
    for name in path:
        parent = _subgroup(parent, name) if parent is not None else None
    if parent is None:
        return
    if not isinstance(parent.store, LocalStore):
        yield from sorted(found for found in parent.groups() if found[0] not in but)
        return
    # On a disk there may be metadata that were cut off, and unfinished files.
    for metadata in sorted((parent.store.root / parent.path).glob("*/zarr.json")):
        name = metadata.parent.name
        if name not in but and (found := _subgroup(parent, name)) is not None:
            yield name, found


def is_allocated(group: zarr.Group) -> bool:
    """Whether everything but units has been written: ``completed`` is created last."""
    try:
        return "completed" in group and "identity" in group.attrs
    except ValueError:
        return False


def open_group(store: str | Path, path: str, mode: Literal["r", "a"]) -> zarr.Group | None:
    """A group of a store by its path; to write (``a``) it is made, to read it may be None."""
    names = path.split("/") if path else []
    if mode == "a":
        made = location_of(store).open_for_writing()
        for name in names:
            made = require_group(made, name)
        return made
    group = open_root(store)
    for name in names:
        group = _subgroup(group, name) if group is not None else None
    return group


def require_group(parent: zarr.Group, name: str) -> zarr.Group:
    """A group in a group, created unless it is there: another process may be faster."""
    try:
        return parent.require_group(name)
    except ContainsGroupError:
        return cast("zarr.Group", parent[name])


def put_group(parent: zarr.Group, name: str, attributes: Mapping[str, Any]) -> None:
    """Write a group that is its attributes, in one piece: nobody ever sees it without them."""
    found = _subgroup(parent, name)
    if found is None:
        # There is nothing, or metadata that were cut off.
        parent.create_group(name, attributes=dict(attributes), overwrite=True)
    else:
        found.attrs.put(dict(attributes))


def require_arrays(
    group: zarr.Group, wanted: Mapping[str, ArrayV3Metadata]
) -> dict[str, "zarr.Array[Any]"]:
    """Arrays of a group, created unless they are there: another process may be at it too."""
    found: dict[str, zarr.Array[Any]] = {}
    with _chunks_together():
        while missing := {name: wanted[name] for name in wanted if name not in found}:
            try:
                found |= cast("Any", dict(group.create_hierarchy(cast("Any", missing))))
            except ContainsArrayError:
                found |= {name: cast("Any", group[name]) for name in missing if name in group}
    return found


def _chunks_together() -> AbstractContextManager[Any]:
    """Arrays opened in this context encode and read a batch of units at once.

    A unit is a chunk, and zarr otherwise has several tasks for each.
    """
    return zarr.config.set({"codec_pipeline.batch_size": _CHUNKS_AT_A_TIME})
