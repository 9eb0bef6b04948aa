"""A job that is waited for: when to ask again, and when to give up."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from nnsight.schema.response import ResponseModel

from persona_nns.declarations.plans import Unit
from persona_nns.errors import JobLostError, RemoteError
from persona_nns.runs.remote.connection import Patience
from persona_nns.runs.remote.job_book import Job

#: Answers "I do not know this job", in a row, about a job that it did know.
MOST_DENIALS = 3


@dataclass
class Flight:
    """A job that is waited for.

    Attributes:
        job: as it is noted.
        units: that it measures.
        patience: how long to wait for what.
        state: as it is shown.
    """

    job: Job
    units: Sequence[Unit]
    patience: Patience
    state: str = "submitted"
    due: float = 0.0
    failed_downloads: int = 0
    _wait: float = 0.0
    _heard: float = field(default_factory=time.monotonic)
    _seen: str = ""
    _denials: int = 0

    def __post_init__(self) -> None:
        self._wait = self.patience.first
        self.due = self._heard + self._wait

    def hear(self, response: ResponseModel) -> str | None:
        """Take note of a status; returns it where it is news.

        Raises:
            RemoteError: there was no news for too long.
        """
        news = f"{response.status.value} {response.description}"
        moment = time.monotonic()
        is_new = news != self._seen
        if is_new:
            self._seen, self._heard, self._wait = news, moment, self.patience.first
            self.state = state_of(response)
        self._denials = 0
        if moment - self._heard > self.patience.news:
            raise RemoteError(
                f"The job {self.job.id} has been {self.state} for {self.patience.news:.0f} s "
                "without news; it stays on the server, and the same command goes on waiting "
                "(--deadline SECONDS waits longer)."
            )
        self.wait_longer()
        return news if is_new else None

    def wait_longer(self) -> None:
        """Ask again, after a longer pause than the last."""
        self._wait = min(self._wait * 1.5, self.patience.longest)
        self.due = time.monotonic() + self._wait

    def deny(self) -> None:
        """The server knows no such job: not yet, or not any more.

        Raises:
            JobLostError: not any more.
        """
        self._denials += 1
        gone = self._denials >= MOST_DENIALS and bool(self._seen)
        silent = time.monotonic() - self._heard > self.patience.unknown
        if gone or (silent and self._denials >= MOST_DENIALS):
            raise JobLostError(f"The server does not know the job {self.job.id} any more.")
        self.wait_longer()


def state_of(response: ResponseModel) -> str:
    """A status in words, as ``queued (position 3)``."""
    place = response.description.rpartition("position ")[2].rstrip(".")
    where = f" (position {place})" if place.isdigit() else ""
    return response.status.value.lower() + where
