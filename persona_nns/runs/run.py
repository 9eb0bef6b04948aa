"""Run an experiment: batches of units (as a rule, cells) through `measure` into the store."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from nnsight import TransformersModel

from persona_nns.declarations.catalog import Experiment, shown_where
from persona_nns.declarations.functions import the_experiment
from persona_nns.declarations.plans import Unit
from persona_nns.declarations.variables import Variable
from persona_nns.errors import Interrupted, PersonaError, UsageError
from persona_nns.models.load import hosted, load_model
from persona_nns.models.memory import fitting_batch_size, is_out_of_memory
from persona_nns.models.placement import devices_of
from persona_nns.prompts.frames import Frame
from persona_nns.prompts.grids import Grid, load_grid
from persona_nns.results.allocation import attach, check_per_chunk
from persona_nns.results.claims import Claims
from persona_nns.results.measured import clean_marker_note, nowhere_measured
from persona_nns.results.reading import LATEST, find_run, open_results
from persona_nns.results.store import check_writable, completed_units
from persona_nns.runs.identity import now, session_attributes, session_name
from persona_nns.runs.known import Known, agrees, known_of, missing_layers, take_over
from persona_nns.runs.progress import UnitProgress, count
from persona_nns.runs.queue import Queue
from persona_nns.runs.remote.dispatch import carry_out_remotely
from persona_nns.runs.request import Asked, Request, check_inputs, check_request, told_of
from persona_nns.runs.returned import check_named, declared_arrays, on_host, unmistakable


@dataclass(frozen=True)
class PlannedRun:
    """A checked request and how to carry it out.

    Attributes:
        request: what to measure, and the groups it goes to.
        model: the loaded model, or the client of a hosted one.
        grid: where the experiment runs on one.
        asked: what the request was made of.
        store: path or URL of the store.
        execution: keyword arguments of `measure` that do not change its numbers.
        batch_size: units at a time; None is as many as fit.
        deadline: seconds that a job on a server may go without news; None is the default.
        verbose: print what becomes of each job on a server.
    """

    request: Request
    model: TransformersModel
    grid: Grid | None
    asked: Asked
    store: str | Path
    execution: Mapping[str, Any]
    batch_size: int | None
    deadline: float | None
    verbose: bool

    @property
    def group(self) -> tuple[str, str]:
        """Names of the experiment and of the run's group."""
        return self.request.experiment.name, self.request.block.run

    def done(self) -> set[str]:
        """Labels of the units that the store holds, asked for or not."""
        return set.intersection(
            *(completed_units(self.store, block) for block in self.request.blocks)
        )

    @property
    def title(self) -> str:
        """What a progress bar calls it."""
        return f"{self.request.block.model} · {self.request.block.attrs['grid']}"

    def interrupted(self) -> str:
        """What is to be said where it was stopped by hand."""
        n_done = len({unit.label for unit in self.request.units} & self.done())
        of = f"{n_done} of {count(len(self.request.units), self.request.plan.noun)}"
        return f"Interrupted; {of} are complete and kept, and the same call goes on."

    def carry_out(self, *, progress: bool, shared: bool = False) -> None:
        """Measure what is missing, beside any other process that does the same.

        Args:
            progress: show a progress bar.
            shared: others start at the same moment: allocate the run before the first batch.
        """
        self._take_over(progress=progress, shared=shared)
        elsewhere = hosted(self.model)
        if elsewhere is None:
            _carry_out(self, progress=progress, shared=shared)
        else:
            carry_out_remotely(self, elsewhere, progress=progress)
        if self.asked.name is not None:
            attach(self.store, self.request.block).say({"name": self.asked.name})

    def _take_over(self, *, progress: bool, shared: bool) -> None:
        """Take what other runs of the store hold, after measuring the layers that they lack."""
        done = self.done()
        pending = [unit for unit in self.request.units if unit.label not in done]
        if not pending or not (known := self._known(pending)):
            return
        for layers, units in missing_layers(known, self.request, pending).items():
            self._at(layers, units).carry_out(progress=progress, shared=shared)
            known = known_of(self.store, self.request)
        attrs = known[0].info.attrs
        request = self.request.as_hosted(*told_of(attrs))
        take_over(self.store, request, known, session_attributes())

    def _known(self, pending: Sequence[Unit]) -> list[Known]:
        """The runs that hold some of what is asked for, as far as that can be told."""
        known = known_of(self.store, self.request)
        asked = set(self.request.arguments.get("layers", ()))
        others = [each for each in known if each.layers != asked]
        if others and not self._layers_stand_alone(others[0], pending):
            return [each for each in known if each not in others]
        return known

    def _layers_stand_alone(self, known: Known, pending: Sequence[Unit]) -> bool:
        """Whether a layer's numbers depend on no other that was asked for."""
        experiment = self.request.experiment
        if experiment.finish is not None:  # what a judge says of a sample, say
            return False
        unit = next((unit for unit in pending if unit.label in known.units), None)
        if experiment.is_shipped or unit is None:
            return experiment.is_shipped
        if hosted(self.model) is not None:
            return False
        layer = min(known.layers & set(self.request.arguments["layers"]))
        request = self._at([layer], [unit]).request
        measured = measure_batch(request, self.model, [unit], self.execution)
        return agrees(known, request, unit, declared_arrays(request, measured, 1))

    def _at(self, layers: Sequence[int], units: Sequence[Unit]) -> "PlannedRun":
        """The same for some of the layers and units."""
        asked = replace(self.asked, layers=list(layers), cells=None, name=None)
        request = check_request(self.request.experiment, self.model, self.grid, asked)
        request = request.into(find_run(self.store, request.block) or request.block.run)
        return replace(self, request=replace(request, units=tuple(units)), asked=asked)


