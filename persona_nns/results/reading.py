"""Results as labelled arrays: what a store holds, opened lazily, complete units only.

A unit that is not complete reads as missing, whatever stands in its place: it may be half-written,
or cut off so that it cannot be read.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing
from zarr.errors import ZarrUserWarning

from persona_nns.declarations.plans import Label, noun_of
from persona_nns.declarations.variables import FILL, Kind
from persona_nns.errors import PersonaError, UsageError
from persona_nns.results.block import Block
from persona_nns.results.locations import Location, location_of
from persona_nns.results.store import (
    DAMAGED,
    RunGroup,
    box_of,
    is_allocated,
    open_root,
    stretches,
    subgroups,
)

# Results up to this size are read when they are opened, larger ones as they are used.
_EAGER = 2**28


@dataclass(frozen=True)
class RunInfo:
    """One run in a store: its group, and what it says of itself."""

    experiment: str
    run: str
    attrs: Mapping[str, Any]
    group: RunGroup

    @cached_property
    def n_completed(self) -> int:
        """The number of its units that are complete."""
        return int(self.group.flags().sum())

    @property
    def n_units(self) -> int:
        """The number of its units."""
        return len(self.group)

    @property
    def noun(self) -> str:
        """What one of its units is called in messages."""
        return noun_of(self.group.unit_axes)

    @property
    def kin(self) -> str:
        """What runs of different models have in common when they can be read as one result."""
        parameters = {
            name: value
            for name, value in self.attrs["parameters"].items()
            if name not in ("layers", "layer_sets")
        }
        shared = [self.attrs["grid_digest"], self.attrs["protocol_version"], parameters]
        return json.dumps(shared, sort_keys=True)

    @property
    def configuration(self) -> str:
        """Its parameters, as short as they can be told."""
        return ", ".join(f"{k}={_brief(v)}" for k, v in self.attrs["parameters"].items())

    def describe(self) -> str:
        """One line that tells this run from its neighbours."""
        return (
            f"{self.run} (model {self.attrs['model']}, grid {self.attrs['grid']}, "
            f"{self.attrs['precision']}, {self.configuration}, "
            f"{self.n_completed}/{self.n_units} complete)"
        )


def _brief(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    if value and isinstance(value[0], list):
        return ";".join(map(_brief, value))
    return ",".join(map(str, value))


def list_runs(store: str | Path, experiment: str | None = None) -> list[RunInfo]:
    """The runs in a store, by experiment and age.

    Raises:
        UsageError: there is no store there.
    """
    root = open_root(store)
    if root is None:
        raise UsageError(f"There is no Zarr store at {str(store)!r}.")
    location = location_of(store)
    runs: list[RunInfo] = []
    for name, _ in subgroups(root):
        if experiment not in (None, name):
            continue
        for run, group in subgroups(root, name):
            if is_allocated(group):
                runs.append(RunInfo(name, run, dict(group.attrs), RunGroup(group, location)))
    return sorted(runs, key=lambda info: (info.experiment, info.attrs["created"], info.run))


def find_run(store: str | Path, block: Block) -> str | None:
    """The group that holds results of this identity and model label, whatever its grid's name."""
    if open_root(store) is None:
        return None
    wanted = (block.attrs["identity"], block.model)
    for info in list_runs(store, block.experiment):
        if (info.attrs["identity"], info.attrs["model"]) == wanted:
            return info.run
    return None


def open_results(
    store: str | Path,
    experiment: str,
    *,
    grid: Any = None,
    run: str | Sequence[str] | None = None,
) -> xr.Dataset:
    """Open an experiment's results as one Dataset over models.

    Runs are joined if they agree in grid, parameters and protocol version; their layers may
    differ (what a model lacks is NaN). Arrays as wide as a model (``d_model``) are never joined:
    they are there where one run is opened. Cells (or other units) that are not complete read as NaN
    (integers −1, text empty).

    Args:
        store: path or URL of the store.
        experiment: name of the experiment.
        grid: only runs on this grid: its name, its file, or a `Grid`.
        run: only this run, or these runs, by the name of their group.

    Raises:
        UsageError: no such results, or several sets of them, which the message lists.
    """
    runs = list_runs(store, experiment)
    if not runs:
        raise UsageError(f"The store {str(store)!r} holds no results of {experiment!r}.")
    chosen = [info for info in runs if _matches(info, grid, run)]
    asked = {run} if isinstance(run, str) else set(run or ())
    if missing := asked - {info.run for info in runs}:
        known = ", ".join(info.run for info in runs)
        raise UsageError(f"There is no run {', '.join(sorted(missing))}; there are: {known}.")
    if not chosen:
        choices = "; ".join(info.describe() for info in runs)
        raise UsageError(f"No run of {experiment!r} matches; there are: {choices}.")
    if len({info.kin for info in chosen}) > 1:
        raise UsageError(
            f"Several sets of results of {experiment!r} match; choose with grid or run: "
            + "; ".join(info.describe() for info in chosen)
        )
    labels = [info.attrs["model"] for info in chosen]
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(
                f"Several runs of the model {label!r} match; choose one with run: "
                + "; ".join(info.describe() for info in chosen if info.attrs["model"] == label)
            )
    return _join([_open_run(store, info) for info in chosen], experiment)


