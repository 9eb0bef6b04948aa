"""Measure the units of a request on a server: several in one job, several jobs at a time.

The first job goes alone. It is small, checks the model's names, tells what the server computes
with, and shows how long a unit takes; the next ones grow (`sizing`). Every job is noted in the
store before it is waited for, so that whoever asks the same again takes its result instead of
running it again; clients that ask the same at one time share the units (`sharing`).
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnsight import TransformersModel
from nnsight.schema.response import ResponseModel, Status

from persona_nns.declarations.plans import Unit
from persona_nns.errors import (
    JobLostError,
    JobTooLargeError,
    NotHostedError,
    PersonaError,
    RemoteError,
)
from persona_nns.models.hosting import HostedModel
from persona_nns.models.records import HOSTED
from persona_nns.results.claims import Claims
from persona_nns.results.store import find_group
from persona_nns.runs.identity import now, session_attributes, session_name
from persona_nns.runs.progress import UnitProgress
from persona_nns.runs.remote.connection import Connection, Patience, job_error
from persona_nns.runs.remote.environment import read_deployments
from persona_nns.runs.remote.flights import Flight
from persona_nns.runs.remote.job_book import Job, JobBook
from persona_nns.runs.remote.sharing import Share
from persona_nns.runs.remote.sizing import units_per_job
from persona_nns.runs.remote.submission import Submitter
from persona_nns.runs.request import Request, told_of
from persona_nns.runs.returned import declared_arrays

if TYPE_CHECKING:
    from persona_nns.runs.run import PlannedRun

#: Jobs of this client that wait or run on the server at a time.
IN_FLIGHT = 4
#: A unit is sent this many times at most when the server loses its jobs.
MOST_SUBMISSIONS = 3
#: Tries to fetch a result that cannot be read.
MOST_DOWNLOADS = 5
_PAUSE = 1.0  # seconds between two looks at what others are at, at most

PATIENCE = Patience()


@dataclass
class Dispatcher:
    """Carries out one request on the server that hosts its model."""

    request: Request
    pending: Sequence[Unit]
    model: TransformersModel
    hosted: HostedModel
    store: str | Path
    execution: Mapping[str, Any]
    batch_size: int | None
    patience: Patience
    progress: UnitProgress
    proven: bool = False
    flights: list[Flight] = field(default_factory=list[Flight])

    def __post_init__(self) -> None:
        server = self.hosted.server
        self.connection = Connection(server, self.patience, self.progress.tell)
        settings = [self.hosted.key, dict(self.execution)]
        self.book = JobBook(self.store, self.request.block, server.url, settings)
        about = {"backend": server.url, "hosted_model": self.hosted.repo_id}
        session = {**session_attributes(), **self.execution, **about}
        self.claims = Claims(self.store, self.request.blocks, session_name(), session)
        self.submitter = Submitter(
            self.request, self.model, self.hosted, self.execution, self.connection
        )
        self.share = Share(self.pending, self.request.plan.units, self.claims, self.book)
        self.submissions: dict[str, int] = {}  # of a unit whose jobs were lost
        self.idle: tuple[int, float] | None = None  # with so many units left, since then

    @property
    def noun(self) -> str:
        """What a unit is called."""
        return self.request.plan.noun

    def run(self) -> None:
        """Measure the units and write them, beside any other client that does the same."""
        try:
            while self.share.n_left:
                self._fill()
                if self.flights:
                    flight = min(self.flights, key=lambda flight: flight.due)
                    time.sleep(max(0.0, flight.due - time.monotonic()))
                    self._look(flight)
                elif self.share.n_left:
                    time.sleep(min(_PAUSE, self.patience.longest))
                self.claims.stay()
                self.progress.look(len(self.request.units) - self.share.n_left)
                self.progress.states([flight.state for flight in self.flights])
            self.share.look()
            self._leave_what_is_done()
            for job in self.share.needless():
                self.book.forget(job)
        except BaseException as error:
            self._say_what_stays(error)
            raise
        finally:
            self.connection.close()
            self.claims.end(now())
            with suppress(OSError, PersonaError):  # a store that is gone stays as it is
                if not self.claims.others():
                    self.book.tidy()

    def _fill(self) -> None:
        """Take up jobs of clients that are gone, and send as many as may wait at a time."""
        if len(self.flights) >= self._room():
            return
        self.share.look()
        self._leave_what_is_done()
        while found := self.share.next_job(self._in_flight(), living=False):
            self._take_up(*found)
        while len(self.flights) < self._room() and self.share.n_left:
            units = self.share.next_units(self._size())
            if not units:
                break
            if self.share.take(units):
                self._send(units)
            self.share.look()
        if self.flights or not self.share.n_left:
            self.idle = None
        else:
            self._lose_patience()

    def _room(self) -> int:
        self.proven = self.proven or any(job.state == "written" for job in self.share.notes)
        return IN_FLIGHT if self.proven else 1

    def _size(self) -> int:
        return units_per_job(self.share.notes, self.batch_size, self.claims.name)

    def _in_flight(self) -> set[str]:
        return {flight.job.id for flight in self.flights}

    def _lose_patience(self) -> None:
        """Others are at all that is left: after a while, ask about their jobs, or do it too."""
        n_left = self.share.n_left
        if self.idle is None or self.idle[0] != n_left:
            self.idle = n_left, time.monotonic()
        if time.monotonic() - self.idle[1] < self.patience.others:
            return
        while found := self.share.next_job(self._in_flight(), living=True):
            job, units = found
            if self.share.take(units):
                self._wait_for(job, units)
            self.share.look()
        units = self.share.next_units(self._size(), claimed=True)
        if units and not self.flights and self.share.take(units):
            self._send(units)

    def _take_up(self, job: Job, units: Sequence[Unit]) -> None:
        """Look after a job of a client that is gone, unless another does by now."""
        if self.share.take(units):
            job = replace(job, session=self.claims.name)
            self.book.note(job)
            self.progress.tell(f"job {job.id}: picked up, {len(units)} {self.noun}s")
            self._wait_for(job, units)
        self.share.look()

    def _send(self, units: Sequence[Unit]) -> None:
        """Send a job for units, or for the first of them where they do not go into one."""
        job = self.submitter.send(
            units,
            submissions=1 + max(self.submissions.get(unit.label, 0) for unit in units),
            checks_names=not self.proven,
            session=self.claims.name,
        )
        sent, left = units[: len(job.units)], units[len(job.units) :]
        if not self.claims.has_joined:
            self.claims.join()
        self.book.note(job)
        self.progress.tell(
            f"job {job.id}: sent, {len(sent)} {self.noun}s, {job.request_bytes:,} bytes"
        )
        self._wait_for(job, sent)
        if left:
            self.share.put_back(left)

    def _wait_for(self, job: Job, units: Sequence[Unit]) -> None:
        self.flights.append(Flight(job, units, self.patience))

    def _look(self, flight: Flight) -> None:
        """Ask about a job once, and do what its status asks for."""
        response = self.connection.poll(flight.job.id)
        try:
            if response is None:
                flight.deny()
            elif response.status == Status.COMPLETED:
                self._fetch(flight, response)
            elif response.status == Status.ERROR:
                self.flights.remove(flight)
                raise job_error(response.description)
            elif news := flight.hear(response):
                self.progress.tell(f"job {flight.job.id}: {news}")
        except JobTooLargeError as error:
            self._smaller(flight, error)
        except JobLostError as error:
            self._again(flight, error)
        except NotHostedError as error:
            raise self._what_is_hosted(flight, error) from error
        except RemoteError:
            if flight not in self.flights:  # it will not give a result any more
                self.book.forget(flight.job)
            raise

    def _fetch(self, flight: Flight, response: ResponseModel) -> None:
        """Take a result and write its units, unless others have completed them."""
        self.share.look()
        if self.share.is_complete(flight.units):
            self._leave_what_is_done()
            return
        try:
            saved, n_bytes = self.connection.download(
                str(response.data), compressed=flight.job.compressed
            )
        except JobLostError as error:
            flight.failed_downloads += 1
            if flight.failed_downloads >= MOST_DOWNLOADS:
                raise
            self.progress.tell(f"job {flight.job.id}: {error}")
            flight.wait_longer()
            return
        outcome = saved["outcome"]
        for warning in outcome["warnings"]:
            warnings.warn(warning, stacklevel=2)
        self._learn(outcome)
        measured = self.request.finish(self.model.tokenizer, flight.units, outcome["measured"])
        arrays = declared_arrays(self.request, measured, len(flight.units))
        self.claims.write(flight.units, arrays, outcome["seconds"] / len(flight.units))
        self.book.written(flight.job, n_bytes, outcome["seconds"])
        self.flights.remove(flight)
        self.share.settle(flight.job.units)
        self.progress.tell(f"job {flight.job.id}: done, {n_bytes:,} bytes")

    def _learn(self, outcome: Mapping[str, Any]) -> None:
        """Take what a job tells of the server, and see that it is what it was.

        Precision and revision of a run never change. Its attention may: all implementations give
        the same numbers within rounding, so the run has the first one, and each session its own.

        Raises:
            RemoteError: the server computes in another precision, or on other weights, than for
                units that are there.
        """
        facts = outcome.get("server", {})
        self.request = _known(self.request, self.store)
        known, told = self.request.block.precision, outcome["precision"]
        if known == HOSTED:
            of_model = told, facts.get("attention"), facts.get("revision")
            self.request = self.request.as_hosted(*of_model)
        elif known != told:
            raise RemoteError(
                f"The server runs {self.hosted.repo_id!r} in {told} now, and this run was "
                f"measured in {known}; use another --store."
            )
        before, now_there = self.request.block.attrs.get("server_revision"), facts.get("revision")
        if before and now_there and before != now_there:
            raise RemoteError(
                f"The server has revision {now_there} of {self.hosted.repo_id!r} now, and this run "
                f"was measured on {before}; ask for that (--revision), or use another --store."
            )
        environment = self.submitter.environment
        says = environment.attributes() if environment else {}
        self.claims.know(
            self.request.blocks, {**says, "device": outcome["device"], "server": facts}
        )

    def _leave_what_is_done(self) -> None:
        """Wait no longer for jobs all of whose units others have completed."""
        for flight in [one for one in self.flights if self.share.is_complete(one.units)]:
            self.flights.remove(flight)
            if flight.job.id in {job.id for job in self.book.waiting()}:
                self.book.forget(flight.job)

    def _smaller(self, flight: Flight, error: JobTooLargeError) -> None:
        """Have the units of a job that was too large measured in smaller ones."""
        if len(flight.units) == 1:
            self.book.forget(flight.job)
            raise JobTooLargeError(
                f"{error} It held a single {self.noun}, {flight.units[0].label}; ask for fewer "
                "layers or positions at a time.",
                error.server_traceback,
            ) from error
        self.book.refused(flight.job)
        self.share.put_back(flight.units)
        self.share.look()
        warnings.warn(f"{error} Going on with {self._size()} {self.noun}s a job.", stacklevel=2)

    def _again(self, flight: Flight, error: JobLostError) -> None:
        """Have the units of a lost job measured again."""
        if flight in self.flights:
            self.flights.remove(flight)
        self.book.forget(flight.job)
        if flight.job.submissions >= MOST_SUBMISSIONS:
            raise error
        self.progress.tell(f"{error} Sending it again.")
        self.submissions |= dict.fromkeys(flight.job.units, flight.job.submissions)
        self.share.put_back(flight.units)

    def _what_is_hosted(self, flight: Flight, error: NotHostedError) -> NotHostedError:
        self.book.forget(flight.job)
        try:
            names = ", ".join(map(str, read_deployments(self.connection)[:8]))
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
    request = _known(planned.request, planned.store)
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
            pending=pending,
            model=planned.model,
            hosted=hosted,
            store=planned.store,
            execution=planned.execution,
            batch_size=planned.batch_size,
            patience=PATIENCE if deadline is None else replace(PATIENCE, news=deadline),
            progress=bar,
            proven=bool(done),
        ).run()


def _known(request: Request, store: str | Path) -> Request:
    """The request with what the store says of the server that measured, if it says anything."""
    group = find_group(store, request.block.experiment, request.block.run)
    if request.block.precision != HOSTED or group is None:
        return request
    return request.as_hosted(*told_of(group.attrs))
