"""Where models run: here, in a simulated server, or on an NDIF server."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal
from urllib.parse import urlsplit

from persona_nns.errors import UsageError, missing_extra

#: What the simulated server imports beside what is needed here.
SIMULATED = ("uvicorn", "starlette", "websockets", "python_multipart")
BACKENDS = "local, simulate, ndif, or the URL of a server such as https://ndif.example.org"


@dataclass(frozen=True)
class Server:
    """A server that runs jobs.

    Attributes:
        url: its address, without a slash at the end.
        sends_key: requests carry the API key.
    """

    url: str
    sends_key: bool = True

    @property
    def is_private(self) -> bool:
        """Whether nobody on the way reads what is sent (over https, or to this machine)."""
        return urlsplit(self.url).scheme == "https" or self.is_here

    @property
    def is_here(self) -> bool:
        """Whether it is on this machine."""
        return urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")

    def headers(self) -> dict[str, str]:
        """What identifies the user, where it can be sent; read anew each time, kept nowhere."""
        key = _api_key() if self.sends_key and self.is_private else None
        return {"ndif-api-key": key} if key else {}


def read_backend(backend: str) -> Server | Literal["local", "simulate"]:
    """What ``--backend`` names.

    Raises:
        UsageError: no such backend, or the packages of the simulated server are missing.
    """
    if backend == "local":
        return "local"
    if backend == "simulate":
        for package in SIMULATED:
            if find_spec(package) is None:
                raise missing_extra(f"The backend 'simulate' needs {package}", "simulate")
        return "simulate"
    url = _ndif_url() if backend == "ndif" else backend
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"Unknown backend {backend!r}; use {BACKENDS}.")
    if parts.username or parts.password:
        raise UsageError(
            "The URL of a server cannot hold a name or password; put the key into NDIF_API_KEY."
        )
    return Server(url.rstrip("/"))


def _ndif_url() -> str:
    from nnsight import CONFIG

    return os.environ.get("NDIF_HOST") or CONFIG.API.HOST


def _api_key() -> str | None:
    from nnsight import CONFIG

    return os.environ.get("NDIF_API_KEY") or CONFIG.API.APIKEY
