"""The API key goes to the server that it is for, and nowhere else."""

import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import nnsight
import pytest
from nnsight import TransformersModel
from nnsight.schema.request import RequestModel
from readme_example import EXAMPLE

import persona_nns as pn
from persona_nns.errors import AccessError, RemoteError
from persona_nns.models.loopback import LoopbackServer
from persona_nns.models.servers import Server, read_backend
from persona_nns.prompts.grids import Grid
from persona_nns.runs.remote import connection
from persona_nns.runs.remote.connection import Connection, Patience

KEY = "sekret"
HASTE = Patience(unreachable=0.2, first=0.01, longest=0.02)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NDIF_API_KEY", KEY)


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("https://ndif.example.org", True),
        ("http://localhost:5001", True),
        ("http://127.0.0.1:5001", True),
        ("http://[::1]:5001", True),
        ("http://ndif.example.org", False),
        ("http://10.0.0.7:5001", False),
        ("http://localhost.example.org", False),
    ],
)
def test_the_key_is_sent_where_nobody_can_read_it(url: str, sent: bool) -> None:
    server = read_backend(url)
    assert isinstance(server, Server)
    assert (server.headers() == {"ndif-api-key": KEY}) is sent


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[httpx.Request]]:
    def answer(status: int, headers: dict[str, str] | None = None) -> list[httpx.Request]:
        seen: list[httpx.Request] = []

        def handle(request: httpx.Request) -> httpx.Response:
            seen.append(request)
            if request.url.host != "ndif.example.org":
                return httpx.Response(200, json={})
            return httpx.Response(status, headers=headers, json={"detail": "who are you?"})

        client = partial(httpx.Client, transport=httpx.MockTransport(handle))
        monkeypatch.setattr(connection.httpx, "Client", client)
        return seen

    return answer


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_does_not_carry_the_key_elsewhere(
    answering: Callable[..., list[httpx.Request]], status: int
) -> None:
    seen = answering(status, {"location": "https://elsewhere.example.com/status"})
    with pytest.raises(RemoteError, match=r"moved to https://elsewhere\.example\.com"):
        Connection(Server("https://ndif.example.org"), HASTE).ask("/status")
    assert {request.url.host for request in seen} == {"ndif.example.org"}
    assert KEY not in str(seen[-1].url)


def test_a_server_that_wants_a_key_over_http_is_told_of(
    answering: Callable[..., list[httpx.Request]],
) -> None:
    seen = answering(401)
    with pytest.raises(AccessError, match="over https only; use its https address"):
        Connection(Server("http://ndif.example.org"), HASTE).ask("/status")
    assert "ndif-api-key" not in seen[0].headers


class Recorder:
    """A server, or a proxy, that keeps what it is sent and says what it is told to."""

    def __init__(self, host: str) -> None:
        self.seen: list[str] = []
        self.status, self.headers, self.body = 200, dict[str, str](), b"{}"
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                sent = self.rfile.read(int(self.headers.get("content-length", 0)))
                recorder.seen.append(f"{self.requestline}\n{self.headers}\n{sent!r}")
                self.send_response(recorder.status)
                for name, text in recorder.headers.items():
                    self.send_header(name, text)
                self.send_header("content-length", str(len(recorder.body)))
                self.end_headers()
                self.wfile.write(recorder.body)

            do_GET = do_POST = do_CONNECT = answer  # noqa: N815

            def log_message(self, format: str, *_: Any) -> None:  # noqa: A002
                pass

        self.server = socketserver.ThreadingTCPServer((host, 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://{host}:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def recorder() -> Iterator[Callable[[str], Recorder]]:
    started: list[Recorder] = []

    def start(host: str) -> Recorder:
        started.append(Recorder(host))
        return started[-1]

    yield start
    for one in started:
        one.server.shutdown()
        one.server.server_close()


OTHER = "127.0.0.2"  # to the client, another machine

CALLS: dict[str, Callable[[Connection], object]] = {
    "ask": lambda connection: connection.ask("/status"),
    "poll": lambda connection: connection.poll("1"),
    "submit": lambda connection: connection.submit(RequestModel(model_key="m"), b"block"),
}


@pytest.mark.parametrize("call", CALLS)
def test_nothing_that_is_sent_over_http_to_another_machine_holds_the_key(
    recorder: Callable[[str], Recorder], call: str
) -> None:
    there = recorder(OTHER)
    with pytest.raises(RemoteError) if call != "ask" else nullcontext():
        CALLS[call](Connection(Server(there.url), HASTE))
    assert there.seen
    assert KEY not in "".join(there.seen)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("status", [302, 307, 308])
def test_a_redirect_of_any_request_is_not_followed(
    recorder: Callable[[str], Recorder], call: str, status: int
) -> None:
    here, elsewhere = recorder("127.0.0.1"), recorder(OTHER)
    here.status, here.headers = status, {"location": f"{elsewhere.url}/status"}
    with pytest.raises(RemoteError, match="has moved to"):
        CALLS[call](Connection(Server(here.url), HASTE))
    assert KEY in here.seen[0]
    assert elsewhere.seen == []


def test_a_result_is_fetched_without_the_key_wherever_it_is(
    recorder: Callable[[str], Recorder],
) -> None:
    here, elsewhere = recorder("127.0.0.1"), recorder(OTHER)
    here.status, here.headers = 302, {"location": f"{elsewhere.url}/result"}
    with pytest.raises(RemoteError, match="could not be fetched"):
        Connection(Server(here.url), HASTE).download(f"{here.url}/results/1", compressed=False)
    assert elsewhere.seen
    assert KEY not in "".join([*here.seen, *elsewhere.seen])


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY"])
def test_a_proxy_is_not_told_what_is_for_this_machine(
    recorder: Callable[[str], Recorder], monkeypatch: pytest.MonkeyPatch, call: str, variable: str
) -> None:
    here, proxy = recorder("127.0.0.1"), recorder(OTHER)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in (variable, variable.lower()):
        monkeypatch.setenv(name, proxy.url)
    with pytest.raises(RemoteError) if call != "ask" else nullcontext():
        CALLS[call](Connection(Server(here.url), HASTE))
    assert proxy.seen == []
    assert KEY in here.seen[0]


def test_nnsight_itself_sends_the_key_nowhere(
    recorder: Callable[[str], Recorder],
    monkeypatch: pytest.MonkeyPatch,
    random_folder: Callable[[str], Path],
    small_grid: Grid,
    tmp_path: Path,
) -> None:
    """A whole run on a server, where everything that nnsight would ask is at another address."""
    elsewhere = recorder(OTHER)
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", elsewhere.url)
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", KEY)
    (tmp_path / "norms.py").write_text(EXAMPLE)
    folder = random_folder("qwen2")
    server = LoopbackServer(str(folder), "tiny/qwen2")
    try:
        model: TransformersModel = pn.load_model(
            folder, backend=server.address.url, label="tiny/qwen2"
        )
        settings: dict[str, Any] = {"cells": "chef/haiku", "store": tmp_path / "s.zarr"}
        pn.run(tmp_path / "norms.py", model, small_grid, **settings)
    finally:
        server.stop()
    assert elsewhere.seen == []
