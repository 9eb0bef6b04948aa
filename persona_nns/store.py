"""Results on disk: labelled arrays in one Zarr v3 hierarchy, a unit (say, a cell) at a time.

Group ``/<experiment>/<run>`` holds one model's block for one grid, and plain xarray reads it:
``xr.open_zarr(store, group="localized_positions/<run>", consolidated=False)``. The block is
allocated whole, before anything is measured. One unit is whole chunks in every array, so units
are written independently of each other, and a unit's ``completed`` is written after all the
rest of it. Metadata is never consolidated: groups that come later would not be seen.

Nothing here knows about models.
"""

import json
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray

from persona_nns.errors import PersonaError, UsageError
from persona_nns.units import Label, Plan, Unit
from persona_nns.variables import FILL, Kind, Variable

_DTYPES: dict[Kind, Any] = {"float": "float32", "int": "int64", "bool": "bool", "text": str}
# What labels stand for, where their dimension's name does not say it.
_NAMES = {"cell": "persona/task"}


def _bookkeeping(plan: Plan) -> dict[str, Variable]:
    """What is stored of every unit beside its results; ``completed`` is last."""
    dims, noun = " ".join(plan.unit_axes), plan.noun
    return {
        "seconds": Variable(
            dims,
            "time",
            units="s",
            description=f"Wall-clock time of the {noun}'s batch, divided by {noun}s.",
        ),
        "completed": Variable(
            dims,
            f"{noun} is complete",
            description=f"True once everything else of the {noun} has been written.",
            kind="bool",
        ),
    }


@dataclass(frozen=True)
class Block:
    """Everything that is known about a run's group before the first unit is measured.

    Attributes:
        experiment: name of the experiment.
        run: name of the run's group.
        model: label of the model.
        n_layers: its number of decoder blocks.
        d_model: width of its residual stream.
        precision: its precision.
        plan: what there is to measure.
        layers: labels of the layer axis.
        positions: labels of the position axis.
        variables: the arrays.
        attrs: provenance, as JSON-able values.
    """

    experiment: str
    run: str
    model: str
    n_layers: int
    d_model: int
    precision: str
    plan: Plan
    layers: Sequence[int]
    positions: Sequence[str]
    variables: Mapping[str, Variable]
    attrs: Mapping[str, Any]

    def labels(self, variable: Variable, axis: str) -> Sequence[Any]:
        """The labels of one of a variable's dimensions."""
        shared: dict[str, Sequence[Any]] = {
            **self.plan.axes,
            "layer": self.layers,
            "position": self.positions,
            "d_model": range(self.d_model),
        }
        return shared[axis] if axis in shared else variable.labels(axis)


class RunGroup:
    """The group of one run, opened for reading and writing units."""

    def __init__(self, group: zarr.Group) -> None:
        self._group = group
        self._order: dict[str, dict[Label, int]] = {}

    @property
    def attrs(self) -> dict[str, Any]:
        """The run's provenance."""
        return dict(self._group.attrs)

    def completed(self, units: Iterable[Unit]) -> set[str]:
        """Labels of those of the units that are complete."""
        array = self._array("completed")
        done = np.asarray(array[...], dtype=bool)
        return {unit.label for unit in units if done[self._index(array, unit)]}

    def write_unit(self, unit: Unit, values: Mapping[str, NDArray[Any]], seconds: float) -> None:
        """Write one unit; it counts only once ``completed`` is written, which is done last."""
        for name, value in {**values, "seconds": seconds, "completed": True}.items():
            array = self._array(name)
            array[self._index(array, unit)] = value

    def _index(self, array: zarr.Array[Any], unit: Unit) -> tuple[int | slice, ...]:
        """Where a unit stands in an array, all of what it has no place on."""
        dims: Sequence[Any] = cast("Any", array.metadata).dimension_names[1:]
        place = unit.place
        rest = (self._places(axis)[place[axis]] if axis in place else slice(None) for axis in dims)
        return (0, *rest)

    def _places(self, axis: str) -> dict[Label, int]:
        """Where each label stands in this group: the order of the plan when it was allocated."""
        if axis not in self._order:
            labels = np.asarray(self._array(axis)[...]).tolist()
            self._order[axis] = {label: index for index, label in enumerate(labels)}
        return self._order[axis]

    def add_session(self, name: str, attrs: Mapping[str, Any]) -> None:
        """Note who computes units of this run, in a sub-group of its own: writers never meet."""
        self._group.require_group(f"sessions/{name}").attrs.update(attrs)

    def _array(self, name: str) -> zarr.Array[Any]:
        return cast("zarr.Array[Any]", self._group[name])


