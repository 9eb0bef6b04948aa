"""One run of a store as labelled arrays, opened lazily: what was measured, and NaN elsewhere.

A unit that is not complete reads as missing, whatever stands in its place: it may be half-written,
or cut off so that it cannot be read. Integers and truth values have no NaN; where some of one were
not measured it is read as floats, for a −1 or a False that only fills would enter means and rates.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing
from zarr.errors import ZarrUserWarning

from persona_nns.declarations.plans import Label, noun_of
from persona_nns.declarations.variables import FILL
from persona_nns.errors import PersonaError
from persona_nns.results.blocks import read_region
from persona_nns.results.chunks import chunk_shape
from persona_nns.results.groups import DAMAGED
from persona_nns.results.locations import Location
from persona_nns.results.store import RunGroup
from persona_nns.results.stretches import box_of, stretches

# Results up to this size are read when they are opened, larger ones as they are used.
_EAGER = 2**28
_KINDS = {"b": "bool", "i": "int"}


def open_run(location: Location, path: str, group: RunGroup) -> xr.Dataset:
    """The results of one run.

    Args:
        location: of the store.
        path: of the group in it.
        group: the same.

    Raises:
        PersonaError: the store is damaged.
    """
    # Flags first: a unit that is completed while the rest is read is not taken for complete.
    flags = group.flags()
    whole = _open_group(location, path)
    attrs, run = whole.attrs, path.partition("/")[2]
    names = [*attrs["variables"], "seconds", "completed"]
    if missing := [name for name in names if name not in whole]:
        raise PersonaError(
            f"The run {run!r} lacks the arrays {', '.join(missing)}: its store is damaged."
        )
    whole = whole[names]
    completed = whole["completed"].copy(deep=False, data=flags)
    units = attrs.get("units", [])
    complete = {
        name: _complete_only(whole[name], _done(completed, whole[name], units), group.array(name))
        for name in names[:-1]
    }
    dataset = whole.assign({**complete, "completed": completed})
    if dataset.nbytes > _EAGER:
        chunks = {
            name: dict(zip(array.dims, whole[name].encoding["chunks"], strict=True))
            for name, array in complete.items()
        }
        lazily = {name: array.chunk(chunks[name]) for name, array in complete.items()}
        return _blank_unmeasured(dataset.assign(lazily)).drop_encoding()
    try:
        return _blank_unmeasured(dataset.load()).drop_encoding()
    except DAMAGED as error:
        noun = noun_of(group.unit_axes)
        raise PersonaError(
            f"The run {run!r} holds a complete {noun} that cannot be read ({error}); "
            "`persona-nns verify` names it."
        ) from error


def _open_group(location: Location, group: str) -> xr.Dataset:
    """A run's group, of which only the labels have been read."""
    settings: dict[str, Any] = {"group": group, "consolidated": False}
    if location.options:
        settings["storage_options"] = dict(location.options)
    with warnings.catch_warnings():
        # A process that was killed may have left an unfinished file among the arrays.
        warnings.filterwarnings("ignore", "Object at .* is not recognized", ZarrUserWarning)
        dataset = xr.open_zarr(location.address, chunks=None, **settings)
    # zarr lists a group's arrays as it comes upon them, in an order that differs from one opening
    # to the next, and the order of coordinates shows (in that of dimensions, and of rows).
    names = sorted(map(str, dataset.coords))
    coords = {name: _plain_text(dataset[name].load()).variable for name in names}
    return xr.Dataset(dict(dataset.data_vars.variables), coords, dataset.attrs)


def _plain_text(array: xr.DataArray) -> xr.DataArray:
    """Texts as objects: pandas and seaborn do not all know numpy's StringDType."""
    if array.dtype.kind != "T":
        return array
    return array.copy(deep=False, data=array.values.astype(object))


def _done(
    completed: xr.DataArray, array: xr.DataArray, units: Sequence[Mapping[str, Label]]
) -> NDArray[np.bool_]:
    """Where a variable is complete; of size 1 on the dimensions that no unit has a place on.

    Args:
        completed: of the run.
        array: the variable; it is not read.
        units: the place of every unit, where some have one beyond the dimensions of
            ``completed``: a variable on such a dimension is complete where its own unit is.
    """
    unit_axes = completed.dims[1:]
    placed = {axis for place in units for axis in place} or set(unit_axes)
    axes = [str(axis) for axis in array.dims if axis in placed]
    if not axes:  # a published summary over cells has no cell to be complete
        return np.ones((1,) * array.ndim, dtype=bool)
    if set(axes) <= set(unit_axes):  # written by every unit
        done = completed.variable.any([axis for axis in unit_axes if axis not in axes])
    else:
        index = {
            axis: {label: i for i, label in enumerate(labels.values.tolist())}
            for axis, labels in {**completed.coords, **array.coords}.items()
            if axis in placed
        }
        done = xr.Variable(axes, np.zeros([array.sizes[axis] for axis in axes], dtype=bool))
        for place in units:
            if set(axes) <= set(place):
                here = tuple(index[axis][place[axis]] for axis in axes)
                there = tuple(index[str(axis)][place[str(axis)]] for axis in unit_axes)
                done.values[here] |= completed.values[0, *there]
    return done.set_dims({axis: done.sizes.get(axis, 1) for axis in array.dims}).values


