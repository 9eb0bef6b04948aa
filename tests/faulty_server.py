"""The loopback server with faults that a test arms over HTTP, a program of its own.

``POST /_faults {"kind": …, "times": n}`` arms one, ``GET /_faults`` tells how many requests of
each kind got through to the server. The kinds:

| kind | what happens |
|---|---|
| submit_500, submit_503, submit_429 | a job is refused with that status |
| reply_lost | a job is accepted, and the answer breaks off |
| poll_500, poll_404 | a question about a job is answered with that status |
| poll_silent | a question about a job is answered "running" |
| poll_hangs | a question about a job is not answered |
| result_404, result_truncated, result_corrupt | a result is missing, breaks off, or is damaged |
"""

import asyncio
import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

SERVER = Path(__file__).parents[1] / "persona_nns" / "models" / "loopback" / "server.py"
PATHS = {"submit": "/request", "reply": "/request", "poll": "/response/", "result": "/results/"}


class Faults:
    """An application around the server's."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.armed: dict[str, int] = {}
        self.counts: Counter[str] = Counter()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif path == "/_faults":
            if scope["method"] == "POST":
                order = json.loads((await receive())["body"])
                self.armed = {order["kind"]: order["times"]} if order["kind"] else {}
                self.counts.clear()
            await answer(send, 200, json.dumps(self.counts).encode())
        else:
            for kind in self.armed:
                if path.startswith(PATHS[kind.partition("_")[0]]) and self.armed[kind] > 0:
                    self.armed[kind] -= 1
                    await self.fail(kind, scope, receive, send)
                    return
            self.counts[path.split("/")[1]] += 1
            await self.app(scope, receive, send)

    async def fail(self, kind: str, scope: Any, receive: Any, send: Any) -> None:
        what = kind.partition("_")[2]
        if what.isdigit():
            await answer(send, int(what), b'{"detail": "armed"}', {"retry-after": "0"})
        elif what == "hangs":
            await asyncio.sleep(3600)
        elif what == "silent":
            job = scope["path"].rpartition("/")[2]
            words = {"id": job, "status": "RUNNING", "description": "Still at it."}
            await answer(send, 200, json.dumps(words).encode())
        else:
            self.counts[scope["path"].split("/")[1]] += 1
            start, body = await collect(self.app, scope, receive)
            if what == "corrupt":
                body = body[: len(body) // 2] + bytes(len(body) - len(body) // 2)
            await send(start)
            if what in ("truncated", "lost"):  # more was announced than comes
                await send(
                    {
                        "type": "http.response.body",
                        "body": body[: len(body) // 2],
                        "more_body": True,
                    }
                )
            else:
                await send({"type": "http.response.body", "body": body})


async def answer(
    send: Any, status: int, body: bytes, headers: dict[str, str] | None = None
) -> None:
    named = {"content-type": "application/json", **(headers or {})}
    encoded = [(name.encode(), value.encode()) for name, value in named.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


async def collect(app: Any, scope: Any, receive: Any) -> tuple[Any, bytes]:
    """What an application would have sent."""
    messages: list[Any] = []

    async def keep(message: Any) -> None:
        messages.append(message)

    await app(scope, receive, keep)
    return messages[0], b"".join(message.get("body", b"") for message in messages[1:])


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("loopback_server", SERVER)
    assert spec is not None
    assert spec.loader is not None
    server = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(server)
    server.serve(server.parse_arguments().parse_args(), Faults)