def _matches(info: RunInfo, grid: Any, run: str | Sequence[str] | None) -> bool:
    from persona_nns.prompts.grids import BUNDLED_GRIDS, load_grid

    wanted = [run] if isinstance(run, str) else run
    if wanted is not None and info.run not in wanted:
        return False
    if grid is None:
        return True
    if isinstance(grid, str) and grid not in BUNDLED_GRIDS and not grid.endswith(".toml"):
        return bool(info.attrs["grid"] == grid)
    return bool(info.attrs["grid_digest"] == load_grid(grid).digest)


def _open_run(store: str | Path, info: RunInfo) -> xr.Dataset:
    # Flags first: a unit that is completed while the rest is read is not taken for complete.
    flags = info.group.flags()
    whole = _open_group(location_of(store), f"{info.experiment}/{info.run}")
    names = [*info.attrs["variables"], "seconds", "completed"]
    if missing := [name for name in names if name not in whole]:
        raise PersonaError(
            f"The run {info.run!r} lacks the arrays {', '.join(missing)}: its store is damaged."
        )
    whole = whole[names]
    completed = whole["completed"].copy(data=flags)
    units = info.attrs.get("units", [])
    complete = {
        name: _complete_only(whole[name], _done(completed, whole[name], units))
        for name in names[:-1]
    }
    dataset = whole.assign({**complete, "completed": completed})
    if dataset.nbytes > _EAGER:
        chunks = {
            name: dict(zip(array.dims, whole[name].encoding["chunks"], strict=True))
            for name, array in complete.items()
        }
        return dataset.assign({name: array.chunk(chunks[name]) for name, array in complete.items()})
    try:
        return dataset.load()
    except DAMAGED as error:
        raise PersonaError(
            f"The run {info.run!r} holds a complete {info.noun} that cannot be read ({error}); "
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
    return array.astype(object) if array.dtype.kind == "T" else array


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


def _complete_only(array: xr.DataArray, done: NDArray[np.bool_]) -> xr.DataArray:
    """A variable, still to be read, of which only what is complete is ever read."""
    values = indexing.LazilyIndexedArray(_Complete(array.variable, done, _fill(array)))
    return array.copy(data=values)


class _Complete(BackendArray):
    """An array on disk with a fill value in place of what is not complete.

    That may be half-written, or cut off so that it cannot be read, and in a store at a URL each
    piece of it is a request.
    """

    def __init__(self, stored: xr.Variable, done: NDArray[np.bool_], fill: Any) -> None:
        self._stored = stored
        self._done = done
        self._fill = fill
        self.shape = stored.shape
        self.dtype = np.dtype(object) if stored.dtype.kind == "T" else stored.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        support = indexing.IndexingSupport.BASIC
        return indexing.explicit_indexing_adapter(key, self.shape, support, self._read)

    def _read(self, key: tuple[int | slice, ...]) -> NDArray[Any]:
        """What stands in a part of the array."""
        box = tuple(k if isinstance(k, slice) else slice(k, k + 1) for k in key)
        stored = self._stored[box]
        each = self._done.shape
        done = self._done[
            tuple(slice(None) if n == 1 else k for n, k in zip(each, box, strict=True))
        ]
        if done.all():
            values = stored.values.astype(self.dtype, copy=False)
        else:
            values = np.full(stored.shape, self._fill, dtype=self.dtype)
            axes = [axis for axis, n in enumerate(each) if n > 1] or [0]
            places = np.argwhere(done)[:, axes].tolist()
            for stretch in stretches(map(tuple, places)):
                region = [slice(None)] * stored.ndim
                for axis, part in zip(axes, box_of(stretch), strict=True):
                    region[axis] = part
                values[tuple(region)] = stored[tuple(region)].values
        return values[tuple(slice(None) if isinstance(k, slice) else 0 for k in key)]


def _fill(array: xr.DataArray) -> Any:
    kinds: dict[str, Kind] = {"f": "float", "i": "int", "b": "bool"}
    return FILL[kinds.get(array.dtype.kind, "text")]


def _join(datasets: list[xr.Dataset], experiment: str) -> xr.Dataset:
    if len(datasets) > 1:
        datasets = [dataset.drop_dims("d_model", errors="ignore") for dataset in datasets]
    fill = {name: _fill(array) for name, array in datasets[0].data_vars.items()}
    joined = xr.concat(
        datasets,
        dim="model",
        data_vars="minimal",
        coords="minimal",
        compat="equals",
        join="outer" if len(datasets) > 1 else "exact",
        fill_value=fill,
        combine_attrs="drop_conflicts",
    )
    # Joining may sort; labels keep the order of the plan, variables that of the experiment.
    order = {
        dim: list(dict.fromkeys(label for ds in datasets for label in ds[dim].values.tolist()))
        for dim in map(str, joined.dims)
        if joined[dim].dtype.kind == "O"
    }
    named = {"experiment": experiment, "grid": datasets[0].attrs["grid"]}
    return joined.sel(order)[list(datasets[0].data_vars)].assign_attrs(named)


#: The ``protocol_version`` of published numbers, which were not computed here.
PUBLISHED_VERSION = "published"
