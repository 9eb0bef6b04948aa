"""Groups in a store's hierarchy: found by their path, made by whoever comes first.

Any number of processes may make one group at once, and on a disk there may be metadata that were
cut off, and unfinished files.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, cast

import zarr
from zarr.core.metadata.v3 import ArrayV3Metadata
from zarr.errors import ContainsArrayError, ContainsGroupError
from zarr.storage import LocalStore

from persona_nns.results.locations import Location, location_of

_CHUNKS_AT_A_TIME = 64
_REQUESTS_AT_A_TIME = 8
# What reading a chunk raises that was cut off, whichever codec notices it.
DAMAGED = (RuntimeError, ValueError, OSError)


def open_root(store: str | Path) -> zarr.Group | None:
    """The root of a store for reading; None where there is no Zarr store."""
    return location_of(store).open_root()


def subgroup(group: zarr.Group, name: str) -> zarr.Group | None:
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
        parent = subgroup(parent, name) if parent is not None else None
    if parent is None:
        return
    if not isinstance(parent.store, LocalStore):
        yield from sorted(found for found in parent.groups() if found[0] not in but)
        return
    # On a disk there may be metadata that were cut off, and unfinished files.
    for metadata in sorted((parent.store.root / parent.path).glob("*/zarr.json")):
        name = metadata.parent.name
        if name not in but and (found := subgroup(parent, name)) is not None:
            yield name, found


def read_notes(
    group: zarr.Group, location: Location, of: str, but: Iterable[str]
) -> dict[str, Mapping[str, Any]]:
    """What the groups in a group of a group say, by name.

    Args:
        group: of a run.
        location: of its store.
        of: which group in it.
        but: names to leave out, unread.
    """
    parent = subgroup(group, of)
    if parent is None:
        return {}
    names = sorted(location.names(parent.path) - {*but, "zarr.json"})
    if location.folder is not None or len(names) < 2:
        found = [subgroup(parent, name) for name in names]
    else:
        with ThreadPoolExecutor(_REQUESTS_AT_A_TIME) as pool:  # each waits for a server
            found = list(pool.map(lambda name: subgroup(parent, name), names))
    pairs = zip(names, found, strict=True)
    return {name: dict(group.attrs) for name, group in pairs if group is not None}


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
        group = subgroup(group, name) if group is not None else None
    return group


def require_group(parent: zarr.Group, name: str) -> zarr.Group:
    """A group in a group, created unless it is there: another process may be faster."""
    try:
        return parent.require_group(name)
    except ContainsGroupError:
        return cast("zarr.Group", parent[name])


def put_group(parent: zarr.Group, name: str, attributes: Mapping[str, Any]) -> None:
    """Write a group that is its attributes, in one piece: nobody ever sees it without them."""
    found = subgroup(parent, name)
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
    with chunks_together():
        while missing := {name: wanted[name] for name in wanted if name not in found}:
            try:
                found |= cast("Any", dict(group.create_hierarchy(cast("Any", missing))))
            except ContainsArrayError:
                found |= {name: cast("Any", group[name]) for name in missing if name in group}
    return found


def chunks_together() -> AbstractContextManager[Any]:
    """Arrays opened in this context encode and read a batch of units at once.

    A unit is a chunk, and zarr otherwise has several tasks for each.
    """
    return zarr.config.set({"codec_pipeline.batch_size": _CHUNKS_AT_A_TIME})
