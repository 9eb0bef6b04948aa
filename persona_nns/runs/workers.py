"""Several processes at one run, started by Ray: ``--workers N``.

Ray only starts them and says who has died. Each is an actor that holds the model (a GPU each,
where there are GPUs) and does what the same command in another terminal would do: processes find
their cells through the store (`persona_nns.runs.queue`). So nothing is handed out here, and nothing
is collected.
"""

import inspect
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from persona_nns.declarations.catalog import Experiment
from persona_nns.declarations.plans import Plan
from persona_nns.errors import PersonaError, UsageError, first_line, one_line
from persona_nns.results.store import find_group
from persona_nns.runs.progress import UnitProgress
from persona_nns.runs.threads import free_cores, set_threads

_LOOK = 0.5  # seconds between two looks at how far the run has come


class Work(Protocol):
    """What a worker does, in a process of its own."""

    @property
    def group(self) -> tuple[str, str]:
        """Names of the experiment and of the run's group."""
        ...

    def carry_out(self, *, progress: bool, shared: bool) -> None:
        """Measure what is missing, until nothing is."""
        ...


@dataclass(frozen=True)
class RunCommand:
    """What each worker loads and runs: names rather than what they stand for.

    Attributes:
        experiment: the experiment's file.
        model: arguments of `load_model`.
        settings: arguments of `plan_run`, the grid among them.
        n_threads: that torch computes with; None leaves it to Ray.
    """

    experiment: str
    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    n_threads: int | None = None

    def __call__(self) -> Work:
        """Load the model, and check the request against it."""
        from persona_nns.models.load import load_model
        from persona_nns.runs.run import plan_run

        if self.n_threads is not None:
            set_threads(self.n_threads)
        return plan_run(self.experiment, load_model(**self.model), **self.settings)


