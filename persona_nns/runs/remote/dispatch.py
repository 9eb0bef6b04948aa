"""Measure the units of a request on a server: several in one job, several jobs at a time.

The first job goes alone. It is small, checks the model's names, and shows how long a unit takes;
the next ones are as large as fits the budgets below. Every job is noted in the store before it is
waited for, so that whoever asks the same again takes its result instead of running it again.
"""

import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnsight import TransformersModel
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status

from persona_nns.declarations.plans import Unit
from persona_nns.errors import (
    JobLostError,
    JobTooLargeError,
    NotHostedError,
    PersonaError,
    RemoteError,
)
from persona_nns.models.load import HOSTED, HostedModel
from persona_nns.results.claims import Claims
from persona_nns.results.reading import list_runs
from persona_nns.results.store import completed_units
from persona_nns.runs.identity import now, session_attributes, session_name
from persona_nns.runs.progress import UnitProgress
from persona_nns.runs.remote.connection import Connection, Patience, client_python
from persona_nns.runs.remote.environment import Environment, read_deployments, read_environment
from persona_nns.runs.remote.job_book import Job, JobBook, accepted
from persona_nns.runs.remote.payload import Payload, payload_of
from persona_nns.runs.request import Request
from persona_nns.runs.returned import declared_arrays

if TYPE_CHECKING:
    from persona_nns.runs.run import PlannedRun

#: A job may take about this long, return this much, and be asked with this much.
SECONDS_PER_JOB = 300.0
RESULT_BYTES_PER_JOB = 64e6
REQUEST_BYTES_PER_JOB = 900_000
#: Units of the first job, and of any.
FIRST_UNITS = 4
MOST_UNITS = 32
#: Jobs that wait or run on the server at a time.
IN_FLIGHT = 4
#: A batch is sent this many times at most when the server loses it.
MOST_SUBMISSIONS = 3
#: Answers "I do not know this job", in a row, about a job that it did know.
MOST_DENIALS = 3
#: Tries to fetch a result that cannot be read.
MOST_DOWNLOADS = 5

PATIENCE = Patience()


@dataclass
class _Flight:
    """A job that is waited for."""

    job: Job
    units: Sequence[Unit]
    due: float
    wait: float
    heard: float
    state: str = "submitted"
    seen: str = ""
    denials: int = 0
    failed_downloads: int = 0


