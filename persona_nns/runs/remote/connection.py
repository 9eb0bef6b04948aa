"""One server over HTTP: jobs in, statuses and results out, and what to do when it falters.

Jobs are submitted without a websocket. The server then keeps what happens to them under their
id, so that any process can ask again; a job on a websocket is lost with the connection.
"""

import io
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import httpx
import torch
import zstandard
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel
from pydantic import ValidationError
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay
from tenacity.wait import wait_exponential_jitter

from persona_nns.errors import (
    AccessError,
    JobFailedError,
    JobLostError,
    JobTooLargeError,
    NotHostedError,
    RemoteError,
    UnreachableError,
    first_line,
    says_out_of_memory,
)
from persona_nns.models.servers import Server

_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_MISSING = re.compile(r"ModuleNotFoundError: (?:No module named '|import of )(?P<name>[\w.]+).*")
# What nnsight and peft name where an adapter cannot be attached, or a server has left it out.
_ADAPTER = re.compile(r"adapter_config\.json|peft|PEFT|lora_[AB]\b|\.base_layer\b|Target modules")
_TRACEBACK = "Traceback (most recent call last)"
# What the server says of a job that failed through no fault of its own.
_NO_FAULT = (
    "Replica was evicted",
    "Critical server error",
    "Error submitting request to model deployment",
    "Error starting model",
    "Error provisioning model",
)


@dataclass(frozen=True)
class Patience:
    """How long to wait for what, in seconds.

    Attributes:
        unreachable: for a server that does not answer, or only with errors.
        news: for a job whose status does not change.
        unknown: for a job that the server does not know (yet).
        first: before a job is asked about for the first time, and between tries at first.
        longest: between two questions at most.
        read: for one answer.
        others: for what another client is at, where there is nothing else.
    """

    unreachable: float = 600.0
    news: float = 3600.0
    unknown: float = 60.0
    first: float = 0.25
    longest: float = 15.0
    read: float = 120.0
    others: float = 60.0


