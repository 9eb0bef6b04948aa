"""One model behind the NDIF 0.1 protocol, for a client on the same machine.

    python server.py --model FOLDER --repo-id org/name [--port N] [--api-key K] [--dtype float32]

It is run by its path, in a process of its own, and imports nothing of the package around it; like
a hosted server it refuses to import what NDIF does not have (`MISSING`), so that what works here
has travelled with the request. It binds to 127.0.0.1 only: a request *is* a program.

Blocking jobs report on the websocket that they name; jobs without one are stored under their id
and polled, their results staged for download. The first line printed is the port.
"""

# nnsight makes classes that anyio defines late impossible, so they are defined first.
import anyio._backends._asyncio  # isort: skip
import anyio.abc  # noqa: F401 # isort: skip

import argparse
import asyncio
import contextlib
import io
import json
import linecache
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, thread
from types import FrameType
from typing import Any

import torch
import uvicorn
import zstandard
from nnsight import TransformersModel
from nnsight.ndif import get_local_env
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status
from nnsight.tracing.globals import BLOCKS, SOURCES
from nnsight.tracing.tracer import _saves, dec, inc
from nnsight.tracing.util import clean_traceback, filter_traceback
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

#: What a hosted server does not have.
MISSING = ("persona_nns", "xarray", "zarr", "seaborn", "typer")

Respond = Callable[..., None]


class LoadedModel:
    """The hosted model: runs one job at a time."""

    def __init__(self, folder: str, repo_id: str, dtype: str, attention: str | None) -> None:
        self.repo_id = repo_id
        self.keeps_attention = attention is not None
        self.model = TransformersModel(
            folder,
            task="text-generation",
            dispatch=True,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
        )
        self.model._module.requires_grad_(requires_grad=False)
        key = {"repo_id": repo_id, "revision": None, "task": "text-generation"}
        self.key = f"nnsight.modeling.transformers.TransformersModel:{json.dumps(key)}"

    def run(self, envelope: RequestModel, payload: bytes) -> bytes:
        """Execute a request; returns what it saved as NDIF sends it."""
        with _untouched(linecache.cache, SOURCES, BLOCKS):
            try:
                env = dict(envelope.env)
                if self.keeps_attention:
                    env.pop("attn_implementation", None)
                self.model._remoteable_set_env(env)  # an adapter, too
                tracer = RequestModel.deserialize(
                    payload, self.model._remoteable_persistent_objects(), envelope.compress
                )
                inc()
                try:
                    tracer.execute(tracer.info.code)
                    kept = _saves()
                    scope = tracer.info.frame.f_locals
                    saved = {name: value for name, value in scope.items() if id(value) in kept}
                finally:
                    dec()
                buffer = io.BytesIO()
                torch.save(saved, buffer)
            finally:
                self.model.interleaver.cancel()
        data = buffer.getvalue()
        return zstandard.ZstdCompressor(level=3).compress(data) if envelope.compress else data


def _is_theirs(frame: FrameType) -> bool:
    """Whether a frame of a traceback is the request's, not the server's."""
    return frame.f_code.co_filename not in (__file__, asyncio.tasks.__file__, thread.__file__)


@contextlib.contextmanager
def _untouched(*tables: dict[Any, Any]) -> Iterator[None]:
    """Give tables that a request writes to their content back."""
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, content in zip(tables, before, strict=True):
            table.clear()
            table.update(content)