@dataclass
class Dispatcher:
    """Carries out one request on the server that hosts its model."""

    request: Request
    model: TransformersModel
    hosted: HostedModel
    store: str | Path
    execution: Mapping[str, Any]
    batch_size: int | None
    patience: Patience
    progress: UnitProgress
    size: int = FIRST_UNITS
    proven: bool = False
    claims: Claims | None = None
    flights: list[_Flight] = field(default_factory=list[_Flight])
    environment: Environment | None = None

    def __post_init__(self) -> None:
        self.size = self.batch_size or FIRST_UNITS
        self.connection = Connection(self.hosted.server, self.patience, self.progress.tell)
        settings = [self.hosted.key, dict(self.execution)]
        self.book = JobBook(self.store, self.request.block, self.hosted.server.url, settings)

    @property
    def noun(self) -> str:
        """What a unit is called."""
        return self.request.plan.noun

    def run(self, pending: Sequence[Unit]) -> None:
        """Measure the units and write them."""
        waiting = deque(self._pick_up(pending))
        try:
            while waiting or self.flights:
                room = (IN_FLIGHT if self.proven else 1) - len(self.flights)
                while waiting and room > 0:
                    batch = [waiting.popleft() for _ in range(min(self.size, len(waiting)))]
                    waiting.extendleft(reversed(self._submit(batch)))
                    room -= 1
                flight = min(self.flights, key=lambda flight: flight.due)
                time.sleep(max(0.0, flight.due - time.monotonic()))
                waiting.extendleft(reversed(self._look(flight)))
                self.progress.states([flight.state for flight in self.flights])
        except BaseException as error:
            self._say_what_stays(error)
            raise
        finally:
            self.connection.close()
            if self.claims is not None:
                self.claims.end(now())

    def _pick_up(self, pending: Sequence[Unit]) -> list[Unit]:
        """Wait for the jobs of an earlier process too; returns the units that none is about."""
        by_label = {unit.label: unit for unit in pending}
        for job in self.book.waiting():
            if all(label in by_label for label in job.units):
                self.progress.tell(f"job {job.id}: picked up, {len(job.units)} {self.noun}s")
                self._take_off(job, [by_label.pop(label) for label in job.units])
        return list(by_label.values())

    def _submit(self, batch: Sequence[Unit], submissions: int = 1) -> list[Unit]:
        """Send a job for the first of some units; returns those that did not fit into it."""
        if self.environment is None:
            self.environment = read_environment(self.connection)
            for warning in self.environment.check(self.hosted.server.url):
                warnings.warn(warning, stacklevel=2)
        checks = not self.proven
        payload = payload_of(self.model, self.request, batch, self.execution, check=checks)
        left: list[Unit] = []
        if len(payload.data) > REQUEST_BYTES_PER_JOB and len(batch) > 1:
            half = len(batch) // 2
            batch, left = batch[:half], list(batch[half:])
            payload = payload_of(self.model, self.request, batch, self.execution, check=checks)
        self._check_python(payload)
        envelope = RequestModel(
            model_key=self.hosted.key, compress=True, env=self.model._remoteable_get_env()
        )
        identifier = self.connection.submit(envelope, payload.data)
        job = accepted(
            identifier,
            self.hosted.server.url,
            [unit.label for unit in batch],
            len(payload.data),
            submissions=submissions,
            checks_names=checks,
        )
        self.book.note(job)
        self.progress.tell(
            f"job {job.id}: sent, {len(batch)} {self.noun}s, {len(payload.data):,} bytes"
        )
        self._take_off(job, batch)
        return left

    def _check_python(self, payload: Payload) -> None:
        theirs = self.environment.python if self.environment else ""
        if payload.compiled and theirs and theirs != client_python():
            raise RemoteError(
                f"{', '.join(payload.compiled[:3])} can only be sent compiled, and the server runs "
                f"Python {theirs} (here {client_python()}); write it as a plain function in a file."
            )

    def _take_off(self, job: Job, units: Sequence[Unit]) -> None:
        moment = time.monotonic()
        first = self.patience.first
        self.flights.append(_Flight(job, units, due=moment + first, wait=first, heard=moment))

    def _look(self, flight: _Flight) -> list[Unit]:
        """Ask about a job once; returns units that have to be measured anew."""
        try:
            response = self.connection.poll(flight.job.id)
            if response is None:
                self._deny(flight)
            elif response.status == Status.COMPLETED:
                self._fetch(flight, response)
            else:
                self._note_state(flight, response)
        except JobTooLargeError as error:
            return self._smaller(flight, error)
        except JobLostError as error:
            return self._again(flight, error)
        except NotHostedError as error:
            raise self._what_is_hosted(flight, error) from error
        except RemoteError as error:
            if error.server_traceback:
                self._drop(flight)
            raise
        return []

    def _note_state(self, flight: _Flight, response: ResponseModel) -> None:
        news = f"{response.status.value} {response.description}"
        moment = time.monotonic()
        if news != flight.seen:
            flight.seen, flight.heard, flight.wait = news, moment, self.patience.first
            place = response.description.rpartition("position ")[2].rstrip(".")
            where = f" (position {place})" if place.isdigit() else ""
            flight.state = response.status.value.lower() + where
            self.progress.tell(f"job {flight.job.id}: {news}")
        flight.denials = 0
        if moment - flight.heard > self.patience.news:
            raise RemoteError(
                f"The job {flight.job.id} has been {flight.state} for {self.patience.news:.0f} s "
                "without news; it stays on the server, and the same command goes on waiting "
                "(--deadline SECONDS waits longer)."
            )
        self._wait_longer(flight)

    def _wait_longer(self, flight: _Flight) -> None:
        flight.wait = min(flight.wait * 1.5, self.patience.longest)
        flight.due = time.monotonic() + flight.wait

    def _deny(self, flight: _Flight) -> None:
        """The server knows no such job: not yet, or not any more."""
        flight.denials += 1
        gone = flight.denials >= MOST_DENIALS and bool(flight.seen)
        silent = time.monotonic() - flight.heard > self.patience.unknown
        if gone or (silent and flight.denials >= MOST_DENIALS):
            raise JobLostError(f"The server does not know the job {flight.job.id} any more.")
        self._wait_longer(flight)

    def _fetch(self, flight: _Flight, response: ResponseModel) -> None:
        """Take a result and write its units."""
        try:
            saved, n_bytes = self.connection.download(
                str(response.data), compressed=flight.job.compressed
            )
        except JobLostError as error:
            flight.failed_downloads += 1
            if flight.failed_downloads >= MOST_DOWNLOADS:
                raise
            self.progress.tell(f"job {flight.job.id}: {error}")
            self._wait_longer(flight)
            return
        outcome = saved["outcome"]
        for warning in outcome["warnings"]:
            warnings.warn(warning, stacklevel=2)
        self._check_precision(outcome["precision"])
        measured = self.request.finish(self.model.tokenizer, flight.units, outcome["measured"])
        arrays = declared_arrays(self.request, measured, len(flight.units))
        seconds = outcome["seconds"] / len(flight.units)
        if self.claims is None:
            self.claims = self._begin(outcome)
        self.claims.write(flight.units, arrays, seconds)
        self.book.written(flight.job, n_bytes, outcome["seconds"])
        self.flights.remove(flight)
        self.proven = True
        self.progress.tell(f"job {flight.job.id}: done, {n_bytes:,} bytes")
        self.progress.advance(len(flight.units))
        if self.batch_size is None:
            self.size = _fitting(seconds, n_bytes / len(flight.units))

    def _check_precision(self, precision: str) -> None:
        """See that the server computes as it did for the units that are there.

        Raises:
            RemoteError: it does not.
        """
        known = self.request.block.precision
        if known == HOSTED:
            self.request = self.request.as_hosted(precision)
        elif known != precision:
            raise RemoteError(
                f"The server runs {self.hosted.repo_id!r} in {precision} now, and this run was "
                f"measured in {known}; use another --store."
            )

    def _begin(self, outcome: Mapping[str, Any]) -> Claims:
        facts = self.environment.attributes() if self.environment else {}
        attrs = {
            **session_attributes(),
            **self.execution,
            **facts,
            "backend": self.hosted.server.url,
            "hosted_model": self.hosted.repo_id,
            "device": outcome["device"],
        }
        return Claims(self.store, self.request.blocks, session_name(), attrs)

    def _smaller(self, flight: _Flight, error: JobTooLargeError) -> list[Unit]:
        """Cells of a job that was too large, to go into jobs of half the size."""
        self._drop(flight)
        if len(flight.units) == 1:
            raise JobTooLargeError(
                f"{error} It held a single {self.noun}, {flight.units[0].label}; ask for fewer "
                "layers or positions at a time.",
                error.server_traceback,
            ) from error
        self.size = len(flight.units) // 2
        warnings.warn(f"{error} Going on with {self.size} {self.noun}s a job.", stacklevel=2)
        return list(flight.units)

    def _again(self, flight: _Flight, error: JobLostError) -> list[Unit]:
        """Send a lost job again."""
        self._drop(flight)
        if flight.job.submissions >= MOST_SUBMISSIONS:
            raise error
        self.progress.tell(f"{error} Sending it again.")
        return self._submit(flight.units, flight.job.submissions + 1)

    def _drop(self, flight: _Flight) -> None:
        self.flights.remove(flight)
        self.book.forget(flight.job)

    def _what_is_hosted(self, flight: _Flight, error: NotHostedError) -> NotHostedError:
        self._drop(flight)
        try:
            names = ", ".join(one.repo_id for one in read_deployments(self.connection)[:8])
        except RemoteError:
            names = "it does not say what it hosts"
        url = self.hosted.server.url
        return NotHostedError(
            f"The server {url} does not host {self.hosted.repo_id!r}; it hosts: {names} "
            "(persona-nns models --backend … lists them).",
            str(error),
        )

    def _say_what_stays(self, error: BaseException) -> None:
        if self.flights and not isinstance(error, PersonaError):
            n_jobs = len(self.flights)
            stay = "1 job stays" if n_jobs == 1 else f"{n_jobs} jobs stay"
            warnings.warn(
                f"{stay} on the server, and the same command takes what comes of it.", stacklevel=2
            )