def require_ray() -> Any:
    """The module ``ray``.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError(
            "Workers need Ray, which is not installed: pip install 'persona-nns[ray]'."
        ) from error
    return ray


def run_on_workers(
    prepare: Callable[[], Work],
    n_workers: int,
    *,
    address: str | None = None,
    on_look: Callable[[], None] = lambda: None,
    on_start: Callable[[int, tuple[str, str]], None] = lambda _process, _group: None,
) -> int:
    """Let workers do one work together until one of them finds nothing left to do.

    Args:
        prepare: called in each worker, to load the model; returns what to do with it.
        n_workers: processes at a time.
        address: of a Ray cluster (``auto``, ``ray://host:10001``); by default this machine.
        on_look: called twice a second, to show progress.
        on_start: called with each worker's process id and run once it is prepared.

    Returns:
        How many workers died and were replaced.

    Raises:
        UsageError: no Ray, no cluster at the address, or no worker asked for.
        PersonaError: a worker failed by itself, or workers died more often than is plausible.
    """
    if n_workers < 1:
        raise UsageError(f"{n_workers} workers cannot do anything; use 1 or more.")
    ray = require_ray()
    started_here = _connect(ray, address, n_workers)
    try:
        return _supervise(ray, prepare, n_workers, on_look, on_start)
    finally:
        if started_here:
            ray.shutdown()


def _connect(ray: Any, address: str | None, n_workers: int) -> bool:
    """Connect to a cluster, or start Ray here; returns whether it was done here."""
    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS")
    settings: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
    if address is None:
        # Workers share the cores there are: asking for more of them than there are cores is
        # the user's choice, and must not leave some of them waiting for ever.
        settings |= {"num_cpus": max(n_workers, 1)}
    try:
        ray.init(address=address, **settings, logging_level="error")
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        where = f"at {address!r}" if address else "on this machine"
        raise UsageError(f"Ray cannot be reached {where}: {one_line(error)}") from error
    return True


class _Worker:
    """An actor: prepared once, then at work."""

    def __init__(self, prepare: Callable[[], Work]) -> None:
        self._work = prepare()

    def introduce(self) -> tuple[int, tuple[str, str]]:
        """Its process, and the run that it works on."""
        return os.getpid(), self._work.group

    def work(self) -> None:
        """Do what there is to do."""
        self._work.carry_out(progress=False, shared=True)


def _supervise(
    ray: Any,
    prepare: Callable[[], Work],
    n_workers: int,
    on_look: Callable[[], None],
    on_start: Callable[[int, tuple[str, str]], None],
) -> int:
    n_gpus = 1 if ray.cluster_resources().get("GPU") else 0
    actor = ray.remote(num_cpus=0 if n_gpus else 1, num_gpus=n_gpus)(_Worker)
    deaths = 0
    workers = [actor.remote(prepare) for _ in range(n_workers)]
    prepared = [worker.introduce.remote() for worker in workers]
    jobs = {worker.work.remote(): worker for worker in workers}
    try:
        while True:
            finished, _ = ray.wait(list(jobs), num_returns=1, timeout=_LOOK)
            if prepared:
                ready, prepared = ray.wait(prepared, num_returns=len(prepared), timeout=0)
                for introduction in ready:
                    with suppress(ray.exceptions.RayError):  # its job says what happened
                        on_start(*ray.get(introduction))
            on_look()
            for job in finished:
                worker = jobs.pop(job)
                try:
                    ray.get(job)
                except ray.exceptions.RayActorError as error:
                    deaths += 1
                    if deaths > 3 * n_workers:
                        raise PersonaError(
                            f"{deaths} workers died, the last one because: {_reason(error)}; "
                            "completed cells are kept."
                        ) from error
                    worker = actor.remote(prepare)
                    jobs[worker.work.remote()] = worker
                except ray.exceptions.RayTaskError as error:
                    raise _own(error) from error
                else:
                    return deaths
    finally:
        for worker in jobs.values():
            ray.kill(worker)


def _own(error: Any) -> BaseException:
    """The error that a worker raised, if it is one of ours; else one that quotes it."""
    cause = error.cause
    if isinstance(cause, PersonaError):
        return type(cause)(str(cause))
    return PersonaError(f"A worker failed: {_reason(cause)}.")


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__


def launch(
    experiment: Experiment,
    model: Mapping[str, Any],
    settings: Mapping[str, Any],
    plan: Plan,
    n_workers: int,
    address: str | None,
    *,
    n_threads: int | None = None,
) -> str:
    """Run an experiment on one model by workers; returns the name of the run.

    Args:
        experiment: what to measure.
        model: arguments of `load_model`; paths are absolute, and workers on other machines look
            for the same ones.
        settings: arguments of `plan_run`; paths are absolute.
        plan: the units asked for, to show how many of them are complete.
        n_workers: processes at a time.
        address: of a Ray cluster; by default this machine.
        n_threads: of each worker; by default they share the cores that are free on this machine,
            and on a cluster have what Ray gives them.
    """
    store = str(settings["store"])
    if n_threads is None and address is None and "OMP_NUM_THREADS" not in os.environ:
        n_threads = max(1, free_cores() // n_workers)
    found: list[str] = []
    bar = UnitProgress(f"{model['label']} · {plan.name}", plan.noun, len(plan.units), enabled=True)
    each = (
        "" if n_threads is None else f", on {n_threads} thread{'s' if n_threads > 1 else ''} each"
    )
    bar.begin(f"{n_workers} worker{'s' if n_workers > 1 else ''}{each}")
    with bar:

        def look() -> None:
            group = find_group(store, experiment.name, found[0]) if found else None
            if group is not None:
                bar.look(len(group.completed(plan.units)))

        file = str(Path(inspect.getfile(experiment.measure)).resolve())
        run_on_workers(
            RunCommand(file, model, settings, n_threads),
            n_workers,
            address=address,
            on_look=look,
            on_start=lambda _process, group: found.append(group[1]),
        )
        look()
    return found[0]