def run(
    experiment: str | Path | Experiment | Callable[..., Any],
    model: TransformersModel | str | Path,
    grid: str | Path | Grid | None = None,
    *,
    variables: Mapping[str, Variable] | None = None,
    frame: str | Path | Frame | None = None,
    layers: str | int | Sequence[int] | None = None,
    layer_sets: str | int | Sequence[int | Sequence[int]] | None = None,
    positions: str | Sequence[str] | None = None,
    cells: str | Sequence[str] | None = None,
    store: str | Path = "stores/results.zarr",
    batch_size: int | None = None,
    reuse: bool = True,
    keep_residuals: bool = False,
    deadline: float | None = None,
    verbose: bool = False,
    name: str | None = None,
    cells_per_chunk: int | None = None,
    progress: bool = True,
    **options: Any,
) -> xr.Dataset:
    """Run an experiment on one model and one grid, and return its results.

    What the store already holds under the same identity is not computed again.

    Args:
        experiment: a bundled experiment's name, the path of an experiment file, a loaded one, or
            a function ``measure(model, cells, *, …)`` of your own, in a notebook's cell, say. Its
            name is the experiment's: `open_results` finds its results by that.
        model: from `load_model`, or a name that it takes.
        grid: ``short``, ``long``, ``review``, ``short-de`` (or ``-fr``, ``-es``, ``-zh``), a file
            that `load_grid` takes, or a `Grid`; by default the experiment's own choice, where it
            has one; None for an experiment whose inputs are options of its own.
        variables: of a function, what it returns, by name.
        frame: how persona and task are put to the model: ``role``, ``system``, ``later``, a
            ``.toml`` file, or a `Frame`; by default the grid's own.
        layers: ``all``, layers or depths; by default the experiment's own choice.
        layer_sets: sets of layers such as ``"14;10,12,14"``; by default the experiment's own.
        positions: position names, or ranges of them (``"p_last-12:p_last,g1:g3"``); by default the
            experiment's own choice.
        cells: labels such as ``engineer/arch``; by default the whole grid.
        store: path or URL of the Zarr store.
        batch_size: cells (or other units) measured at a time; by default as many as memory
            allows. A batch that does not fit is retried at half its size.
        reuse: reuse prefixes and resume at the layer of an intervention; False runs the plain
            protocol on whole sequences, which gives the same numbers and takes much longer.
        keep_residuals: store the residuals too, in the group ``<run>/residuals``.
        deadline: seconds that a job on a server may go without news; by default an hour.
        verbose: print what becomes of each job on a server.
        name: what the run is called, beside the name of its group; `open_results` finds it by it.
        cells_per_chunk: cells (or other units) that one file holds of each array, when the run is
            begun; by default 1 up to 1,000 cells, and more in larger grids. Numbers do not depend
            on it.
        progress: show a progress bar with an ETA; where there is neither a terminal nor a
            notebook, print a line now and then.
        **options: the experiment's own options.

    Returns:
        The run's results (every cell of the grid; those not asked for may be NaN).

    Raises:
        UsageError: the request is wrong; nothing was written.
        PersonaError: it could not be carried out; what was measured is kept.
        Interrupted: it was stopped by hand; what was measured is kept.
    """
    experiment = the_experiment(experiment, variables)
    asked = Asked(
        layers=layers,
        layer_sets=layer_sets,
        positions=positions,
        cells=cells,
        batch_size=batch_size,
        reuse=reuse,
        keep_residuals=keep_residuals,
        deadline=deadline,
        verbose=verbose,
        name=name,
        cells_per_chunk=cells_per_chunk,
        options=options,
    )
    planned = _plan(experiment, model, grid, frame, asked, store, progress=progress)
    try:
        planned.carry_out(progress=progress)
    except KeyboardInterrupt:
        raise Interrupted(planned.interrupted()) from None
    of, group = planned.group
    results = open_results(store, of, run=group)
    if nothing := nowhere_measured(results):
        warnings.warn(
            f"{', '.join(nothing)} of {group!r}: NaN in every {planned.request.plan.noun} that is "
            "complete. The descriptions of the variables say when nothing can be measured.",
            stacklevel=2,
        )
    if note := clean_marker_note(results):
        warnings.warn(
            f"{note} What is done to these personas cannot take markers away: `persona-nns show "
            f"{store} {of} --texts` shows what is said.",
            stacklevel=2,
        )
    return results


