"""Jobs on a server, noted in the store before they are waited for.

Each job has a sub-group ``<experiment>/<run>/jobs/<key>.<job>``: enough to ask for its result from
another process, on another day, and, once its units are written, what it took. The key is a hash
of what was asked, so that a job is found again by whoever would ask the same; the rest tells jobs
for the same units apart. A job that the server refused for its size stays noted: the next ones of
the run are smaller.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from persona_nns.declarations.plans import content_digest
from persona_nns.errors import UsageError
from persona_nns.results.block import Block
from persona_nns.results.groups import open_group, open_root, put_group, subgroups
from persona_nns.runs.identity import now


@dataclass(frozen=True)
class Job:
    """A job that a server has accepted.

    Attributes:
        id: the server's name for it.
        host: the server's address.
        units: labels of its units, in order.
        compressed: its result is.
        request_bytes: sent for it, all times together.
        submitted: when, in UTC.
        submissions: how many times it was sent.
        checks_names: it checks the model's names first.
        session: the session that looks after it.
        state: ``waiting``; ``written`` once its units are in the store; or ``refused``: it was too
            large.
        result_bytes: fetched for it.
        seconds: it ran on the server.
    """

    id: str
    host: str
    units: tuple[str, ...]
    compressed: bool
    request_bytes: int
    submitted: str
    submissions: int = 1
    checks_names: bool = False
    session: str = ""
    state: Literal["waiting", "written", "refused"] = "waiting"
    result_bytes: int = 0
    seconds: float = 0.0


class JobBook:
    """The jobs of one run on one server."""

    def __init__(self, store: str | Path, block: Block, host: str, settings: Any) -> None:
        """Find the run's group; nothing is written yet.

        Args:
            store: path or URL of the store.
            block: the run.
            host: the server's address.
            settings: what determines the answer beside the run's identity and the units.
        """
        self._store = store
        self._block = block
        self._host = host
        self._settings = settings
        self._names: dict[str, str] = {}  # of notes, by job; former ones are named otherwise
        self._settled: dict[str, Job] = {}
        self._foreign: set[str] = set()

    def key(self, units: Sequence[str]) -> str:
        """Hash of what is asked for these units."""
        asked = [self._block.attrs["identity"], self._block.run, self._host, self._settings, units]
        return content_digest(asked)[:16]

    def notes(self) -> list[Job]:
        """Jobs that were submitted with the same settings, whatever became of them."""
        known = self._foreign | self._settled.keys()
        waiting: list[Job] = []
        found = read_jobs(self._store, self._block.experiment, self._block.run, but=known)
        for name, job in found.items():
            if name.partition(".")[0] != self.key(job.units):
                self._foreign.add(name)
                continue
            self._names[job.id] = name
            if job.state == "waiting":
                waiting.append(job)
            else:
                self._settled[name] = job
        return [*self._settled.values(), *waiting]

    def waiting(self) -> list[Job]:
        """Those whose results nobody has taken."""
        return [job for job in self.notes() if job.state == "waiting"]

    def note(self, job: Job) -> None:
        """Write a job down, in place of an earlier note of the same job."""
        jobs = open_group(self._store, f"{self._path}/jobs", "a")
        assert jobs is not None
        put_group(jobs, self.name(job), {**asdict(job), "units": list(job.units)})

    def written(self, job: Job, result_bytes: int, seconds: float) -> None:
        """Note that a job's units are in the store, and what it took."""
        self.note(replace(job, state="written", result_bytes=result_bytes, seconds=seconds))

    def refused(self, job: Job) -> None:
        """Note that a job was too large for the server."""
        self.note(replace(job, state="refused"))

    def forget(self, job: Job) -> None:
        """Drop a job that will not give a result."""
        forget_job(self._store, self._block.experiment, self._block.run, self.name(job))

    def tidy(self) -> None:
        """Drop a run's group that holds no job and no number: nothing came of it."""
        drop_if_empty(self._store, self._block.experiment, self._block.run)

    def name(self, job: Job) -> str:
        """The name of a job's note."""
        own = f"{self.key(job.units)}.{content_digest([job.id])[:8]}"
        return self._names.get(job.id, own)

    @property
    def _path(self) -> str:
        return f"{self._block.experiment}/{self._block.run}"


def read_jobs(
    store: str | Path, experiment: str, run: str, but: Collection[str] = ()
) -> dict[str, Job]:
    """What is noted of a run's jobs, by key: which they were, and the bytes and seconds they took.

    Args:
        store: path or URL of the store.
        experiment: name of the experiment.
        run: name of the run's group.
        but: keys to leave out.
    """
    group = open_group(store, f"{experiment}/{run}", "r")
    noted: dict[str, Job] = {}
    for key, note in subgroups(group, "jobs", but=but) if group is not None else ():
        attrs = cast("dict[str, Any]", dict(note.attrs))
        noted[key] = Job(**{**attrs, "units": tuple(attrs["units"])})
    return noted


def forget_job(store: str | Path, experiment: str, run: str, key: str) -> None:
    """Drop what is noted of a job, if anything is."""
    jobs = open_group(store, f"{experiment}/{run}/jobs", "a")
    if jobs is not None and key in jobs:
        del jobs[key]


def drop_if_empty(store: str | Path, experiment: str, run: str) -> None:
    """Drop a run's group that holds no job and no number."""
    group = open_group(store, f"{experiment}/{run}", "r")
    if group is None or list(group.array_keys()) or any(subgroups(group, "jobs")):
        return
    parent = open_group(store, experiment, "a")
    assert parent is not None
    del parent[run]


@dataclass(frozen=True)
class NotedJob:
    """A job, and where a store notes it: experiment, run, and key."""

    job: Job
    experiment: str
    run: str
    key: str


def list_jobs(store: str | Path) -> list[NotedJob]:
    """The jobs of a store, by experiment, run, server and age; of runs without a number too.

    Raises:
        UsageError: there is no store there.
    """
    root = open_root(store)
    if root is None:
        raise UsageError(f"There is no Zarr store at {str(store)!r}.")
    found = [
        NotedJob(job, experiment, run, key)
        for experiment, _ in subgroups(root)
        for run, _ in subgroups(root, experiment)
        for key, job in read_jobs(store, experiment, run).items()
    ]
    return sorted(found, key=lambda one: (one.experiment, one.run, one.job.host, one.job.submitted))


def accepted(job: str, host: str, units: Sequence[str], size: int, **more: Any) -> Job:
    """A job that the server has accepted just now."""
    return Job(
        id=job,
        host=host,
        units=tuple(units),
        compressed=True,
        request_bytes=size,
        submitted=now(),
        **more,
    )
