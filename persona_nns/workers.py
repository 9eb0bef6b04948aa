"""Several processes at one run, started by Ray: ``--workers N``.

Ray only starts them and says who has died. Each is an actor that holds the model (a GPU each,
where there are GPUs) and does what the same command in another terminal would do: processes find
their cells through the store (`persona_nns.sharing`). So nothing is handed out here, and nothing
is collected.
"""

from collections.abc import Callable
from typing import Any, Protocol

from persona_nns.errors import PersonaError, UsageError

_LOOK = 0.5  # seconds between two looks at how far the run has come


class Work(Protocol):
    """What a worker does: called until it returns, in a process of its own."""

    def __call__(self) -> None:
        """Do a part of the work, until nothing is left to do."""
        ...


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
    on_start: Callable[[int], None] = lambda _process: None,
) -> int:
    """Let workers do one work together until one of them finds nothing left to do.

    Args:
        prepare: called in each worker, to load the model; returns what to do with it.
        n_workers: processes at a time.
        address: of a Ray cluster (``auto``, ``ray://host:10001``); by default this machine.
        on_look: called twice a second, to show progress.
        on_start: called with the process id of each worker once it is prepared.

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
    settings: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
    if address is None:
        # Workers share the cores there are: asking for more of them than there are cores is
        # the user's choice, and must not leave some of them waiting for ever.
        settings |= {"num_cpus": max(n_workers, 1)}
    try:
        ray.init(address=address, **settings, logging_level="error")
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        where = f"at {address!r}" if address else "on this machine"
        raise UsageError(f"Ray cannot be reached {where}: {reason}.") from error
    return True


class _Worker:
    """An actor: prepared once, then at work."""

    def __init__(self, prepare: Callable[[], Work]) -> None:
        self._work = prepare()

    def process(self) -> int:
        import os

        return os.getpid()

    def work(self) -> None:
        self._work()


def _supervise(
    ray: Any,
    prepare: Callable[[], Work],
    n_workers: int,
    on_look: Callable[[], None],
    on_start: Callable[[int], None],
) -> int:
    n_gpus = 1 if ray.cluster_resources().get("GPU") else 0
    actor = ray.remote(num_cpus=0 if n_gpus else 1, num_gpus=n_gpus)(_Worker)
    deaths = 0
    workers = [actor.remote(prepare) for _ in range(n_workers)]
    prepared = [worker.process.remote() for worker in workers]
    jobs = {worker.work.remote(): worker for worker in workers}
    try:
        while True:
            finished, _ = ray.wait(list(jobs), num_returns=1, timeout=_LOOK)
            if prepared:
                ready, prepared = ray.wait(prepared, num_returns=len(prepared), timeout=0)
                for process in ready:
                    on_start(ray.get(process))
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
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".rstrip(": .")
