"""Variables of a result for a page: their numbers and texts, whole or in blocks of units.

A small variable is one piece, of which the page takes medians and quartiles itself. A large one
has its summaries over units beside it, made here, and its numbers in blocks that the page inflates
where somebody asks for single units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from persona_nns.report.blobs import Blobs
from persona_nns.results.measured import is_count, is_truth, measured_values

if TYPE_CHECKING:
    import xarray as xr

# Bytes of numbers, and characters of texts, that are one piece; and what a block of more has.
_WHOLE, _BLOCK = 2**20, 2**18
# What the store notes of the making of units.
BOOKKEEPING = ("seconds", "completed")
# A dimension that nobody looks at label by label.
_WIDTH = "d_model"


def numeric_variables(results: xr.Dataset) -> list[str]:
    """The variables that can be drawn."""
    return [
        str(name)
        for name, array in results.data_vars.items()
        if array.dtype.kind in "fib" and name not in BOOKKEEPING
    ]


def text_variables(results: xr.Dataset) -> list[str]:
    """The variables that can be read."""
    return [str(name) for name, array in results.data_vars.items() if array.dtype.kind == "O"]


def describe_numbers(
    results: xr.Dataset, name: str, blobs: Blobs, layers: Sequence[int] | None = None
) -> dict[str, Any]:
    """A variable of numbers, of one model: what it is, and where its values are.

    Of one that is as wide as the model, the length of each vector.

    Args:
        results: of one run.
        name: the variable.
        blobs: takes the values.
        layers: that were asked for, of a variable that has no others.
    """
    array = measured_values(results, name).isel(model=0, drop=True)
    is_wide = _WIDTH in array.dims
    if is_wide:
        squares = (array.astype(float) ** 2).sum(_WIDTH, skipna=False)
        array = (squares**0.5).assign_attrs(array.attrs)
    values = as_small(array.values)
    said = {
        **_described(array, name),
        "kind": "bool"
        if is_truth(results[name])
        else "int"
        if is_count(results[name])
        else "float",
        "wide": is_wide,
        "dtype": values.dtype.name,
        "measured": int(np.isfinite(values).sum()),
        "size": int(values.size),
    }
    if layers is not None and "layer" in array.dims:
        others = [layer for layer in array["layer"].values.tolist() if layer not in layers]
        said["absent"] = {"layer": others}
    along = _chunked(results, array, values.nbytes)
    if along is None:
        return {**said, "blob": blobs.add_numbers(values)}
    axis = array.dims.index(along)
    summaries = {
        by: blobs.add_numbers(_summary(values, axis, members, truth=said["kind"] == "bool"))
        for by, members in _groups(results, along).items()
    }
    each = max(1, _BLOCK * values.shape[axis] // values.nbytes)
    numbers: list[int] | None = None
    if not blobs.is_full:
        numbers = [
            blobs.add_numbers(np.take(values, range(*block), axis=axis))
            for block in _blocks(values.shape[axis], each)
        ]
    return {**said, "along": along, "each": each, "blobs": numbers, "summaries": summaries}


def describe_texts(results: xr.Dataset, name: str, blobs: Blobs) -> dict[str, Any]:
    """A variable of texts, of one model: what it is, and where they are; each text stands once."""
    array = results[name].isel(model=0, drop=True)
    values = np.asarray(array.values, dtype=object)
    lengths = np.array([len(text) for text in values.ravel() if text])
    said = {
        **_described(array, name),
        "kind": "text",
        "measured": len(lengths),
        "size": int(values.size),
        "length": float(lengths.mean()) if len(lengths) else 0.0,
    }
    along = _chunked(results, array, int(lengths.sum()))
    if along is None:
        return {**said, "blob": blobs.add_json(_table(values))}
    axis = array.dims.index(along)
    each = max(1, _BLOCK * values.shape[axis] // max(int(lengths.sum()), 1))
    pieces = [
        blobs.add_json(_table(np.take(values, range(*block), axis=axis)))
        for block in _blocks(values.shape[axis], each)
    ]
    return {**said, "along": along, "each": each, "blobs": pieces}


def as_small(values: NDArray[Any]) -> NDArray[Any]:
    """The same numbers in 32 bits, where that changes none."""
    small = values.astype(np.float32)
    return small if np.array_equal(small, values, equal_nan=True) else values.astype(np.float64)


def _described(array: xr.DataArray, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "dims": [str(dim) for dim in array.dims],
        "long_name": str(array.attrs.get("long_name", name)),
        "units": str(array.attrs.get("units", "1")),
        "description": str(array.attrs.get("description", "")),
    }


def _chunked(results: xr.Dataset, array: xr.DataArray, size: int) -> str | None:
    """The dimension along which a large variable is cut: that of the units with most labels."""
    units = [str(dim) for dim in array.dims if dim in results["completed"].dims]
    if size <= _WHOLE or not units:
        return None
    return max(units, key=lambda dim: array.sizes[dim])


def _blocks(n: int, each: int) -> list[tuple[int, int]]:
    return [(start, min(start + each, n)) for start in range(0, n, each)]


def _groups(results: xr.Dataset, along: str) -> Mapping[str, Sequence[NDArray[np.intp]]]:
    """The labels of a dimension that are summarised together: all, and those of a persona or task.

    By the name of the coordinate that tells them apart; "" tells none.
    """
    every = np.arange(results.sizes[along])
    groups: dict[str, Sequence[NDArray[np.intp]]] = {"": [every]}
    for name in ("persona", "task"):
        if name in results.coords and results[name].dims == (along,):
            labels = np.asarray(results[name].values)
            groups[name] = [every[labels == each] for each in dict.fromkeys(labels.tolist())]
    return groups


def _summary(
    values: NDArray[Any], axis: int, groups: Sequence[NDArray[np.intp]], *, truth: bool
) -> NDArray[Any]:
    """Median, quartiles and count over the labels of each group: [4, group, other dims].

    Of truth values, the mean in place of the median.
    """
    found: list[NDArray[Any]] = []
    for members in groups:
        of_group = np.take(values, members, axis=axis).astype(float)
        of_group[~np.isfinite(of_group)] = np.nan
        counted = np.isfinite(of_group).sum(axis=axis)
        with np.errstate(invalid="ignore"):
            ordered = _quantiles(np.sort(of_group, axis=axis), counted, axis)
            mean = np.nansum(of_group, axis=axis) / counted
        middle = [mean, *ordered[1:]] if truth else ordered
        found.append(np.stack([*middle, counted.astype(float)]))
    return np.stack(found, axis=1)


def _quantiles(ordered: NDArray[Any], counted: NDArray[Any], axis: int) -> list[NDArray[Any]]:
    """Median, lower and upper quartile of sorted numbers with NaN last, between two by weight."""
    found: list[NDArray[Any]] = []
    for share in (0.5, 0.25, 0.75):
        place = share * np.maximum(counted - 1, 0)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, np.maximum(counted - 1, 0))
        below, above = (
            np.take_along_axis(ordered, np.expand_dims(k, axis), axis).squeeze(axis)
            for k in (low, high)
        )
        found.append(below + (place - low) * (above - below))
    return found


def _table(values: NDArray[Any]) -> dict[str, Any]:
    """Texts, each once, and which of them stands where."""
    flat = ["" if text is None else str(text) for text in values.ravel()]
    number = {text: k for k, text in enumerate(dict.fromkeys(flat))}
    return {"texts": [*number], "at": [number[text] for text in flat]}
