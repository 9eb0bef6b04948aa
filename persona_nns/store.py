"""Results on disk: labelled arrays in one Zarr v3 hierarchy, a cell at a time.

Group ``/<experiment>/<run>`` holds one model's block for one grid, and plain xarray reads it:
``xr.open_zarr(store, group="localized_positions/<run>", consolidated=False)``. The block is
allocated whole, before anything is measured. One cell is whole chunks in every array, so cells
are written independently of each other. A cell's ``completed`` is written after all the rest of
it, and on a local disk only once the rest has reached the disk: whatever cuts a run off, a cell
that says it is complete is. Metadata is never consolidated: groups that come later would not be
seen.

Whoever writes writes the same bytes to the same place, so any number of processes may allocate
and write one run at once.

Nothing here knows about models.
"""

import itertools
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec
from zarr.errors import ContainsArrayError, ContainsGroupError, ZarrUserWarning
from zarr.storage import LocalStore

from persona_nns.errors import PersonaError, UsageError
from persona_nns.places import Place, place_of
from persona_nns.variables import FILL, Kind, Variable

_DTYPES: dict[Kind, Any] = {"float": "float32", "int": "int64", "bool": "bool", "text": str}
# A cell that is larger than this in one array is cut by layer and position inside its chunk.
_LARGE_CELL = 2**20
# Results up to this size are read when they are opened, larger ones as they are used.
_EAGER = 2**28
# What reading a chunk raises that was cut off, whichever codec notices it.
_DAMAGED = (RuntimeError, ValueError, OSError)

COMPLETED = Variable(
    "cell",
    "cell is complete",
    description="True once everything else of the cell has been written.",
    kind="bool",
)
SECONDS = Variable(
    "cell", "time", units="s", description="Wall-clock time of the cell's batch, divided by cells."
)


@dataclass(frozen=True)
class Block:
    """Everything that is known about a run's group before the first cell is measured.

    Attributes:
        experiment: name of the experiment.
        run: name of the run's group.
        model: label of the model.
        n_layers: its number of decoder blocks.
        d_model: width of its residual stream.
        precision: its precision.
        cells: (persona, task) keys, in the order of the grid.
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
    cells: Sequence[tuple[str, str]]
    layers: Sequence[int]
    positions: Sequence[str]
    variables: Mapping[str, Variable]
    attrs: Mapping[str, Any]

    def labels(self, variable: Variable, axis: str) -> Sequence[Any]:
        """The labels of one of a variable's dimensions."""
        shared: dict[str, Sequence[Any]] = {
            "cell": [f"{persona}/{task}" for persona, task in self.cells],
            "layer": self.layers,
            "position": self.positions,
            "d_model": range(self.d_model),
        }
        return shared[axis] if axis in shared else variable.coords[axis]


class RunGroup:
    """The group of one run, opened for reading and writing cells."""

    def __init__(self, group: zarr.Group, place: Place) -> None:
        self._group = group
        self._place = place
        self._index: dict[str, int] | None = None
        self._arrays: dict[str, zarr.Array[Any]] = {}

    def __len__(self) -> int:
        return len(self._places())

    @property
    def attrs(self) -> dict[str, Any]:
        """The run's provenance."""
        return dict(self._group.attrs)

    def completed(self, labels: Iterable[str] | None = None) -> set[str]:
        """Those of these cells (by default of all) that are complete."""
        places = self._places()
        asked = sorted(places[label] for label in (places if labels is None else labels))
        completed = self._array("completed")
        done: set[int] = set()
        if self._place.folder is None:
            # An object is written whole or not at all, and only for a flag that is set: one
            # listing says what a request for each cell would.
            written = self._place.names(completed.path)
            done.update(place for place in asked if f"c.0.{place}" in written)
        else:
            for run in _stretches(asked):
                flags = _read_flags(completed, run)
                done.update(place for place, flag in zip(run, flags, strict=True) if flag)
        return {label for label, place in places.items() if place in done}

    def write_cells(
        self, labels: Sequence[str], values: Mapping[str, NDArray[Any]], seconds: float
    ) -> None:
        """Write cells; they count only once ``completed`` is written, which is done last.

        Args:
            labels: the cells.
            values: the arrays by name, leading axis = cell.
            seconds: time of one cell.
        """
        places = [self._places()[label] for label in labels]
        rows = {place: row for row, place in enumerate(places)}
        stretches = _stretches(sorted(places))
        for name, value in values.items():
            array = self._array(name)
            for run in stretches:
                array[0, run.start : run.stop] = value[[rows[place] for place in run]]
        for run in stretches:
            self._array("seconds")[0, run.start : run.stop] = seconds
        self._place.flush()
        for run in stretches:
            self._array("completed")[0, run.start : run.stop] = True

    def write_cell(self, label: str, values: Mapping[str, NDArray[Any]], seconds: float) -> None:
        """Write one cell."""
        self.write_cells([label], {name: value[None] for name, value in values.items()}, seconds)

    def _places(self) -> dict[str, int]:
        """Where each cell stands in this group: the order of the grid when it was allocated."""
        if self._index is None:
            labels = np.asarray(self._array("cell")[...]).tolist()
            self._index = {label: index for index, label in enumerate(labels)}
        return self._index

    def sessions(self, but: Iterable[str] = ()) -> dict[str, Mapping[str, Any]]:
        """What the processes that compute, or computed, cells of this run say of themselves.

        Args:
            but: names of sessions to leave out.
        """
        known = set(but)
        groups = _subgroups(self._group, "sessions")
        return {name: dict(group.attrs) for name, group in groups if name not in known}

    def note_session(self, name: str, attrs: Mapping[str, Any]) -> None:
        """Say who computes cells of this run, in a sub-group of its own: writers never meet."""
        group = require_group(require_group(self._group, "sessions"), name)
        group.attrs.put(dict(attrs))

    def _array(self, name: str) -> zarr.Array[Any]:
        if name not in self._arrays:
            self._arrays[name] = cast("zarr.Array[Any]", self._group[name])
        return self._arrays[name]


