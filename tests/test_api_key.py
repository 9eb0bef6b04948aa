"""The API key goes to the server that it is for, and nowhere else."""

from collections.abc import Callable
from functools import partial

import httpx
import pytest

from persona_nns.errors import AccessError, RemoteError
from persona_nns.models.servers import Server, read_backend
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