def plan_run(
    experiment: str | Path | Experiment | Callable[..., Any],
    model: TransformersModel | str | Path,
    grid: str | Path | Grid | None = None,
    *,
    variables: Mapping[str, Variable] | None = None,
    frame: str | Path | Frame | None = None,
    store: str | Path = "stores/results.zarr",
    progress: bool = False,
    **settings: Any,
) -> PlannedRun:
    """Check a run, and prepare it where its experiment does; the arguments are those of `run`.

    Raises:
        UsageError: the request is wrong; nothing was written.
        PersonaError: the model cannot be loaded.
    """
    asked = Asked.of(settings)
    experiment = the_experiment(experiment, variables)
    return _plan(experiment, model, grid, frame, asked, store, progress=progress)


def _plan(
    experiment: Experiment,
    model: TransformersModel | str | Path,
    grid: str | Path | Grid | None,
    frame: str | Path | Frame | None,
    asked: Asked,
    store: str | Path,
    *,
    progress: bool,
) -> PlannedRun:
    check_writable(store)
    if asked.batch_size is not None and asked.batch_size < 1:
        raise UsageError(f"The batch size {asked.batch_size} is too small; use 1 or more.")
    if asked.cells_per_chunk is not None and asked.cells_per_chunk < 1:
        raise UsageError(f"{asked.cells_per_chunk} cells a chunk are too few; use 1 or more.")
    if asked.name is not None and (not asked.name.strip() or asked.name == LATEST):
        raise UsageError(f"A run cannot be called {asked.name!r}; give it another name.")
    grid = experiment.grid if grid is None else grid
    if "grid" in experiment.options:  # an input among others
        asked, grid = replace(asked, options={"grid": grid, **asked.options}), None
    loaded_grid = None if grid is None else load_grid(grid, frame)
    check_inputs(experiment, loaded_grid, asked.cells, frame)
    if isinstance(model, str | Path):
        model = load_model(model)
    if not (asked.reuse or experiment.reuses):
        raise UsageError(f"The experiment {experiment.name!r} never reuses anything.")
    if asked.keep_residuals and not experiment.keeps_residuals:
        raise UsageError(f"The experiment {experiment.name!r} keeps no residuals.")
    if experiment.prepare is not None:
        with shown_where(experiment):
            options = experiment.prepare(model, store, asked.options, progress=progress)
        asked = replace(asked, options=options)
    request = check_request(experiment, model, loaded_grid, asked)
    request = request.into(find_run(store, request.block) or request.block.run)
    for block in request.blocks:
        check_per_chunk(store, block)
    return PlannedRun(
        request=request,
        model=model,
        grid=loaded_grid,
        asked=asked,
        store=store,
        execution=asked.execution(experiment),
        batch_size=asked.batch_size or request.plan.batch_size,
        deadline=asked.deadline,
        verbose=asked.verbose,
    )


