"""Run an experiment: batches of cells through `measure` into the store, or what is left of them."""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xarray as xr
from nnsight import TransformersModel

from persona_nns.catalog import Experiment, load_experiment
from persona_nns.errors import PersonaError, UsageError
from persona_nns.grids import Grid, load_grid
from persona_nns.memory import fitting_batch_size, is_out_of_memory
from persona_nns.models import load_model
from persona_nns.progress import progress_bar
from persona_nns.provenance import now, session_attributes, session_name
from persona_nns.request import Request, check_request
from persona_nns.sessions import Session
from persona_nns.shapes import declared_arrays
from persona_nns.sharing import Share
from persona_nns.store import check_writable, completed_cells, find_run, open_results


@dataclass(frozen=True)
class Plan:
    """A checked request and how to carry it out.

    Attributes:
        request: what to measure, and the groups it goes to.
        model: the loaded model.
        store: path or URL of the store.
        batch_size: cells at a time.
        execution: keyword arguments of `measure` that do not change its numbers.
    """

    request: Request
    model: TransformersModel
    store: str | Path
    batch_size: int
    execution: Mapping[str, Any]

    @property
    def group(self) -> tuple[str, str]:
        """Names of the experiment and of the run's group."""
        return self.request.experiment.name, self.request.block.run

    def carry_out(self, *, progress: bool, shared: bool = False) -> None:
        """Measure what is missing, beside any other process that does the same.

        Args:
            progress: show a progress bar.
            shared: others start at the same moment: allocate the run before the first batch.
        """
        _carry_out(self, progress=progress, shared=shared)


def run(
    experiment: str | Path | Experiment,
    model: TransformersModel | str | Path,
    grid: str | Path | Grid,
    *,
    layers: str | int | Sequence[int] | None = None,
    positions: str | Sequence[str] | None = None,
    cells: str | Sequence[str] | None = None,
    store: str | Path = "stores/results.zarr",
    batch_size: int | None = None,
    reuse: bool = True,
    keep_residuals: bool = False,
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
        batch_size: cells measured at a time; by default as many as memory allows. A batch that
            does not fit is retried at half its size.
        reuse: reuse prefixes and resume at the layer of an intervention; False runs the plain
            protocol on whole sequences, which gives the same numbers and takes much longer.
        keep_residuals: store the residuals too, in the group ``<run>/residuals``.
        progress: show a progress bar with an ETA (never where there is no terminal).
        **options: the experiment's own options.

    Returns:
        The run's results (every cell of the grid; those not asked for may be NaN).

    Raises:
        UsageError: the request is wrong; nothing was written.
        PersonaError: it could not be carried out; what was measured is kept.
    """
    plan = plan_run(
        experiment,
        model,
        grid,
        layers=layers,
        positions=positions,
        cells=cells,
        store=store,
        batch_size=batch_size,
        reuse=reuse,
        keep_residuals=keep_residuals,
        **options,
    )
    plan.carry_out(progress=progress)
    name, group = plan.group
    return open_results(store, name, run=group)


def plan_run(
    experiment: str | Path | Experiment,
    model: TransformersModel | str | Path,
    grid: str | Path | Grid,
    *,
    layers: str | int | Sequence[int] | None = None,
    positions: str | Sequence[str] | None = None,
    cells: str | Sequence[str] | None = None,
    store: str | Path = "stores/results.zarr",
    batch_size: int | None = None,
    reuse: bool = True,
    keep_residuals: bool = False,
    **options: Any,
) -> Plan:
    """Check a run without beginning it; the arguments are those of `run`.

    Raises:
        UsageError: the request is wrong; nothing was written.
        PersonaError: the model cannot be loaded.
    """
    check_writable(store)
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"The batch size {batch_size} is too small; use 1 or more.")
    loaded_experiment = (
        experiment if isinstance(experiment, Experiment) else load_experiment(experiment)
    )
    loaded_grid = load_grid(grid)
    loaded = load_model(model) if isinstance(model, str | Path) else model
    if not (reuse or loaded_experiment.reuses):
        raise UsageError(f"The experiment {loaded_experiment.name!r} never reuses anything.")
    if keep_residuals and not loaded_experiment.keeps_residuals:
        raise UsageError(f"The experiment {loaded_experiment.name!r} keeps no residuals.")
    execution = {"reuse": reuse} if loaded_experiment.reuses else {}
    if loaded_experiment.keeps_residuals:
        execution["keep_residuals"] = keep_residuals
    request = check_request(
        loaded_experiment,
        loaded,
        loaded_grid,
        layers,
        positions,
        cells,
        options,
        keep_residuals=keep_residuals,
    )
    request = request.into(find_run(store, request.block) or request.block.run)
    size = batch_size or fitting_batch_size(loaded, request.prompts)
    return Plan(request, loaded, store, size, execution)


def _carry_out(plan: Plan, *, progress: bool, shared: bool) -> None:
    request, model, store = plan.request, plan.model, plan.store
    batch_size, execution = plan.batch_size, plan.execution
    done = set.intersection(*(completed_cells(store, block) for block in request.blocks))
    pending = {cell.label: cell for cell in request.cells if cell.label not in done}
    if not pending:
        return
    attributes = {**execution, "batch_size": batch_size, "device": str(model.device)}
    session = Session(store, request.blocks, session_name(), {**session_attributes(), **attributes})
    if shared:
        session.begin()
    share = Share(list(pending), batch_size, session)
    title = f"{request.block.model} · {request.block.attrs['grid']}"
    n_asked = len(request.cells)
    with progress_bar(enabled=progress) as bar:
        task = bar.add_task(title, total=n_asked, completed=n_asked - len(pending))
        try:
            for labels in share:
                batch = [pending[label] for label in labels]
                started = time.perf_counter()
                try:
                    measured = request.experiment.measure(
                        model, batch, **request.arguments, **execution
                    )
                except (MemoryError, RuntimeError) as error:
                    batch_size = _smaller(len(batch), error)
                    share.put_back(labels, batch_size)
                    continue
                arrays = declared_arrays(request, measured, len(batch))
                session.write(labels, arrays, (time.perf_counter() - started) / len(batch))
                bar.update(task, completed=n_asked - share.n_left)
        finally:
            session.end(now())


def _smaller(batch_size: int, error: Exception) -> int:
    """Half the size of a batch that did not fit.

    Raises:
        PersonaError: a single cell does not fit.
        Exception: the error itself, if it was not about memory.
    """
    if not is_out_of_memory(error):
        raise error
    if batch_size == 1:
        raise PersonaError(
            "A single cell does not fit into memory; use a smaller dtype (--dtype bfloat16), "
            "fewer layers, or a device with more memory."
        ) from error
    half = batch_size // 2
    warnings.warn(
        f"{batch_size} cells at a time do not fit into memory; going on with {half}.", stacklevel=2
    )
    return half