def _stretches(places: Iterable[int]) -> list[range]:
    """Ascending numbers as stretches without a gap."""
    grouped = itertools.groupby(enumerate(places), lambda pair: pair[1] - pair[0])
    stretches = [[place for _, place in group] for _, group in grouped]
    return [range(stretch[0], stretch[-1] + 1) for stretch in stretches]


def _read_flags(completed: "zarr.Array[Any]", run: range) -> list[bool]:
    """Flags of a stretch of cells; one that was cut off while it was written is not set."""
    try:
        return np.asarray(completed[0, run.start : run.stop], dtype=bool).tolist()
    except _DAMAGED:
        if len(run) == 1:
            return [False]
        return [flag for place in run for flag in _read_flags(completed, range(place, place + 1))]


def check_writable(store: str | Path) -> None:
    """See that a store can be written before anything is computed for it.

    Raises:
        UsageError: the path cannot be written, or is no Zarr store.
    """
    place_of(store).check_writable()


def find_run(store: str | Path, block: Block) -> str | None:
    """The group that holds results of this identity and model label, whatever its grid's name."""
    if _open_root(store) is None:
        return None
    wanted = (block.attrs["identity"], block.model)
    for info in list_runs(store, block.experiment):
        if (info.attrs["identity"], info.attrs["model"]) == wanted:
            return info.run
    return None


def find_group(store: str | Path, experiment: str, run: str) -> RunGroup | None:
    """The group of a run, for reading; None where it is not there yet."""
    root = _open_root(store)
    if root is None:
        return None
    group: zarr.Group | None = root
    for name in (experiment, *run.split("/")):
        group = _subgroup(group, name) if group is not None else None
    if group is None or not _is_allocated(group):
        return None
    return RunGroup(group, place_of(store))


def completed_cells(store: str | Path, block: Block) -> set[str]:
    """Labels of the cells that are complete; none where the group is not there yet."""
    group = find_group(store, block.experiment, block.run)
    return set() if group is None else group.completed()


def _open_root(store: str | Path) -> zarr.Group | None:
    """The root of a store for reading; None where there is no Zarr store."""
    return place_of(store).open_root()


def _subgroup(group: zarr.Group, name: str) -> zarr.Group | None:
    """A group in a group; None where there is none, or its metadata were cut off."""
    try:
        found = group[name]
    except (KeyError, *_DAMAGED):
        return None
    return found if isinstance(found, zarr.Group) else None


def _subgroups(group: zarr.Group, *path: str) -> Iterator[tuple[str, zarr.Group]]:
    """The groups in a group, or in one below it, by name; without any whose metadata are gone."""
    parent: zarr.Group | None = group
    for name in path:
        parent = _subgroup(parent, name) if parent is not None else None
    if parent is None:
        return
    if not isinstance(parent.store, LocalStore):
        yield from sorted(parent.groups())
        return
    # On a disk there may be metadata that were cut off, and unfinished files.
    for metadata in sorted((parent.store.root / parent.path).glob("*/zarr.json")):
        if (found := _subgroup(parent, metadata.parent.name)) is not None:
            yield metadata.parent.name, found


def _is_allocated(group: zarr.Group) -> bool:
    """Whether everything but cells has been written: ``completed`` is created last."""
    try:
        return "completed" in group and "identity" in group.attrs
    except ValueError:
        return False