def measure_batch(
    request: Request,
    model: TransformersModel,
    units: Sequence[Unit],
    execution: Mapping[str, Any],
) -> dict[str, Any]:
    """What `measure` returns for some units: by variable, leading axis = unit."""
    with shown_where(request.experiment):
        measured = request.experiment.measure(model, list(units), **request.measuring(execution))
        check_named(request, measured)
        return on_host(measured)


def _carry_out(planned: PlannedRun, *, progress: bool, shared: bool) -> None:
    request, model, store = planned.request, planned.model, planned.store
    done = planned.done()
    pending = [unit for unit in request.units if unit.label not in done]
    noun, n_asked = request.plan.noun, len(request.units)
    bar = UnitProgress(planned.title, noun, n_asked, n_asked - len(pending), enabled=progress)
    if not pending:
        bar.nothing_to_do()
        return
    rows = [ids for of_key in request.plan.token_ids.values() for ids in of_key.values()]
    batch_size = planned.batch_size or fitting_batch_size(model, rows)
    how = {**planned.execution, "batch_size": batch_size, "device": devices_of(model)}
    if not request.experiment.is_shipped:
        batch_size = unmistakable(request, len(pending), batch_size)
    claims = Claims(store, request.blocks, session_name(), {**session_attributes(), **how})
    if shared:
        claims.begin()
    queue = Queue(pending, batch_size, claims)
    bar.begin(f"{batch_size} at a time, {_computing(model)}")
    with bar:
        try:
            for number, batch in enumerate(queue, 1):
                started = time.perf_counter()
                try:
                    measured = measure_batch(request, model, batch, planned.execution)
                except (MemoryError, RuntimeError) as error:
                    queue.put_back(batch, _smaller(len(batch), error, noun))
                    continue
                measured = request.finish(model.tokenizer, batch, measured)
                arrays = declared_arrays(request, measured, len(batch))
                claims.collect(batch, arrays, (time.perf_counter() - started) / len(batch))
                bar.update(n_asked - queue.n_left, (number, number + queue.n_batches))
        finally:
            try:
                claims.settle()
            finally:
                claims.end(now())


def _computing(model: TransformersModel) -> str:
    """Where a model computes: on which device, or on all that it is spread over."""
    if model.device.type == "cpu":
        return f"on {count(torch.get_num_threads(), 'thread')}"
    return f"on {devices_of(model)}"


def _smaller(batch_size: int, error: Exception, noun: str) -> int:
    """Half the size of a batch that did not fit.

    Raises:
        PersonaError: a single unit does not fit.
        Exception: the error itself, if it was not about memory.
    """
    if not is_out_of_memory(error):
        raise error
    if batch_size == 1:
        raise PersonaError(
            f"A single {noun} does not fit into memory; use a smaller dtype (--dtype bfloat16), "
            "fewer layers, or a device with more memory."
        ) from error
    half = batch_size // 2
    warnings.warn(
        f"{batch_size} {noun}s at a time do not fit into memory; going on with {half}.",
        stacklevel=2,
    )
    return half
