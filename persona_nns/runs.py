"""Run an experiment: batches of cells through `measure` into the store, or what is left of them."""

import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from nnsight import TransformersModel
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from persona_nns.catalog import Experiment, load_experiment
from persona_nns.errors import PersonaError, UsageError
from persona_nns.grids import Cell, Grid, PromptName, load_grid
from persona_nns.models import ModelRecord, load_model, record_of
from persona_nns.prompts import ROLE_PROMPTS, render_cell
from persona_nns.provenance import (
    identity,
    run_attributes,
    run_name,
    session_attributes,
    session_name,
)
from persona_nns.sites import parse_layers, parse_positions, position_index
from persona_nns.store import Block, RunGroup, attach, check_writable, open_results
from persona_nns.variables import FILL

_PROMPTS: tuple[PromptName, ...] = (*ROLE_PROMPTS, "BARE")


@dataclass(frozen=True)
class Request:
    """A checked request: nothing in it can still be a usage error.

    Attributes:
        experiment: what to measure.
        cells: the cells asked for, and their place in the grid.
        arguments: keyword arguments of `measure`.
        block: the group the results go to.
    """

    experiment: Experiment
    cells: Mapping[int, Cell]
    arguments: Mapping[str, Any]
    block: Block


def run(
    experiment: str | Path | Experiment,
    model: TransformersModel | str,
    grid: str | Path | Grid,
    *,
    layers: str | Sequence[int] | None = None,
    positions: str | Sequence[str] | None = None,
    cells: str | Sequence[str] | None = None,
    store: str | Path = "stores/results.zarr",
    batch_size: int = 16,
    reuse: bool = True,
    progress: bool = True,
    **options: Any,
) -> xr.Dataset:
    """Run an experiment on one model and one grid, and return its results.

    What the store already holds under the same identity is not computed again.

    Args:
        experiment: a bundled experiment's name, the path of an experiment file, or a loaded one.
        model: from `load_model`, or a name that it takes.
        grid: ``short``, ``long``, ``review``, a ``.toml`` file, or a `Grid`.
        layers: ``all``, layers or depths; by default the experiment's own choice.
        positions: position names; by default the experiment's own choice.
        cells: labels such as ``engineer/arch``; by default the whole grid.
        store: path or URL of the Zarr store.
        batch_size: cells measured at a time.
        reuse: reuse prefixes and resume at the layer of an intervention; False runs the plain
            protocol on whole sequences, which gives the same numbers and takes much longer.
        progress: show a progress bar with an ETA (never where there is no terminal).
        **options: the experiment's own options.

    Returns:
        The run's results (every cell of the grid; those not asked for may be NaN).

    Raises:
        UsageError: the request is wrong; nothing was written.
        PersonaError: it could not be carried out; what was measured is kept.
    """
    check_writable(store)
    if batch_size < 1:
        raise UsageError(f"The batch size {batch_size} is too small; use 1 or more.")
    loaded_experiment = (
        experiment if isinstance(experiment, Experiment) else load_experiment(experiment)
    )
    loaded_grid = load_grid(grid)
    loaded = load_model(model) if isinstance(model, str) else model
    if not (reuse or loaded_experiment.reuses):
        raise UsageError(f"The experiment {loaded_experiment.name!r} never reuses anything.")
    execution = {"reuse": reuse} if loaded_experiment.reuses else {}
    request = _check(loaded_experiment, loaded, loaded_grid, layers, positions, cells, options)
    _carry_out(request, loaded, store, batch_size, execution, progress=progress)
    return open_results(store, loaded_experiment.name, run=request.block.run)


def _check(
    experiment: Experiment,
    model: TransformersModel,
    grid: Grid,
    layers: str | Sequence[int] | None,
    positions: str | Sequence[str] | None,
    cells: str | Sequence[str] | None,
    options: Mapping[str, Any],
) -> Request:
    record = record_of(model)
    sites = _sites(experiment, record, layers, positions)
    arguments = {**sites, **_check_options(experiment, options)}
    labels = cells.split(",") if isinstance(cells, str) else cells
    asked = grid.cells if labels is None else grid.select_cells(label.strip() for label in labels)
    place = {cell.label: index for index, cell in enumerate(grid.cells)}
    prompts = {cell.label: render_cell(model.tokenizer, cell, _PROMPTS) for cell in grid.cells}
    for of_cell in prompts.values():
        for name in ROLE_PROMPTS:
            for position in sites.get("positions", []):
                position_index(of_cell[name], position)
    digest = identity(experiment, record, prompts, arguments)
    template = model.tokenizer.chat_template
    every = any(variable.every_layer for variable in experiment.variables.values())
    block = Block(
        experiment=experiment.name,
        run=run_name(record.label, grid, digest),
        model=record.label,
        n_layers=record.n_layers,
        precision=record.precision,
        cells=[(cell.persona, cell.task) for cell in grid.cells],
        layers=list(range(record.n_layers + 1)) if every else sites.get("layers", []),
        positions=sites.get("positions", []),
        variables=experiment.variables,
        attrs=run_attributes(experiment, record, grid, arguments, digest, template),
    )
    return Request(experiment, {place[cell.label]: cell for cell in asked}, arguments, block)


