"""How an array of a store lies on the disk: its metadata, its codecs, its chunks.

A chunk is one unit, or in a large grid a block of neighbours: its bytes, compressed by zstd with a
checksum that tells a chunk that was cut off. A large unit is a shard, cut by layer and position
inside.

zarr 3 has a coroutine and two threads for a chunk, which take several times as long as what they do
with an array of a few hundred bytes. Chunks on a local disk are therefore encoded and decoded here,
to and from the same bytes, one after another.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import zarr
from numcodecs import VLenUTF8
from numcodecs.zstd import Zstd
from numpy.typing import NDArray
from zarr.core.buffer import default_buffer_prototype
from zarr.core.metadata.v3 import ArrayV3Metadata
from zarr.storage import LocalStore

from persona_nns.declarations.variables import FILL, Kind

_DATA_TYPES: dict[Kind, str] = {
    "float": "float32",
    "int": "int64",
    "bool": "bool",
    "text": "string",
}
# A unit that is larger than this is cut by layer and position inside its chunk.
_LARGE_UNIT = 2**20
# A chunk of several units is no larger than this: it is read and written again for each batch.
_LARGE_CHUNK = 2**22
_ZSTD = Zstd(level=0, checksum=True)
_STRINGS = VLenUTF8()


def _codecs(kind: Kind) -> list[dict[str, Any]]:
    if kind == "text":
        first: dict[str, Any] = {"name": "vlen-utf8"}
    elif kind == "bool":
        first = {"name": "bytes"}
    else:
        first = {"name": "bytes", "configuration": {"endian": "little"}}
    return [first, {"name": "zstd", "configuration": {"level": 0, "checksum": True}}]


def unit_array(
    kind: Kind,
    axes: Sequence[str],
    sizes: Mapping[str, int],
    placed: frozenset[str],
    attributes: Mapping[str, Any],
    per_chunk: Mapping[str, int] | None = None,
) -> ArrayV3Metadata:
    """Metadata of an array that units are written to.

    Args:
        kind: what it holds.
        axes: its dimensions after ``model``.
        sizes: of each of them.
        placed: the dimensions that a unit has a place on; the others are its own.
        attributes: of the array.
        per_chunk: how many units a chunk holds along a dimension, at most; by default one.
    """
    unit = [1 if axis in placed else sizes[axis] for axis in axes]
    codecs = _codecs(kind)
    n_bytes = 8 * math.prod(unit)
    chunk = [
        _fitting(per_chunk[axis], n_bytes) if per_chunk and axis in per_chunk else size
        for axis, size in zip(axes, unit, strict=True)
    ]
    if kind != "text" and n_bytes > _LARGE_UNIT:
        inner = (
            1 if axis in ("layer", "position") else size
            for axis, size in zip(axes, unit, strict=True)
        )
        codecs = [_sharding([1, *inner], codecs)]
    shape = [1, *(sizes[axis] for axis in axes)]
    return _metadata(
        _DATA_TYPES[kind], shape, [1, *chunk], FILL[kind], codecs, ("model", *axes), attributes
    )


def _fitting(most: int, n_bytes: int) -> int:
    """How many units a chunk holds: a divisor, so that no chunk belongs to two blocks."""
    if n_bytes > _LARGE_UNIT:
        return 1
    fits = (size for size in range(most, 1, -1) if most % size == 0)
    return next((size for size in fits if size * n_bytes <= _LARGE_CHUNK), 1)


def label_array(
    kind: Kind, axes: Sequence[str], shape: Sequence[int], attributes: Mapping[str, Any]
) -> ArrayV3Metadata:
    """Metadata of an array of labels, which is one chunk.

    Args:
        kind: what it holds.
        axes: all its dimensions.
        shape: their sizes.
        attributes: of the array.
    """
    data_type = "float64" if kind == "float" else _DATA_TYPES[kind]
    fill: dict[Kind, Any] = {"float": 0.0, "int": 0, "bool": False, "text": ""}
    return _metadata(data_type, shape, shape, fill[kind], _codecs(kind), axes, attributes)


def _metadata(
    data_type: str,
    shape: Sequence[int],
    chunk: Sequence[int],
    fill: float | str,
    codecs: Sequence[Mapping[str, Any]],
    axes: Sequence[str],
    attributes: Mapping[str, Any],
) -> ArrayV3Metadata:
    document: dict[str, Any] = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        # One folder an array, rather than one for each index of a chunk.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": "NaN" if isinstance(fill, float) and math.isnan(fill) else fill,
        "codecs": list(codecs),
        "dimension_names": list(axes),
        "attributes": dict(attributes),
    }
    return ArrayV3Metadata.from_dict(document)


def _sharding(inner: Sequence[int], codecs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    return {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": list(inner),
            "codecs": list(codecs),
            "index_codecs": index,
            "index_location": "end",
        },
    }


# What `write_chunks` encodes.
_PLAIN = [label_array(kind, ["label"], [1], {}).codecs for kind in FILL]


def write_chunks(array: "zarr.Array[Any]", region: tuple[slice, ...], values: NDArray[Any]) -> None:
    """Write whole chunks.

    Args:
        array: as `unit_array` or `label_array` describe it.
        region: where, a stretch of each dimension; it begins and ends where chunks do.
        values: what, of the region's shape.

    Raises:
        ValueError: the region is not of whole chunks.
    """
    metadata, store = cast("Any", array.metadata), array.store
    if not isinstance(store, LocalStore) or metadata.codecs not in _PLAIN:
        array[region] = values
        return
    for place, block in _chunks(array, region, values):
        if block.shape != array.chunks:
            raise ValueError(f"{block.shape} of {array.path} is no chunk of {array.chunks}.")
        key = f"{array.path}/{metadata.encode_chunk_key(place)}"
        if _is_fill(block, array.fill_value):
            store.delete_sync(key)  # nothing stands for what the array is filled with
        else:
            store.set_sync(key, _encode(block, np.dtype(array.dtype)))


def _chunks(
    array: "zarr.Array[Any]", region: tuple[slice, ...], values: NDArray[Any]
) -> Iterator[tuple[tuple[int, ...], NDArray[Any]]]:
    """The chunks of a region: the place of each on the grid of chunks, and what it holds."""
    edges = [
        range(*stretch.indices(size)[:2], chunk)
        for stretch, size, chunk in zip(region, array.shape, array.chunks, strict=True)
    ]
    for corner in itertools.product(*edges):
        inside = tuple(
            slice(start - edge.start, start - edge.start + edge.step)
            for start, edge in zip(corner, edges, strict=True)
        )
        place = tuple(start // edge.step for start, edge in zip(corner, edges, strict=True))
        yield place, values[inside]


def chunk_shape(array: "zarr.Array[Any]") -> tuple[int, ...]:
    """The shape of what one file holds: of a sharded array, a shard."""
    return cast("Any", array.metadata).chunk_grid.chunk_shape


def chunk_files(array: "zarr.Array[Any]") -> Callable[[tuple[int, ...]], str] | None:
    """The file of a chunk by its place on the grid of chunks; None where there are no such files.

    Args:
        array: of a store; in one on this disk that is no array of shards, chunks are read and
            written here.
    """
    metadata, store = cast("Any", array.metadata), array.store
    if not isinstance(store, LocalStore) or metadata.codecs not in _PLAIN:
        return None
    folder, key = store.root / array.path, metadata.encode_chunk_key
    return lambda place: f"{folder}/{key(place)}"


def read_chunk(array: "zarr.Array[Any]", file: str) -> NDArray[Any]:
    """What a chunk holds; texts as objects.

    Args:
        array: of the chunk.
        file: of `chunk_files`.

    Raises:
        RuntimeError, ValueError, OSError: it was cut off.
    """
    dtype = np.dtype(array.dtype)
    try:
        stored = _read(file)
    except FileNotFoundError:
        return np.full(
            chunk_shape(array), array.fill_value, dtype if dtype.kind in "biuf" else object
        )
    raw = _ZSTD.decode(stored)
    if dtype.kind in "biuf":
        return np.frombuffer(raw, dtype.newbyteorder("<")).reshape(chunk_shape(array))
    return np.asarray(_STRINGS.decode(raw), dtype=object).reshape(chunk_shape(array))


def _read(file: str) -> bytes:
    with open(file, "rb", buffering=0) as stream:
        return stream.read()


def encode_chunk(array: "zarr.Array[Any]", chunk: NDArray[Any]) -> bytes | None:
    """The bytes of a chunk's file; None where there is to be none, for it is as if nothing was."""
    if _is_fill(chunk, array.fill_value):
        return None
    return _encode(chunk, np.dtype(array.dtype)).to_bytes()


def _is_fill(block: NDArray[Any], fill: Any) -> bool:
    same = np.isnan(block) if fill != fill else block == fill
    return bool(np.all(same))


def _encode(block: NDArray[Any], dtype: np.dtype[Any]) -> Any:
    if dtype.kind in "biuf":
        raw: Any = np.ascontiguousarray(block, dtype=dtype.newbyteorder("<"))
    else:
        raw = _STRINGS.encode(block.astype(object).ravel())
    return default_buffer_prototype().buffer.from_bytes(_ZSTD.encode(raw))