def check_writable(store: str | Path) -> None:
    """See that a local store can be written before anything is computed for it.

    Raises:
        UsageError: the path cannot be written, or is no Zarr store.
    """
    if "://" in str(store):
        return
    path = Path(store).expanduser()
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or _is_zarr(path))):
        raise UsageError(f"{str(store)!r} exists and is no Zarr store; choose another --store.")
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise UsageError(f"The store {str(store)!r} cannot be written; choose another --store.")


def _is_zarr(path: Path) -> bool:
    return (path / "zarr.json").is_file()


def find_run(store: str | Path, block: Block) -> str | None:
    """The group that holds results of this identity and model label, whatever its grid's name."""
    if _open_root(store) is None:
        return None
    wanted = (block.attrs["identity"], block.model)
    for info in list_runs(store, block.experiment):
        if (info.attrs["identity"], info.attrs["model"]) == wanted:
            return info.run
    return None


def completed_units(store: str | Path, block: Block) -> set[str]:
    """Labels of the units that are complete; none where the group is not there yet."""
    root = _open_root(store)
    path = f"{block.experiment}/{block.run}"
    if root is None or f"{path}/completed" not in root:
        return set()
    return RunGroup(cast("zarr.Group", root[path])).completed(block.plan.units)


def _open_root(store: str | Path) -> zarr.Group | None:
    """The root of a store for reading; None where there is no Zarr store."""
    try:
        return zarr.open_group(_location(store), mode="r", zarr_format=3)
    except (OSError, ValueError):
        return None


def open_group(store: str | Path, path: str, mode: Literal["r", "a"]) -> zarr.Group | None:
    """A group of a store by its path; to write (``a``) it is made, to read it may be None."""
    if mode == "a":
        root = zarr.open_group(_location(store), mode="a", zarr_format=3)
        return root.require_group(path) if path else root
    root = _open_root(store)
    return cast("zarr.Group", root[path]) if root is not None and path in root else None


def attach(store: str | Path, block: Block) -> RunGroup:
    """Open a run's group, allocating whatever of it is not there yet.

    Raises:
        PersonaError: the store cannot be written, or the group is another run's.
    """
    try:
        root = zarr.open_group(_location(store), mode="a", zarr_format=3)
        group = root.require_group(block.experiment).require_group(block.run)
        if "completed" not in group:
            _allocate(group, block)
    except OSError as error:
        raise PersonaError(f"The store {str(store)!r} cannot be written: {error}.") from error
    if group.attrs["identity"] != block.attrs["identity"]:
        raise PersonaError(
            f"The group {block.run!r} of {str(store)!r} holds another run; use another --store."
        )
    return RunGroup(group)


def _allocate(group: zarr.Group, block: Block) -> None:
    described = _write_coordinates(group, block)
    # xarray finds coordinates that are no dimensions by this attribute.
    listing = {"variables": list(block.variables), "coordinates": " ".join(described)}
    placed = block.plan.placed_axes
    if placed - set(block.plan.unit_axes):  # what tells which units write such a dimension
        listing["units"] = [dict(unit.place) for unit in block.plan.units]
    group.attrs.update({**block.attrs, **listing})
    every = {**block.variables, **_bookkeeping(block.plan)}
    for name, variable in every.items():
        if name in group:
            continue
        sizes = {axis: len(block.labels(variable, axis)) for axis in variable.axes}
        group.create_array(
            name,
            shape=(1, *sizes.values()),
            chunks=(1, *(1 if axis in placed else size for axis, size in sizes.items())),
            dtype=_DTYPES[variable.kind],
            fill_value=FILL[variable.kind],
            dimension_names=("model", *variable.axes),
            attributes={
                "long_name": variable.long_name,
                "units": variable.units,
                "description": variable.description,
            },
        )