def attach(store: str | Path, block: Block) -> RunGroup:
    """Open a run's group, allocating whatever of it is not there yet.

    Raises:
        PersonaError: the store cannot be written, or the group is another run's.
    """
    place = place_of(store)
    try:
        place.discard_damaged_metadata(f"{block.experiment}/{block.run}")
        group = place.open_for_writing()
        for name in (block.experiment, *block.run.split("/")):
            group = require_group(group, name)
        if not (_is_allocated(group) and all(name in group for name in block.variables)):
            _allocate(group, block, place)
    except OSError as error:
        raise PersonaError(f"The store {str(store)!r} cannot be written: {error}.") from error
    if group.attrs["identity"] != block.attrs["identity"]:
        raise PersonaError(
            f"The group {block.run!r} of {str(store)!r} holds another run; use another --store."
        )
    return RunGroup(group, place)


def _allocate(group: zarr.Group, block: Block, place: Place) -> None:
    """Write everything but cells.

    What is there already is left as it is, or written again with the same bytes: another process
    may be at it too, and one that was cut off may have left any part of it.
    """
    described = _write_coordinates(group, block)
    # xarray finds coordinates that are no dimensions by this attribute.
    listing = {"variables": list(block.variables), "coordinates": " ".join(described)}
    group.attrs.update({**block.attrs, **listing})
    require_group(group, "sessions")
    every = {**block.variables, "seconds": SECONDS, "completed": COMPLETED}
    for name, variable in every.items():
        sizes = [len(block.labels(variable, axis)) for axis in variable.axes]
        if name == "completed":  # says that all the rest is there
            place.flush()
        _require_array(
            group,
            name,
            shape=(1, *sizes),
            dtype=_DTYPES[variable.kind],
            fill_value=FILL[variable.kind],
            dimension_names=("model", *variable.axes),
            compressors=ZstdCodec(checksum=True),
            attributes={
                "long_name": variable.long_name,
                "units": variable.units,
                "description": variable.description,
            },
            **_chunks(variable, sizes[1:]),
        )