def _sites(
    experiment: Experiment,
    record: ModelRecord,
    layers: str | Sequence[int] | None,
    positions: str | Sequence[str] | None,
) -> dict[str, Any]:
    """The layers and positions to measure at, where the experiment has them."""
    sites: dict[str, Any] = {}
    for name, asked, default in (
        ("layers", layers, experiment.layers),
        ("positions", positions, experiment.positions),
    ):
        if default is None and asked is not None:
            raise UsageError(f"The experiment {experiment.name!r} has no {name} to choose.")
    if experiment.layers is not None:
        spec = experiment.layers if layers is None else layers
        sites["layers"] = parse_layers(spec, record.n_layers)
    if experiment.positions is not None:
        spec = experiment.positions if positions is None else positions
        sites["positions"] = parse_positions(spec)
    return sites


def _check_options(experiment: Experiment, options: Mapping[str, Any]) -> dict[str, Any]:
    """The experiment's own options, defaults filled in."""
    for name in options:
        if name not in experiment.options:
            known = ", ".join(experiment.options) or "none"
            raise UsageError(
                f"The experiment {experiment.name!r} has no option {name!r}; its options: {known}."
            )
    filled = {
        name: options.get(name, parameter.default) for name, parameter in experiment.options.items()
    }
    for name, value in filled.items():
        if value is inspect.Parameter.empty:
            raise UsageError(f"The experiment {experiment.name!r} needs the option {name!r}.")
    return filled


def _carry_out(
    request: Request,
    model: TransformersModel,
    store: str | Path,
    batch_size: int,
    execution: Mapping[str, Any],
    *,
    progress: bool,
) -> None:
    group: RunGroup = attach(store, request.block)
    done = group.completed()
    pending = [index for index in request.cells if not done[index]]
    if not pending:
        return
    group.add_session(
        session_name(),
        {
            **session_attributes(),
            **execution,
            "batch_size": batch_size,
            "device": str(model.device),
        },
    )
    title = f"{request.experiment.name} · {request.block.model} · {request.block.attrs['grid']}"
    with _progress_bar(enabled=progress) as bar:
        n_asked = len(request.cells)
        task = bar.add_task(title, total=n_asked, completed=n_asked - len(pending))
        for batch in _batches(pending, batch_size):
            started = time.perf_counter()
            cells = [request.cells[index] for index in batch]
            measured = request.experiment.measure(model, cells, **request.arguments, **execution)
            arrays = _arrays(request, measured, len(cells))
            seconds = (time.perf_counter() - started) / len(cells)
            for row, index in enumerate(batch):
                values = {name: array[row] for name, array in arrays.items()}
                group.write_cell(index, values, seconds)
                bar.advance(task)


def _batches(pending: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(pending), size):
        yield pending[start : start + size]


def _arrays(
    request: Request, measured: Mapping[str, Any], n_cells: int
) -> dict[str, np.ndarray[Any, Any]]:
    """What `measure` returned, as arrays of the declared shapes.

    Raises:
        PersonaError: `measure` did not return what its file declares.
    """
    declared = request.experiment.variables
    if set(measured) != set(declared):
        raise PersonaError(
            f"measure() of {request.experiment.name!r} returned {sorted(measured)}, but its file "
            f"declares {sorted(declared)}."
        )
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for name, variable in declared.items():
        value = measured[name]
        array = (
            value.detach().cpu().float().numpy()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else np.asarray(value, dtype=object if variable.kind == "text" else None)
        )
        array = _spread_layers(request, name, array)
        sizes = [len(request.block.labels(variable, axis)) for axis in variable.axes[1:]]
        shape = (n_cells, *sizes)
        if array.shape != shape:
            raise PersonaError(
                f"measure() of {request.experiment.name!r} returned {name!r} of shape "
                f"{array.shape}; its dims ({variable.dims}) need {shape}."
            )
        arrays[name] = array
    return arrays


def _spread_layers(
    request: Request, name: str, array: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """Put an array over the layers asked for onto the layer axis of the block."""
    variable = request.experiment.variables[name]
    if "layer" not in variable.axes or variable.every_layer:
        return array
    axis, asked = variable.axes.index("layer"), request.arguments["layers"]
    if array.ndim <= axis or array.shape[axis] != len(asked):
        return array
    labels = list(request.block.layers)
    if labels == asked:
        return array
    wide = list(array.shape)
    wide[axis] = len(labels)
    spread = np.full(wide, FILL[variable.kind], dtype=array.dtype)
    spread[(slice(None),) * axis + ([labels.index(layer) for layer in asked],)] = array
    return spread


def _progress_bar(*, enabled: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("cells"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not (enabled and console.is_terminal),
    )