def _write_coordinates(group: zarr.Group, block: Block) -> list[str]:
    """Write the labels; returns the names of those that are not dimensions."""
    depth = [layer / block.n_layers for layer in block.layers]
    coordinates: dict[str, tuple[tuple[str, ...], Any, str, str]] = {
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
    for name, (dims, values, kind, long_name) in coordinates.items():
        if name in group:
            continue
        data = np.asarray(values, dtype=object if kind == "text" else None)
        array = group.create_array(
            name,
            shape=data.shape,
            chunks=data.shape,
            dtype="float64" if kind == "float" else _DTYPES[cast("Kind", kind)],
            dimension_names=dims,
            attributes={"long_name": long_name, "units": "1"},
        )
        array[...] = data
    return [name for name, (dims, *_) in coordinates.items() if dims != (name,)]


def _kind(labels: Sequence[Any]) -> Kind:
    kinds: dict[type, Kind] = {str: "text", int: "int", float: "float"}
    return kinds[type(labels[0])]


def _location(store: str | Path) -> str:
    text = str(store)
    return text if "://" in text else str(Path(text).expanduser())


@dataclass(frozen=True)
class RunInfo:
    """One run in a store: its group, and what it says of itself."""

    experiment: str
    run: str
    attrs: Mapping[str, Any]
    n_completed: int
    n_units: int

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

    def describe(self) -> str:
        """One line that tells this run from its neighbours."""
        parameters = ", ".join(f"{k}={_brief(v)}" for k, v in self.attrs["parameters"].items())
        return (
            f"{self.run} (model {self.attrs['model']}, grid {self.attrs['grid']}, "
            f"{self.attrs['precision']}, {parameters}, {self.n_completed}/{self.n_units} complete)"
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
    root = _open_root(store)
    if root is None:
        raise UsageError(f"There is no Zarr store at {str(store)!r}.")
    runs: list[RunInfo] = []
    for name, group in sorted(root.groups()):
        if experiment not in (None, name):
            continue
        for run, block in sorted(group.groups()):
            if "completed" in block:
                flags = np.asarray(cast("zarr.Array[Any]", block["completed"])[0], dtype=bool)
                done, size = int(flags.sum()), int(flags.size)
                runs.append(RunInfo(name, run, dict(block.attrs), done, size))
    return sorted(runs, key=lambda info: (info.experiment, info.attrs["created"], info.run))


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
    choices = "; ".join(info.describe() for info in runs)
    if not chosen:
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
    from persona_nns.grids import BUNDLED_GRIDS, load_grid

    wanted = [run] if isinstance(run, str) else run
    if wanted is not None and info.run not in wanted:
        return False
    if grid is None:
        return True
    if isinstance(grid, str) and grid not in BUNDLED_GRIDS and not grid.endswith(".toml"):
        return bool(info.attrs["grid"] == grid)
    return bool(info.attrs["grid_digest"] == load_grid(grid).digest)


def _open_run(store: str | Path, info: RunInfo) -> xr.Dataset:
    group = f"{info.experiment}/{info.run}"
    dataset = xr.open_zarr(_location(store), group=group, consolidated=False, chunks=None).load()
    # Zarr strings come back as numpy's StringDType, which pandas and seaborn do not all know.
    variables = dataset.variables.items()
    texts = {name: array.astype(object) for name, array in variables if array.dtype.kind == "T"}
    dataset = dataset.assign_coords({n: a for n, a in texts.items() if n in dataset.coords})
    dataset = dataset.assign({n: a for n, a in texts.items() if n not in dataset.coords})
    dataset = dataset[[*info.attrs["variables"], "seconds", "completed"]]
    units = info.attrs.get("units", [])
    for name, array in list(dataset.data_vars.items()):
        # A published summary over cells has no cell to be complete.
        if name != "completed" and (units or "cell" in array.dims):
            done = _done(dataset, array, units)
            dataset[str(name)] = array.where(done, _fill(array)).assign_attrs(array.attrs)
    return dataset


def _done(
    dataset: xr.Dataset, array: xr.DataArray, units: Sequence[Mapping[Hashable, Label]]
) -> xr.DataArray:
    """Where a variable is complete.

    Args:
        dataset: the run's.
        array: the variable.
        units: the place of every unit, where some have one beyond the dimensions of
            ``completed``: a variable on such a dimension is complete where its own unit is.
    """
    completed = dataset["completed"]
    if set(completed.dims) <= set(array.dims):
        return completed
    placed = {axis for place in units for axis in place}
    axes = [axis for axis in array.dims if axis in placed]
    done = xr.zeros_like(array.isel({dim: 0 for dim in array.dims if dim not in placed}), bool)
    for place in units:
        if set(axes) <= set(place):
            unit = completed.sel({axis: place[str(axis)] for axis in completed.dims[1:]})
            done.loc[{axis: place[str(axis)] for axis in axes}] = bool(unit.item())
    return done.drop_vars(set(done.coords) - set(axes))


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
