"""Send units (say, cells) to a server as a job."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnsight import TransformersModel
from nnsight.schema.request import RequestModel

from persona_nns.declarations.plans import Unit
from persona_nns.errors import RemoteError
from persona_nns.models.hosting import HostedModel
from persona_nns.runs.remote.connection import Connection, client_python
from persona_nns.runs.remote.environment import Environment, read_environment
from persona_nns.runs.remote.job_book import Job, accepted
from persona_nns.runs.remote.payload import Payload, payload_of
from persona_nns.runs.request import Request

#: A job may be asked with about this much.
REQUEST_BYTES_PER_JOB = 900_000


@dataclass
class Submitter:
    """Sends the jobs of one request.

    Attributes:
        request: what is measured.
        model: the client of the hosted model.
        hosted: where it runs.
        execution: arguments of `measure` that do not change its numbers.
        connection: to the server.
        environment: what the server runs on; None before it was asked.
    """

    request: Request
    model: TransformersModel
    hosted: HostedModel
    execution: Mapping[str, Any]
    connection: Connection
    environment: Environment | None = None

    def send(self, units: Sequence[Unit], **noted: Any) -> Job:
        """Send a job for the first of some units: as many as can be sent at once.

        Args:
            units: to measure.
            **noted: of the `Job`; one that ``checks_names`` does so.

        Raises:
            RemoteError: the server does not take it.
        """
        self._know_environment()
        check = bool(noted.get("checks_names"))
        payload = payload_of(self.model, self.request, units, self.execution, check=check)
        while len(payload.data) > REQUEST_BYTES_PER_JOB and len(units) > 1:
            units = units[: len(units) // 2]
            payload = payload_of(self.model, self.request, units, self.execution, check=check)
        self._check_python(payload)
        envelope = RequestModel(
            model_key=self.hosted.key, compress=True, env=self.model._remoteable_get_env()
        )
        identifier = self.connection.submit(envelope, payload.data)
        labels = [unit.label for unit in units]
        return accepted(identifier, self.hosted.server.url, labels, len(payload.data), **noted)

    def _know_environment(self) -> None:
        if self.environment is None:
            self.environment = read_environment(self.connection)
            for warning in self.environment.check(self.hosted.server.url):
                warnings.warn(warning, stacklevel=2)
            if self.hosted.adapter is not None:
                self.environment.check_adapter(self.hosted.server.url)

    def _check_python(self, payload: Payload) -> None:
        theirs = self.environment.python if self.environment else ""
        if payload.compiled and theirs and theirs != client_python():
            raise RemoteError(
                f"{', '.join(payload.compiled[:3])} can only be sent compiled, and the server runs "
                f"Python {theirs} (here {client_python()}); write it as a plain function in a file."
            )
