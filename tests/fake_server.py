"""A server without a model, within the tests' process: what clients send to it, and when.

It takes the place of the connection and of the payload, so that any number of clients may run as
threads. Values follow from the labels, as in the README's experiment: one number a cell.
"""

import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from nnsight.schema.response import ResponseModel, Status

from persona_nns.runs.remote import dispatch, submission
from persona_nns.runs.remote.payload import Payload

TOO_LARGE = "torch.OutOfMemoryError: CUDA out of memory"
FACTS: dict[str, Any] = {"attention": "sdpa", "precision": "float32", "device": "cuda:0"}


@dataclass
class FakeServer:
    """Runs jobs one after another.

    Attributes:
        most: units that fit into a job's memory.
        seconds: that a unit takes.
        silent: jobs are accepted, and never run.
        facts: what it says of itself, beside `FACTS`.
    """

    most: int = 1000
    seconds: float = 0.0
    silent: bool = False
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    sent: list[list[str]] = field(default_factory=list[list[str]])
    refused: list[int] = field(default_factory=list[int])
    results: dict[str, tuple[float, list[str]]] = field(default_factory=dict)
    free_at: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def measured(self) -> Counter[str]:
        """How often each unit was measured."""
        return Counter(
            label for labels in self.sent if len(labels) <= self.most for label in labels
        )

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Be what clients are connected to."""
        server = self

        class Connection:
            def __init__(self, *_: Any) -> None:
                pass

            def close(self) -> None:
                pass

            def ask(self, path: str) -> Any:
                assert path == "/env"
                return {}

            def submit(self, _envelope: Any, payload: bytes) -> str:
                return server.accept(json.loads(payload))

            def poll(self, job: str) -> ResponseModel | None:
                return server.status(job)

            def download(self, url: str, *, compressed: bool) -> tuple[dict[str, Any], int]:
                assert compressed
                return {"outcome": server.outcome(server.results[url][1])}, 100

        def payload_of(*arguments: Any, **_: Any) -> Payload:
            return Payload(json.dumps([unit.label for unit in arguments[2]]).encode(), ())

        monkeypatch.setattr(dispatch, "Connection", Connection)
        monkeypatch.setattr(submission, "payload_of", payload_of)

    def accept(self, labels: list[str]) -> str:
        job = uuid.uuid4().hex
        with self.lock:
            self.sent.append(labels)
            self.free_at = max(self.free_at, time.monotonic()) + self.seconds * len(labels)
            self.results[job] = self.free_at, labels
        return job

    def status(self, job: str) -> ResponseModel | None:
        if job not in self.results:
            return None
        ready, labels = self.results[job]
        if self.silent or time.monotonic() < ready:
            return ResponseModel(id=job, status=Status.RUNNING, description="Running.")
        if len(labels) > self.most:
            with self.lock:
                self.refused.append(len(labels))
            return ResponseModel(id=job, status=Status.ERROR, description=TOO_LARGE)
        return ResponseModel(id=job, status=Status.COMPLETED, description="Done.", data=job)

    def outcome(self, labels: Sequence[str]) -> dict[str, Any]:
        return {
            "measured": {"value": torch.tensor([value_of(label) for label in labels])},
            "warnings": [],
            "seconds": self.seconds * len(labels),
            "precision": "float32",
            "device": "cuda:0",
            "server": FACTS | self.facts,
        }


def value_of(label: str) -> float:
    """What the server measures in a cell."""
    return float(sum(label.encode()))