def _fitting(seconds: float, n_bytes: float) -> int:
    """How many units a job may have, by what one takes."""
    fitting = min(SECONDS_PER_JOB / max(seconds, 1e-3), RESULT_BYTES_PER_JOB / max(n_bytes, 1.0))
    return min(max(1, int(fitting)), MOST_UNITS)


def carry_out_remotely(planned: "PlannedRun", hosted: HostedModel, *, progress: bool) -> None:
    """Measure on a server what the store does not hold yet.

    Args:
        planned: what to measure; its run group is where units are looked for.
        hosted: where the model runs.
        progress: show a bar.

    Raises:
        RemoteError: the server cannot be reached, or failed; what was measured is kept, and jobs
            that it still has are taken up by the next run.
    """
    request = _known_precision(planned.request, planned.store)
    done = planned.done()
    pending = [unit for unit in request.units if unit.label not in done]
    n_units = len(request.units)
    deadline = planned.deadline
    bar = UnitProgress(
        planned.title,
        request.plan.noun,
        n_units,
        n_units - len(pending),
        enabled=progress,
        verbose=planned.verbose,
    )
    if not pending:
        bar.nothing_to_do()
        return
    bar.begin(f"on {hosted.server.url}")
    with bar:
        Dispatcher(
            request=request,
            model=planned.model,
            hosted=hosted,
            store=planned.store,
            execution=planned.execution,
            batch_size=planned.batch_size,
            patience=PATIENCE if deadline is None else replace(PATIENCE, news=deadline),
            progress=bar,
            proven=bool(done),
        ).run(pending)


def _known_precision(request: Request, store: str | Path) -> Request:
    """The request with the precision that the store has its units in, if it has any."""
    if request.block.precision != HOSTED or not completed_units(store, request.block):
        return request
    runs = list_runs(store, request.block.experiment)
    (info,) = [info for info in runs if info.run == request.block.run]
    return request.as_hosted(str(info.attrs["precision"]))