class Connection:
    """Requests to one server; failures that pass are tried again until patience ends."""

    def __init__(
        self, server: Server, patience: Patience, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        self.server = server
        self.patience = patience
        self._tell = tell
        timeout = httpx.Timeout(min(10.0, patience.read), read=patience.read)
        # A redirect would carry the key elsewhere, and so would a proxy that the environment
        # names: over https it sees nothing, but what is for this machine would pass it in plain.
        self._http = httpx.Client(timeout=timeout, trust_env=not server.is_here)

    def close(self) -> None:
        """Close what is open."""
        self._http.close()

    def submit(self, envelope: RequestModel, payload: bytes) -> str:
        """Send a job; returns its id.

        Where the answer is lost on the way, the job is sent again: the server cannot be asked
        which jobs it has.
        """
        headers = {
            **self.server.headers(),
            "nnsight-version": version("nnsight"),
            "python-version": sys.version,
        }

        def post() -> str:
            answer = self._http.post(
                f"{self.server.url}/request",
                data={"data": envelope.metadata()},
                files={"blob": ("request", payload, "application/octet-stream")},
                headers=headers,
            )
            answer.raise_for_status()
            return ResponseModel.model_validate_json(answer.text).id

        return self._persist(post)

    def poll(self, job: str) -> ResponseModel | None:
        """The latest status of a job; None where the server knows none."""

        def get() -> ResponseModel | None:
            answer = self._http.get(
                f"{self.server.url}/response/{job}", headers=self.server.headers()
            )
            if answer.status_code == 404:
                return None
            answer.raise_for_status()
            return ResponseModel.model_validate_json(answer.text)

        return self._persist(get)

    def download(self, url: str, *, compressed: bool) -> tuple[dict[str, Any], int]:
        """What a job saved, and how many bytes it took.

        Raises:
            JobLostError: there is no such result (any more), or it cannot be read.
        """
        try:
            answer = self._http.get(url, follow_redirects=True)
            answer.raise_for_status()
            content = answer.content
            data = zstandard.ZstdDecompressor().decompress(content) if compressed else content
            # Numbers and texts only: a result is not a program.
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), len(content)
        except Exception as error:
            raise JobLostError(
                f"The result of a job could not be fetched from {self.server.url}: "
                f"{type(error).__name__}: {first_line(error)}."
            ) from error

    def ask(self, path: str) -> Any:
        """What a path of the server answers, as JSON."""

        def get() -> Any:
            answer = self._http.get(f"{self.server.url}{path}", headers=self.server.headers())
            answer.raise_for_status()
            return answer.json()

        return self._persist(get)

    def _persist(self, call: Callable[[], Any]) -> Any:
        patience = self.patience
        retrying = Retrying(
            retry=retry_if_exception(_passes),
            wait=_Wait(patience.first, patience.longest),
            stop=stop_after_delay(patience.unreachable),
            before_sleep=self._say_why,
            reraise=True,
        )
        try:
            return retrying(call)
        except (httpx.HTTPError, ValidationError, ValueError) as error:
            raise self._named(error) from error

    def _say_why(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        wait = state.next_action.sleep if state.next_action else 0.0
        self._tell(f"{self.server.url} does not answer ({_reason(error)}); again in {wait:.1f} s")

    def _named(self, error: Exception) -> RemoteError:
        """One of our errors for one of the network's."""
        url = self.server.url
        if isinstance(error, httpx.HTTPStatusError):
            status, detail = error.response.status_code, _detail(error.response)
            if status in (401, 403):
                if not self.server.is_private:
                    return AccessError(
                        f"The server {url} wants an API key ({detail}), which is sent over https "
                        "only; use its https address."
                    )
                return AccessError(
                    f"The server {url} does not accept the API key ({detail}); set NDIF_API_KEY to "
                    "yours, or save it with `nnsight login`."
                )
            if error.response.is_redirect:
                there = error.response.headers.get("location", "nowhere")
                return RemoteError(f"The server {url} has moved to {there}; give that --backend.")
            if status not in _TRY_AGAIN:
                return RemoteError(f"The server {url} refuses the request ({status}: {detail}).")
        if isinstance(error, httpx.HTTPError):
            return UnreachableError(
                f"The server {url} did not answer for {self.patience.unreachable:.0f} s "
                f"({_reason(error)}); what it was given stays there, and the same command goes on."
            )
        return RemoteError(f"The server {url} does not speak NDIF's protocol ({_reason(error)}).")


class _Wait(wait_exponential_jitter):
    """Exponential backoff with jitter, or as long as the server asks for."""

    def __init__(self, first: float, longest: float) -> None:
        super().__init__(multiplier=first, max=longest, jitter=first)

    def __call__(self, retry_state: RetryCallState) -> float:
        error = retry_state.outcome.exception() if retry_state.outcome else None
        if isinstance(error, httpx.HTTPStatusError):
            asked = error.response.headers.get("retry-after", "")
            if asked.isdigit():
                return min(float(asked), self.max)
        return super().__call__(retry_state)


def _passes(error: BaseException) -> bool:
    """Whether it may be gone at the next try."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in _TRY_AGAIN
    return isinstance(error, httpx.TransportError) and not isinstance(
        error, httpx.UnsupportedProtocol
    )


def job_error(description: str) -> RemoteError:
    """The error for what a server says of a job that failed."""
    text = description.strip()
    last = text.splitlines()[-1] if text else "no reason given"
    if says_out_of_memory(text):
        return JobTooLargeError("A job did not fit into the server's memory.", text)
    if "exceeded the execution timeout" in text:
        return JobTooLargeError(f"A job took too long for the server: {last}")
    if text.startswith("Could not deploy this model"):
        return NotHostedError(f"The server does not host the model: {text}")
    if any(text.startswith(words) for words in _NO_FAULT):
        return JobLostError(f"The server lost a job: {last}")
    if missing := _MISSING.fullmatch(last):
        return JobFailedError(
            f"The experiment needs {missing['name']!r} in measure, which the server does not have; "
            "compute without it there, or, if it is code of your own, import what you need of it "
            "by name at the top of the file.",
            text,
        )
    ours, _, sentence = last.partition(": ")
    raised = _TRACEBACK in text
    if raised and ours.rpartition(".")[2] in ("PersonaError", "UsageError") and sentence:
        return JobFailedError(sentence, text)
    if _ADAPTER.search(reason := last if raised else text.partition("\n")[0]):
        return JobFailedError(
            f"The server did not attach the adapter ({reason.strip().rstrip('.')}); it needs peft, "
            "and fetches an adapter itself: by its hub id, or from a folder that it sees under the "
            "same path.",
            text,
        )
    if not raised:
        return RemoteError(f"The server ended a job: {last}")
    return JobFailedError(f"The experiment failed on the server: {last}", text)


def client_python() -> str:
    """The version of Python that runs here, as ``3.11``."""
    return ".".join(platform.python_version_tuple()[:2])


def _detail(response: httpx.Response) -> str:
    """What the server says beside the status."""
    try:
        body = response.json()
    except ValueError:
        return response.text.strip()[:200] or response.reason_phrase
    return str(body.get("detail", body)) if isinstance(body, dict) else str(body)


def _reason(error: BaseException | None) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"{error.response.status_code} {error.response.reason_phrase}"
    return "no answer" if error is None else first_line(error)
