"""Jobs on a server, noted in the store before they are waited for.

Each job has a sub-group ``<experiment>/<run>/jobs/<key>``: enough to ask for its result from
another process, on another day, and, once its units are written, what it took. The key is a hash
of what was asked, so that a job is found again by whoever would ask the same.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import zarr

from persona_nns.declarations.plans import content_digest
from persona_nns.results.block import Block
from persona_nns.results.store import open_group, put_group, subgroups
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
        state: ``waiting``, or ``written`` once its units are in the store.
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
    state: Literal["waiting", "written"] = "waiting"
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

    def key(self, units: Sequence[str]) -> str:
        """Hash of what is asked for these units."""
        asked = [self._block.attrs["identity"], self._block.run, self._host, self._settings, units]
        return content_digest(asked)[:16]

    def waiting(self) -> list[Job]:
        """Jobs that were submitted with the same settings and whose results nobody has taken."""
        noted = read_jobs(self._store, self._block.experiment, self._block.run)
        return [
            job
            for key, job in noted.items()
            if job.state == "waiting" and key == self.key(job.units)
        ]

    def note(self, job: Job) -> None:
        """Write a job down, in place of an earlier one for the same units."""
        jobs = open_group(self._store, f"{self._path}/jobs", "a")
        assert jobs is not None
        put_group(jobs, self.key(job.units), {**asdict(job), "units": list(job.units)})

    def written(self, job: Job, result_bytes: int, seconds: float) -> None:
        """Note that a job's units are in the store, and what it took."""
        self.note(replace(job, state="written", result_bytes=result_bytes, seconds=seconds))

    def forget(self, job: Job) -> None:
        """Drop a job that will not give a result, and a run's group that holds nothing else."""
        run = open_group(self._store, self._path, "a")
        if run is None:
            return
        path = f"jobs/{self.key(job.units)}"
        if path in run:
            del run[path]
        jobs = run.get("jobs")
        if (
            isinstance(jobs, zarr.Group)
            and not list(jobs.group_keys())
            and not list(run.array_keys())
        ):
            root = open_group(self._store, "", "a")
            assert root is not None
            del root[self._path]

    @property
    def _path(self) -> str:
        return f"{self._block.experiment}/{self._block.run}"


def read_jobs(store: str | Path, experiment: str, run: str) -> dict[str, Job]:
    """What is noted of a run's jobs, by key: which they were, and the bytes and seconds they took.

    Args:
        store: path or URL of the store.
        experiment: name of the experiment.
        run: name of the run's group.
    """
    jobs = open_group(store, f"{experiment}/{run}/jobs", "r")
    noted: dict[str, Job] = {}
    for key, group in subgroups(jobs) if jobs is not None else ():
        attrs = cast("dict[str, Any]", dict(group.attrs))
        noted[key] = Job(**{**attrs, "units": tuple(attrs["units"])})
    return noted


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