class Service:
    """The protocol around a `LoadedModel`."""

    def __init__(self, model: LoadedModel, *, api_key: str | None, timeout: float | None) -> None:
        self.model = model
        self.api_key = api_key
        self.timeout = timeout
        self.pool = ThreadPoolExecutor(1)
        self.waiting = 0
        self.sessions: dict[str, asyncio.Queue[str | bytes]] = {}
        self.responses: dict[str, str] = {}
        self.results: dict[str, bytes] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    def routes(self) -> Sequence[Route | WebSocketRoute]:
        """The paths of the protocol."""
        return [
            Route("/request", self.submit, methods=["POST"]),
            WebSocketRoute("/subscribe", self.subscribe),
            Route("/response/{id}", self.response),
            Route("/results/{id}", self.result),
            Route("/status", self.status),
            Route("/env", self.environment),
            Route("/whoami", self.whoami),
            Route("/ping", self.ping),
        ]

    async def submit(self, request: Request) -> Response:
        """``POST /request``: an envelope (form field ``data``) and a payload (file ``blob``)."""
        key = request.headers.get("ndif-api-key")
        if self.api_key is not None and key != self.api_key:
            status, words = (403, "Invalid") if key else (401, "Missing or invalid")
            return JSONResponse({"detail": f"{words} API key."}, status)
        async with request.form(max_part_size=2**30) as form:
            envelope = RequestModel.model_validate_json(str(form["data"]))
            blob = form["blob"]
            assert isinstance(blob, UploadFile)
            payload = await blob.read()
        job = uuid.uuid4().hex
        base = str(request.base_url).rstrip("/")
        task = asyncio.create_task(self._carry_out(job, envelope, payload, base))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        words = "Your job has been received and is waiting to be queued."
        received = ResponseModel(id=job, status=Status.RECEIVED, description=words)
        return Response(received.model_dump_json(), media_type="application/json")

    async def _carry_out(self, job: str, envelope: RequestModel, payload: bytes, base: str) -> None:
        def respond(status: Status, words: str, data: Any = None, meta: Any = None) -> None:
            message = ResponseModel(id=job, status=status, description=words, data=data, meta=meta)
            if not envelope.session_id:
                self.responses[job] = message.model_dump_json()
            elif (session := self.sessions.get(envelope.session_id)) is not None:
                binary = isinstance(data, bytes)
                session.put_nowait(message.pickle() if binary else message.model_dump_json())

        self.waiting += 1
        respond(Status.QUEUED, f"Added to Queue at position {self.waiting}.")
        try:
            if envelope.model_key != self.model.key:
                words = f"Could not deploy this model. {envelope.model_key} is not served here."
                respond(Status.ERROR, words)
                return
            started = time.monotonic()
            data = await self._execute(envelope, payload, respond)
            if data is None:
                return
        finally:
            self.waiting -= 1
        meta = {"runtime": round(time.monotonic() - started, 4), "max_memory_usage": 0}
        done = "Your job has been completed."
        if envelope.session_id:
            respond(Status.COMPLETED, done, data, meta)
        else:
            self.results[job] = data
            respond(Status.COMPLETED, done, f"{base}/results/{job}", meta)

    async def _execute(
        self, envelope: RequestModel, payload: bytes, respond: Respond
    ) -> bytes | None:
        loop = asyncio.get_running_loop()

        def run() -> bytes:
            words = "Your job has started running."
            loop.call_soon_threadsafe(respond, Status.RUNNING, words)
            return self.model.run(envelope, payload)

        started = time.monotonic()
        try:
            return await asyncio.wait_for(loop.run_in_executor(self.pool, run), self.timeout)
        except TimeoutError:
            words = f"Your job exceeded the execution timeout of {self.timeout}s."
        except Exception as error:  # whatever a request raises is its answer
            origin = getattr(error, "__intervention_tb__", None) or error.__traceback__
            theirs = filter_traceback(clean_traceback(origin), _is_theirs)
            lines = traceback.format_exception(type(error), error, theirs)
            words = "".join(lines)
        respond(Status.ERROR, words, meta={"runtime": round(time.monotonic() - started, 4)})
        return None

    async def subscribe(self, socket: WebSocket) -> None:
        """``/subscribe``: a session id, then whatever happens to the jobs that name it."""
        await socket.accept()
        session = uuid.uuid4().hex
        queue = self.sessions[session] = asyncio.Queue()
        await socket.send_json({"session_id": session})

        async def forward() -> None:
            while True:
                message = await queue.get()
                if isinstance(message, bytes):
                    await socket.send_bytes(message)
                else:
                    await socket.send_text(message)

        async def watch() -> None:
            with contextlib.suppress(WebSocketDisconnect):
                while True:
                    await socket.receive_text()

        tasks = [asyncio.create_task(forward()), asyncio.create_task(watch())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        del self.sessions[session]

    async def response(self, request: Request) -> Response:
        """``GET /response/{id}``: the latest status of a job that names no session."""
        job = request.path_params["id"]
        if job not in self.responses:
            return JSONResponse({"detail": f"No response for request {job}."}, 404)
        return Response(self.responses[job], media_type="application/json")

    async def result(self, request: Request) -> Response:
        """``GET /results/{id}``: what a job saved."""
        data = self.results.get(request.path_params["id"])
        if data is None:
            return JSONResponse({"detail": "NoSuchKey"}, 404)
        return Response(data, media_type="application/octet-stream")

    async def status(self, request: Request) -> Response:  # noqa: ARG002
        """``GET /status``: what is hosted."""
        entry = {
            "deployment_level": "HOT",
            "application_state": "RUNNING",
            "model_key": self.model.key,
            "repo_id": self.model.repo_id,
            "revision": None,
            "task": "text-generation",
            "trust_remote_code": False,
        }
        return JSONResponse({"deployments": {f"r0:ModelActor:{self.model.key}": entry}})

    async def environment(self, request: Request) -> Response:  # noqa: ARG002
        """``GET /env``: Python and packages."""
        return JSONResponse(get_local_env())

    async def whoami(self, request: Request) -> Response:
        """``GET /whoami``: whose the key is."""
        known = self.api_key is not None and request.headers.get("ndif-api-key") == self.api_key
        return JSONResponse({"email": "somebody@localhost" if known else None, "tags": []})

    async def ping(self, request: Request) -> Response:  # noqa: ARG002
        """``GET /ping``."""
        return PlainTextResponse("pong")


def parse_arguments() -> argparse.ArgumentParser:
    """The options of the server."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--repo-id", required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--api-key")
    parser.add_argument("--dtype", default="float32")
    # A server may have its own, as NDIF 0.1 does; by default it takes what a request asks for.
    parser.add_argument("--attention")
    parser.add_argument("--timeout", type=float)
    parser.add_argument("--until-stdin-closes", action="store_true")
    return parser


def serve(
    options: argparse.Namespace, wrap: Callable[[Starlette], Callable[..., Awaitable[None]]] | None
) -> None:
    """Host a model until the process is ended.

    Args:
        options: of `parse_arguments`.
        wrap: makes another application of the server's, for tests.
    """
    for name in MISSING:
        sys.modules[name] = None  # type: ignore[assignment] # as where it is not installed
    model = LoadedModel(options.model, options.repo_id, options.dtype, options.attention)
    service = Service(model, api_key=options.api_key, timeout=options.timeout)
    app = Starlette(routes=service.routes())
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", options.port))
    listener.listen()  # before the port is told: a client may come at once
    print(listener.getsockname()[1], flush=True)  # noqa: T201 - whoever starts it reads the port
    config = uvicorn.Config(wrap(app) if wrap else app, log_level="warning")
    server = uvicorn.Server(config)
    if options.until_stdin_closes:
        _watch_stdin(server)
    server.run(sockets=[listener])


def _watch_stdin(server: uvicorn.Server) -> None:
    """End with the process that started this one, however that one ends."""
    import threading

    def watch() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    serve(parse_arguments().parse_args(), None)