def _chunks(variable: Variable, sizes: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """One cell is one chunk; a large one is cut into chunks a (layer, position) inside a shard."""
    if variable.kind == "text" or 8 * math.prod(sizes) <= _LARGE_CELL:
        return {"chunks": (1, 1, *sizes)}
    inner = [
        1 if axis in ("layer", "position") else size
        for axis, size in zip(variable.axes[1:], sizes, strict=True)
    ]
    return {"shards": (1, 1, *sizes), "chunks": (1, 1, *inner)}


def require_group(parent: zarr.Group, name: str) -> zarr.Group:
    """A group in a group, created unless it is there: another process may be faster."""
    try:
        return parent.require_group(name)
    except ContainsGroupError:
        return cast("zarr.Group", parent[name])


def _require_array(group: zarr.Group, name: str, **settings: Any) -> "zarr.Array[Any]":
    """An array of a group, created unless it is there: another process may be faster."""
    if name not in group:
        try:
            # One folder an array, rather than one for each index of a chunk.
            keys: Any = {"name": "default", "separator": "."}
            return group.create_array(name, chunk_key_encoding=keys, **settings)
        except ContainsArrayError:
            pass
    return cast("zarr.Array[Any]", group[name])


def _write_coordinates(group: zarr.Group, block: Block) -> list[str]:
    """Write the labels; returns the names of those that are not dimensions."""
    personas, tasks = zip(*block.cells, strict=True)
    depth = [layer / block.n_layers for layer in block.layers]
    coordinates: dict[str, tuple[tuple[str, ...], Any, str, str]] = {
        "model": (("model",), [block.model], "text", "model"),
        "cell": (("cell",), [f"{p}/{t}" for p, t in block.cells], "text", "persona/task"),
        "persona": (("cell",), personas, "text", "persona"),
        "task": (("cell",), tasks, "text", "task"),
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
        for axis, labels in variable.coords.items():
            kind = "text" if isinstance(labels[0], str) else "int"
            coordinates[axis] = ((axis,), labels, kind, axis)
    for name, (dims, values, kind, long_name) in coordinates.items():
        data = np.asarray(values, dtype=object if kind == "text" else None)
        array = _require_array(
            group,
            name,
            shape=data.shape,
            chunks=data.shape,
            dtype="float64" if kind == "float" else _DTYPES[cast("Kind", kind)],
            dimension_names=dims,
            attributes={"long_name": long_name, "units": "1"},
        )
        array[...] = data
    return [name for name, (dims, *_) in coordinates.items() if dims != (name,)]


@dataclass(frozen=True)
class RunInfo:
    """One run in a store: its group, and what it says of itself."""

    experiment: str
    run: str
    attrs: Mapping[str, Any]
    group: RunGroup

    @cached_property
    def n_completed(self) -> int:
        """The number of its cells that are complete."""
        return len(self.group.completed())

    @property
    def n_cells(self) -> int:
        """The number of cells of its grid."""
        return len(self.group)

    @property
    def kin(self) -> str:
        """What runs of different models have in common when they can be read as one result."""
        parameters = {
            name: value for name, value in self.attrs["parameters"].items() if name != "layers"
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
            f"{self.n_completed}/{self.n_cells} cells)"
        )


def _brief(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def list_runs(store: str | Path, experiment: str | None = None) -> list[RunInfo]:
    """The runs in a store, by experiment and age.

    Raises:
        UsageError: there is no store there.
    """
    root = _open_root(store)
    if root is None:
        raise UsageError(f"There is no Zarr store at {str(store)!r}.")
    place = place_of(store)
    runs: list[RunInfo] = []
    for name, _ in _subgroups(root):
        if experiment not in (None, name):
            continue
        for run, group in _subgroups(root, name):
            if _is_allocated(group):
                runs.append(RunInfo(name, run, dict(group.attrs), RunGroup(group, place)))
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
    differ (what a model lacks is NaN). Cells that are not complete read as NaN (integers −1,
    text empty).

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
    # Flags first: a cell that is completed while the rest is read is not taken for complete.
    # What is not complete is never read: it may be half-written.
    done = info.group.completed()
    whole = _open_group(place_of(store), f"{info.experiment}/{info.run}")
    names = [*info.attrs["variables"], "seconds", "completed"]
    if missing := [name for name in names if name not in whole]:
        raise PersonaError(
            f"The run {info.run!r} lacks the arrays {', '.join(missing)}: its store is damaged."
        )
    whole = whole[names]
    labels = whole["cell"].values.tolist()
    flags = np.array([[label in done for label in labels]])
    complete = whole.drop_vars("completed").isel(cell=np.flatnonzero(flags[0]))
    try:
        dataset = complete if complete.chunks else complete.load()
    except _DAMAGED as error:
        raise PersonaError(
            f"The run {info.run!r} holds a complete cell that cannot be read ({error}); "
            "`persona-nns verify` names it."
        ) from error
    dataset = _plain_texts(dataset)
    if not flags.all():
        described = [name for name, c in whole.coords.items() if "cell" in c.dims]
        coords = _plain_texts(whole[described].load()).coords
        fill = {name: _fill(array) for name, array in dataset.data_vars.items()}
        dataset = dataset.drop_vars([name for name in described if name != "cell"])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Increasing number of chunks")  # it is what is meant
            dataset = dataset.reindex(cell=labels, fill_value=fill).assign_coords(coords)
    attrs = whole["completed"].attrs
    return dataset.assign(completed=(("model", "cell"), flags, attrs))


def _open_group(place: Place, group: str) -> xr.Dataset:
    """A run's group; where it is large, in dask's chunks."""
    settings: dict[str, Any] = {"group": group, "consolidated": False}
    if place.options:
        settings["storage_options"] = dict(place.options)
    with warnings.catch_warnings():
        # A process that was killed may have left an unfinished file among the arrays.
        warnings.filterwarnings("ignore", "Object at .* is not recognized", ZarrUserWarning)
        dataset = xr.open_zarr(place.location, chunks=None, **settings)
        if dataset.nbytes > _EAGER:
            dataset = xr.open_zarr(place.location, chunks={}, **settings)
    return dataset.assign_coords({name: c.load() for name, c in dataset.coords.items()})


def _plain_texts(dataset: xr.Dataset) -> xr.Dataset:
    """Texts as objects: pandas and seaborn do not all know numpy's StringDType."""
    variables = dataset.variables.items()
    texts = {name: array.astype(object) for name, array in variables if array.dtype.kind == "T"}
    dataset = dataset.assign_coords({n: a for n, a in texts.items() if n in dataset.coords})
    return dataset.assign({n: a for n, a in texts.items() if n not in dataset.coords})


def _fill(array: xr.DataArray) -> Any:
    kinds: dict[str, Kind] = {"f": "float", "i": "int", "b": "bool"}
    return FILL[kinds.get(array.dtype.kind, "text")]


def _join(datasets: list[xr.Dataset], experiment: str) -> xr.Dataset:
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
    # Joining may sort; cells keep the order of the grid, variables that of the experiment.
    order = list(dict.fromkeys(cell for ds in datasets for cell in ds.cell.values.tolist()))
    named = {"experiment": experiment, "grid": datasets[0].attrs["grid"]}
    return joined.sel(cell=order)[list(datasets[0].data_vars)].assign_attrs(named)
