"""The real server for the time of a test session: each mode is started once."""

import os
from collections.abc import Iterator

import ndif_stack
import pytest
from ndif_stack import NAME
from nnsight import TransformersModel

import persona_nns as pn
from persona_nns.models.checkpoints import bundled_models
from persona_nns.models.loopback import LoopbackServer


@pytest.fixture(scope="session", params=["simulate", "trusted", "sandbox"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Name and address of each kind of server; ``NDIF_TRUSTED=URL`` is one that is up already."""
    mode = request.param
    folder = bundled_models()["organism-qwen2"]
    if mode == "simulate":
        loopback = LoopbackServer(str(folder), NAME, options=("--attention", "sdpa"))
        yield mode, loopback.address.url
        loopback.stop()
    elif url := os.environ.get(f"NDIF_{mode.upper()}"):
        yield mode, url
    elif reason := ndif_stack.why_not():
        pytest.skip(reason)
    else:
        with ndif_stack.running(mode, {NAME: folder}) as running:
            yield mode, running.url


@pytest.fixture(scope="session")
def mode(server: tuple[str, str]) -> str:
    """Of the server: simulate, trusted or sandbox."""
    return server[0]


@pytest.fixture(scope="session")
def remote(server: tuple[str, str]) -> TransformersModel:
    """Client of the model on the server."""
    return pn.load_model("organism-qwen2", backend=server[1], label=NAME)


@pytest.fixture(scope="session")
def local() -> TransformersModel:
    """The same model here, under the same label, computed by eager attention."""
    return pn.load_model("organism-qwen2", label=NAME)
