"""Chunks that hold a block of units: how large they are, and how one of their units is written.

To write a unit is to read the chunks of its block, and to put others in their place. So that no
unit is lost where processes write into one block at once, they do so one after the other: whoever
writes holds a lock of the block (a file in the folder of ``completed``, which stays there, empty).
A chunk takes the place of the one before only once it has reached the disk, and ``completed`` comes
after all others: whatever cuts a process off, what was complete before is there, and right.

A store at a URL has no such lock. There a chunk is one unit, unless a whole run was copied there.
"""

import itertools
import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from persona_nns.errors import PersonaError
from persona_nns.results.chunks import (
    chunk_files,
    chunk_shape,
    encode_chunk,
    read_chunk,
    write_chunks,
)
from persona_nns.results.groups import DAMAGED

# Up to so many units have a file each in every array; more share files, this many at a time or
# more, so that there are no more files than that.
_SMALL = 1000
_FEWEST = 64
_FILES = 6000
#: How files to lock are called.
LOCK = ".lock"
_LOCKS = 64  # there are so many; blocks share them
_POLL = 0.005  # seconds between two tries to take a lock
_PATIENCE = 300.0  # seconds; a block is written in some milliseconds

# Part of an array: the array, where, and what.
Part = tuple["zarr.Array[Any]", tuple[slice, ...], NDArray[Any]]


def default_per_chunk(sizes: Sequence[int], n_arrays: int) -> int:
    """How many units a chunk holds along the first dimension of ``completed``.

    Args:
        sizes: of the dimensions of ``completed``.
        n_arrays: that units are written to.
    """
    first, others = sizes[0], math.prod(sizes[1:])
    if first * others <= _SMALL:
        return 1
    per_chunk = min(_FEWEST, 2 ** (first.bit_length() - 1))
    while per_chunk < first and n_arrays * others * math.ceil(first / per_chunk) > _FILES:
        per_chunk *= 2
    return per_chunk


def read_region(array: "zarr.Array[Any]", region: Sequence[slice]) -> NDArray[Any]:
    """What stands in a part of an array, texts as objects.

    Args:
        array: of a store.
        region: a stretch of each dimension.

    Raises:
        RuntimeError, ValueError, OSError: a chunk was cut off.
    """
    bounds = [part.indices(size)[:2] for part, size in zip(region, array.shape, strict=True)]
    edges = chunk_shape(array)
    if (files := chunk_files(array)) is None:
        found = np.asarray(array[tuple(region)])
        return found.astype(object) if found.dtype.kind == "T" else found
    dtype = np.dtype(array.dtype)
    shape = [stop - start for start, stop in bounds]
    values = np.empty(shape, dtype if dtype.kind in "biuf" else object)
    for place in _places(bounds, edges):
        inside, outside = _overlap(place, edges, bounds)
        values[outside] = read_chunk(array, files(place))[inside]
    return values


def write_parts(
    parts: Iterable[Part], flush: Callable[[], object], *, in_damaged: bool = False
) -> None:
    """Write parts of chunks in a folder, and leave the rest of each chunk as it is.

    To be called by whoever holds the lock of what is written (`alone`).

    Args:
        parts: what to write.
        flush: waits until what was written has reached the disk.
        in_damaged: a chunk that cannot be read holds nothing that is needed.

    Raises:
        PersonaError: a chunk cannot be read.
        OSError: the disk is full, say.
    """
    chunks: dict[str, tuple[zarr.Array[Any], NDArray[Any]]] = {}
    for array, region, values in parts:
        if (files := chunk_files(array)) is None:  # a shard, which is one unit
            write_chunks(array, region, values)
            continue
        bounds = [part.indices(size)[:2] for part, size in zip(region, array.shape, strict=True)]
        edges = chunk_shape(array)
        for place in _places(bounds, edges):
            file = files(place)
            if file not in chunks:
                chunks[file] = array, _read_to_write(array, file, in_damaged=in_damaged)
            inside, outside = _overlap(place, edges, bounds)
            chunks[file][1][inside] = values[outside]
    staged = {file: _stage(file, encode_chunk(*of)) for file, of in chunks.items()}
    flush()
    for file, written in staged.items():
        if written is None:
            Path(file).unlink(missing_ok=True)
        else:
            os.replace(written, file)


def _read_to_write(array: "zarr.Array[Any]", file: str, *, in_damaged: bool) -> NDArray[Any]:
    """A chunk to be changed."""
    try:
        return read_chunk(array, file).copy()
    except DAMAGED as error:
        if not in_damaged:
            raise PersonaError(
                f"The chunk {file!r} holds complete cells and cannot be read ({error}); "
                "`persona-nns verify` says what is wrong with the run."
            ) from error
        return np.full(
            chunk_shape(array),
            array.fill_value,
            array.dtype if array.dtype.kind in "biuf" else object,
        )


def _stage(file: str, held: bytes | None) -> str | None:
    """Write what is to take a chunk's place, beside it; None where nothing is."""
    if held is None:
        return None
    path = f"{file}.{secrets.token_hex(8)}.partial"
    with open(path, "wb") as stream:
        stream.write(held)
    return path


def _places(bounds: Sequence[tuple[int, int]], edges: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The chunks that a region touches, by their places on the grid of chunks."""
    return itertools.product(
        *(
            range(start // edge, -(-stop // edge))
            for (start, stop), edge in zip(bounds, edges, strict=True)
        )
    )


def _overlap(
    place: Sequence[int], edges: Sequence[int], bounds: Sequence[tuple[int, int]]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """What a chunk and a region share, as a part of the one and of the other."""
    inside: list[slice] = []
    outside: list[slice] = []
    for index, edge, (start, stop) in zip(place, edges, bounds, strict=True):
        first, last = max(start, index * edge), min(stop, (index + 1) * edge)
        inside.append(slice(first - index * edge, last - index * edge))
        outside.append(slice(first - start, last - start))
    return tuple(inside), tuple(outside)


@contextmanager
def alone(folder: Path, block: int) -> Iterator[None]:
    """While this holds, no other process, and no other thread, writes into a block.

    Args:
        folder: of the array ``completed``.
        block: the number of the block.

    Raises:
        PersonaError: another process holds it for very long.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / f"{block % _LOCKS}{LOCK}", timeout=_PATIENCE, poll_interval=_POLL)
    try:
        lock.acquire()
    except Timeout as error:
        raise PersonaError(
            f"Another process has been writing into {str(folder.parent)!r} for {_PATIENCE:.0f} s; "
            "if it is stopped, let it go on or end it, and start this command again."
        ) from error
    try:
        yield
    finally:
        lock.release()
