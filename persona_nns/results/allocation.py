"""A run's group allocated whole, before anything is measured.

Whoever allocates writes the same bytes to the same place, so any number of processes may do it at
once, and finish what one that was cut off has left. Only when a run was made, and in which session,
is each one's own: the first says it, and what it says stays. (Of those that come within the same
few milliseconds, one; which is settled before any unit is written.)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from persona_nns.declarations.variables import Kind
from persona_nns.errors import PersonaError, UsageError
from persona_nns.results.block import Block, bookkeeping
from persona_nns.results.blocks import default_per_chunk
from persona_nns.results.chunks import label_array, unit_array, write_chunks
from persona_nns.results.groups import is_allocated, open_group, require_arrays, require_group
from persona_nns.results.locations import Location, location_of
from persona_nns.results.shown_prompts import has_shown, write_shown
from persona_nns.results.store import RunGroup, find_group

# What labels stand for, where their dimension's name does not say it.
_NAMES = {"cell": "persona/task"}
# What a run's group says of who allocated it.
_OF_THE_FIRST = ("created", "session")


def attach(store: str | Path, block: Block) -> RunGroup:
    """Open a run's group, allocating whatever of it is not there yet.

    Raises:
        PersonaError: the store cannot be written, or the group is another run's.
        UsageError: its chunks hold another number of units than was asked for.
    """
    location = location_of(store)
    try:
        location.discard_damaged_metadata(f"{block.experiment}/{block.run}")
        group = location.open_for_writing()
        for name in (block.experiment, *block.run.split("/")):
            group = require_group(group, name)
        arrays: dict[str, zarr.Array[Any]] = {}
        if not (is_allocated(group) and all(name in group for name in block.variables)):
            arrays = _allocate(group, block, location)
        elif block.plan.shown and not has_shown(group):  # allocated before prompts were kept
            write_shown(group, block.plan.shown)
    except OSError as error:
        raise PersonaError(f"The store {str(store)!r} cannot be written: {error}.") from error
    if group.attrs["identity"] != block.attrs["identity"]:
        raise PersonaError(
            f"The group {block.run!r} of {str(store)!r} holds another run; use another --store."
        )
    attached = RunGroup(group, location, arrays)
    _check_per_chunk(attached, block, location)
    return attached


def check_per_chunk(store: str | Path, block: Block) -> None:
    """See that a run can be written in chunks of as many units as it has, or as were asked for.

    Raises:
        UsageError: its chunks hold another number of units; or they hold several, and the store is
            no folder.
    """
    location, asked = location_of(store), block.per_chunk
    group = find_group(store, block.experiment, block.run)
    if group is not None:
        _check_per_chunk(group, block, location)
    elif location.folder is None and asked not in (None, 1):
        raise UsageError(
            f"Chunks of {asked} {block.plan.noun}s cannot be shared at the URL {location.shown!r}; "
            "leave out --cells-per-chunk, or run into a folder and `persona-nns push` that."
        )


def _check_per_chunk(group: RunGroup, block: Block, location: Location) -> None:
    asked, has, noun = _asked_per_chunk(block), group.per_chunk, block.plan.noun
    if asked not in (None, has):
        raise UsageError(
            f"The run {block.run!r} has {has} {noun}{'s' if has > 1 else ''} a chunk, and keeps to "
            f"that, not to {asked}; leave out --cells-per-chunk, or use another --store."
        )
    if location.folder is None and has > 1:
        raise UsageError(
            f"The run {block.run!r} has {has} {noun}s a chunk, which cannot be shared at the URL "
            f"{location.shown!r}; go on in a folder that it is merged into (persona-nns merge), "
            "and push that."
        )


def _asked_per_chunk(block: Block) -> int | None:
    """How many units a chunk is to hold, where that was said; no more than there are."""
    if block.per_chunk is None:
        return None
    return min(block.per_chunk, len(block.plan.axes[block.plan.unit_axes[0]]))


def units_per_chunk(store: str | Path, block: Block) -> int:
    """How many units a chunk of a run holds, or is to hold, along its first dimension."""
    group = find_group(store, block.experiment, block.run)
    if group is not None:
        return group.per_chunk
    return _asked_per_chunk(block) or _default(block, location_of(store))


def _default(block: Block, location: Location) -> int:
    if location.folder is None:
        return 1
    sizes = [len(block.plan.axes[axis]) for axis in block.plan.unit_axes]
    return default_per_chunk(sizes, len(block.variables) + len(bookkeeping(block.plan)))


def _allocate(group: zarr.Group, block: Block, location: Location) -> dict[str, "zarr.Array[Any]"]:
    """Write everything but units; returns the arrays that units are written to.

    What is there already is left as it is, or written again with the same bytes: another process
    may be at it too, and one that was cut off may have left any part of it.
    """
    described = _write_coordinates(group, block)
    # xarray finds coordinates that are no dimensions by this attribute.
    listing = {
        "variables": list(block.variables),
        "every_layer": [name for name, v in block.variables.items() if v.every_layer],
        "unmeasured": {
            name: v.unmeasured for name, v in block.variables.items() if v.unmeasured is not None
        },
        "coordinates": " ".join(described),
    }
    placed = block.plan.placed_axes
    if placed - set(block.plan.unit_axes):  # what tells which units write such a dimension
        listing["units"] = [dict(unit.place) for unit in block.plan.units]
    # Whoever began to allocate it made it: runs are listed by age, and their order stays.
    found = zarr.open_group(group.store, path=group.path, mode="r").attrs
    made = {name: found[name] for name in _OF_THE_FIRST if name in found}
    group.update_attributes({**block.attrs, **listing, **made})  # one write, not one for each
    require_group(group, "sessions")
    write_shown(group, block.plan.shown)
    every = {**block.variables, **bookkeeping(block.plan)}
    if "completed" in group:  # an array that an older run lacks is like its others
        per_chunk = RunGroup(group, location).per_chunk
    else:
        per_chunk = _asked_per_chunk(block) or _default(block, location)
    arrays = {
        name: unit_array(
            variable.kind,
            variable.axes,
            {axis: len(block.labels(variable, axis)) for axis in variable.axes},
            placed,
            {
                "long_name": variable.long_name,
                "units": variable.units,
                "description": variable.description,
            },
            {block.plan.unit_axes[0]: per_chunk},
        )
        for name, variable in every.items()
    }
    last = {"completed": arrays.pop("completed")}  # says that all the rest is there
    allocated = require_arrays(group, arrays)
    location.flush()
    return allocated | require_arrays(group, last)


def _write_coordinates(group: zarr.Group, block: Block) -> list[str]:
    """Write the labels; returns the names of those that are not dimensions."""
    depth = [layer / block.n_layers for layer in block.layers]
    coordinates: dict[str, tuple[tuple[str, ...], Any, Kind, str]] = {
        "model": (("model",), [block.model], "text", "model"),
        **{
            axis: ((axis,), labels, _kind(labels), _NAMES.get(axis, axis))
            for axis, labels in block.plan.axes.items()
        },
        **{
            name: ((axis,), labels, _kind(labels), name)
            for name, (axis, labels) in block.plan.coords.items()
        },
        "n_layers": (("model",), [block.n_layers], "int", "number of decoder blocks"),
        "precision": (("model",), [block.precision], "text", "precision of the model"),
    }
    axes = {axis for variable in block.variables.values() for axis in variable.axes}
    if "layer" in axes:
        coordinates["layer"] = (("layer",), block.layers, "int", "layer")
        coordinates["depth"] = (("model", "layer"), [depth], "float", "depth (layer / n_layers)")
    if "position" in axes:
        coordinates["position"] = (("position",), block.positions, "text", "position")
    for variable in block.variables.values():
        for axis in variable.coords:
            labels = variable.labels(axis)
            coordinates[axis] = ((axis,), labels, _kind(labels), axis)
    for name in block.variables:  # a dimension may be called as an array is: it has no labels
        coordinates.pop(name, None)
    labels = {
        name: np.asarray(values, dtype=object if kind == "text" else None)
        for name, (_, values, kind, _) in coordinates.items()
    }
    arrays = {
        name: label_array(kind, dims, labels[name].shape, {"long_name": long_name, "units": "1"})
        for name, (dims, _, kind, long_name) in coordinates.items()
    }
    for name, array in require_arrays(group, arrays).items():
        write_chunks(array, tuple(map(slice, array.shape)), labels[name])
    return [name for name, (dims, *_) in coordinates.items() if dims != (name,)]


def _kind(labels: Sequence[Any]) -> Kind:
    kinds: dict[type, Kind] = {str: "text", int: "int", float: "float"}
    return kinds[type(labels[0])]


def attach_copy(
    store: str | Path, path: str, original: RunGroup, attrs: Mapping[str, Any]
) -> RunGroup:
    """Open a group that is as another store's, allocating whatever of it is not there yet.

    Args:
        store: path or URL of the store.
        path: of the group in it.
        original: the group of the other store; its units are not copied.
        attrs: what the group is to say of itself.

    Raises:
        PersonaError: the store cannot be written, or the group is another run's.
    """
    location = location_of(store)
    units = {*original.attrs["variables"], "seconds", "completed"}
    try:
        location.discard_damaged_metadata(path)
        group = open_group(store, path, "a")
        assert group is not None
        if not is_allocated(group):
            arrays = original.arrays()
            described: dict[str, Any] = {name: each.metadata for name, each in arrays.items()}
            labels = {name: described[name] for name in described.keys() - units}
            for name, array in require_arrays(group, labels).items():
                array[...] = arrays[name][...]
            group.update_attributes(dict(attrs))
            require_arrays(group, {name: described[name] for name in units - {"completed"}})
            location.flush()
            require_arrays(group, {"completed": described["completed"]})
    except OSError as error:
        raise PersonaError(f"The store {str(store)!r} cannot be written: {error}.") from error
    if group.attrs["identity"] != attrs["identity"]:
        raise PersonaError(f"The group {path!r} of {str(store)!r} holds another run.")
    return RunGroup(group, location)