def _complete_only(
    array: xr.DataArray, done: NDArray[np.bool_], stored: "zarr.Array[Any]"
) -> xr.DataArray:
    """A variable, still to be read, of which only what is complete is ever read."""
    values = indexing.LazilyIndexedArray(_Complete(array.variable, done, stored))
    kind = _KINDS.get(array.dtype.kind)
    return array.copy(deep=False, data=values).assign_attrs({"kind": kind} if kind else {})


class _Complete(BackendArray):
    """An array on disk with NaN (of texts, "") in place of what is not complete.

    That may be half-written, or cut off so that it cannot be read, and in a store at a URL each
    piece of it is a request.
    """

    def __init__(
        self, stored: xr.Variable, done: NDArray[np.bool_], array: "zarr.Array[Any]"
    ) -> None:
        self._array = array
        self._done = done
        self._edges = chunk_shape(array)
        self._fill = FILL["text" if stored.dtype.kind in "TO" else "float"]
        self.shape = stored.shape
        self.dtype = np.dtype(object) if stored.dtype.kind == "T" else stored.dtype
        if stored.dtype.kind in _KINDS and not done.all():
            self.dtype = np.dtype(float)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        support = indexing.IndexingSupport.BASIC
        return indexing.explicit_indexing_adapter(key, self.shape, support, self._read)

    def _read(self, key: tuple[int | slice, ...]) -> NDArray[Any]:
        """What stands in a part of the array."""
        spans = [_span(k, size) for k, size in zip(key, self.shape, strict=True)]
        box = tuple(hull for hull, _ in spans)
        done = self._done[_where_known(self._done, box)]
        if done.all():
            values = read_region(self._array, box).astype(self.dtype, copy=False)
        else:
            values = np.full([part.stop - part.start for part in box], self._fill, self.dtype)
            for part in self._parts(done, box):
                within = tuple(
                    slice(a.start - b.start, a.stop - b.start)
                    for a, b in zip(part, box, strict=True)
                )
                found = read_region(self._array, part)
                values[within] = np.where(done[_where_known(done, within)], found, self._fill)
        return values[tuple(pick for _, pick in spans)]

    def _parts(self, done: NDArray[np.bool_], box: Sequence[slice]) -> Iterator[tuple[slice, ...]]:
        """Parts of a box that are made of whole chunks in which something is complete."""
        axes = [axis for axis, n in enumerate(self._done.shape) if n > 1] or [0]
        edges = [self._edges[axis] for axis in axes]
        places = np.argwhere(done)[:, axes] + [box[axis].start for axis in axes]
        chunks = np.unique(places // edges, axis=0).tolist()
        for stretch in stretches(map(tuple, chunks)):
            part = list(box)
            for axis, edge, of in zip(axes, edges, box_of(stretch), strict=True):
                start, stop = max(of.start * edge, box[axis].start), of.stop * edge
                part[axis] = slice(start, min(stop, box[axis].stop))
            yield tuple(part)


def _span(key: int | slice, size: int) -> tuple[slice, int | slice]:
    """The stretch of a dimension that an index is in, and the index from its beginning."""
    if not isinstance(key, slice):
        return slice(key, key + 1), 0
    indices = range(*key.indices(size))
    if not indices:
        return slice(0, 0), slice(None)
    first = min(indices[0], indices[-1])
    return slice(first, max(indices[0], indices[-1]) + 1), slice(None, None, key.step)


def _where_known(done: NDArray[np.bool_], box: Sequence[slice]) -> tuple[slice, ...]:
    """A box in an array that is of size 1 on dimensions where it is the same throughout."""
    return tuple(slice(None) if n == 1 else part for n, part in zip(done.shape, box, strict=True))


def _blank_unmeasured(dataset: xr.Dataset) -> xr.Dataset:
    """Integers and truth values as floats where complete units leave some of them unmeasured.

    They do so at layers that were not asked for, and where a variable has a value that says so;
    a truth value beside it, of the same dimensions, was not measured there either.
    """
    counts = {name: a for name, a in dataset.data_vars.items() if a.attrs.get("kind") == "int"}
    # A run that is older than the declaration has −1 for what was not measured.
    declared = dataset.attrs.get("unmeasured", dict.fromkeys(counts, FILL["int"]))
    absent = {name: array == declared[name] for name, array in counts.items() if name in declared}
    blanked: dict[str, xr.DataArray] = {}
    for name, array in dataset.data_vars.items():
        if "kind" not in array.attrs:
            continue
        own = [absent[name]] if name in absent else []
        if array.attrs["kind"] == "bool":
            own = [each for each in absent.values() if each.dims == array.dims]
        if (layers := _layers_asked(dataset, str(name))) is not None:
            own.append(~array.layer.isin(layers))
        for each in own:
            if bool(each.any()):
                array = array.where(~each)
        blanked[str(name)] = array
    return dataset.assign(blanked)


def _layers_asked(dataset: xr.Dataset, name: str) -> Sequence[int] | None:
    """The layers that were asked for, of a variable that has no others."""
    known = "every_layer" in dataset.attrs and name not in dataset.attrs["every_layer"]
    if not known or "layer" not in dataset[name].dims:
        return None
    return dataset.attrs["parameters"].get("layers")
