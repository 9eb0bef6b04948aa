"""What goes wrong between here and a server: nothing is lost, nothing runs twice without need."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import xarray as xr
from nnsight import TransformersModel
from readme_example import EXAMPLE

import persona_nns as pn
from persona_nns import errors
from persona_nns.models.loopback import LoopbackServer
from persona_nns.prompts.grids import Grid
from persona_nns.results.groups import open_group
from persona_nns.runs.remote import dispatch
from persona_nns.runs.remote.connection import Patience
from persona_nns.runs.remote.job_book import Job, read_jobs

FAULTY = Path(__file__).with_name("faulty_server.py")
KEY = "sekret-of-the-tests"
HASTE = Patience(unreachable=20, news=60, unknown=1, first=0.05, longest=0.2, read=10, others=2)
CELLS = "chef/haiku,yoda/policy"

pytestmark = pytest.mark.filterwarnings("ignore:The server .* runs other versions")


@pytest.fixture(scope="module")
def folder(random_folder: Callable[[str], Path]) -> Path:
    return random_folder("qwen2")


class Host:
    """The server of these tests, which can be killed and started again where it was."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running = self._start()

    def _start(self, *more: str) -> LoopbackServer:
        options = ["--api-key", KEY, "--timeout", "30", *more]
        return LoopbackServer(str(self.folder), "tiny/qwen2", script=FAULTY, options=options)

    def start_again(self) -> None:
        port = self.running.port
        self.running.stop()
        self.running = self._start("--port", str(port))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Host]:
    host = Host(folder)
    yield host
    host.running.stop()


@pytest.fixture(autouse=True)
def haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NDIF_API_KEY", KEY)
    monkeypatch.setattr(dispatch, "PATIENCE", HASTE)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The README's experiment, as a user's file."""
    file = tmp_path / "norms.py"
    file.write_text(EXAMPLE)
    return file


@pytest.fixture(scope="module")
def expected(
    random_model: Callable[[str], TransformersModel],
    small_grid: Grid,
    tmp_path_factory: pytest.TempPathFactory,
) -> xr.Dataset:
    """What the experiment measures here."""
    here = tmp_path_factory.mktemp("here")
    (here / "norms.py").write_text(EXAMPLE)
    settings: dict[str, Any] = {"cells": CELLS, "store": here / "s.zarr"}
    return pn.run(here / "norms.py", random_model("qwen2"), small_grid, **settings)


class Client:
    """Runs the experiment on the server."""

    def __init__(self, server: Host, folder: Path, grid: Grid, store: Path) -> None:
        self.url = server.running.address.url
        self.folder, self.grid, self.store = folder, grid, store

    def arm(self, kind: str, times: int = 1) -> None:
        httpx.post(f"{self.url}/_faults", json={"kind": kind, "times": times})

    def accepted(self) -> int:
        """Jobs that got through to the server since the last `arm`."""
        return httpx.get(f"{self.url}/_faults").json().get("request", 0)

    def model(self, url: str | None = None, label: str = "tiny/qwen2") -> TransformersModel:
        return pn.load_model(self.folder, backend=url or self.url, label=label)

    def run(self, own: Path, model: TransformersModel | None = None, **settings: Any) -> xr.Dataset:
        chosen = {"cells": CELLS, "store": self.store, **settings}
        return pn.run(own, model or self.model(), self.grid, **chosen)

    def jobs(self) -> list[Job]:
        """What the store notes of jobs."""
        runs = open_group(self.store, "norms", "r")
        names = list(runs.group_keys()) if runs is not None else []
        return [job for name in names for job in read_jobs(self.store, "norms", name).values()]


@pytest.fixture
def client(server: Host, folder: Path, small_grid: Grid, tmp_path: Path) -> Iterator[Client]:
    one = Client(server, folder, small_grid, tmp_path / "there.zarr")
    one.arm("", 0)
    yield one
    one.arm("", 0)


def agree(ours: xr.Dataset, theirs: xr.Dataset) -> None:
    np.testing.assert_allclose(ours.norm_ratio.values, theirs.norm_ratio.values, rtol=1e-4)
    assert ours.completed.sum() == 2


@pytest.mark.parametrize(
    ("kind", "times", "submissions"),
    [
        ("submit_500", 3, 1),
        ("submit_503", 2, 1),
        ("submit_429", 2, 1),
        ("reply_lost", 1, 2),
        ("poll_500", 3, 1),
        ("poll_404", 2, 1),
        ("result_404", 1, 1),
        ("result_truncated", 1, 1),
        ("result_corrupt", 1, 1),
        ("result_corrupt", dispatch.MOST_DOWNLOADS, 2),
    ],
)
def test_a_fault_that_passes_costs_time_only(
    client: Client, own: Path, expected: xr.Dataset, kind: str, times: int, submissions: int
) -> None:
    client.arm(kind, times)
    agree(client.run(own), expected)
    assert client.accepted() == submissions
    (job,) = client.jobs()
    assert job.state == "written"


def test_a_server_that_refuses_connections_for_a_while(
    client: Client, own: Path, expected: xr.Dataset
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def forward() -> None:
        time.sleep(1.0)
        asyncio.run(_forward(port, int(client.url.rpartition(":")[2])))

    threading.Thread(target=forward, daemon=True).start()
    agree(client.run(own, client.model(f"http://127.0.0.1:{port}")), expected)
    assert client.accepted() == 1


async def _forward(port: int, target: int) -> None:
    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(pipe(reader, there_writer), pipe(there_reader, writer))

    async with await asyncio.start_server(connect, "127.0.0.1", port) as listening:
        await listening.serve_forever()


def test_a_server_that_stays_away_is_one_sentence(
    client: Client, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "PATIENCE", Patience(unreachable=0.3, first=0.05, longest=0.1))
    model = client.model("http://127.0.0.1:9")
    with pytest.raises(errors.UnreachableError, match=r"http://127.0.0.1:9 did not answer for 0 s"):
        client.run(own, model)
    assert not client.store.exists()


def test_a_silent_job_ends_at_the_deadline_and_is_picked_up_later(
    client: Client, own: Path, expected: xr.Dataset
) -> None:
    client.arm("poll_silent", 1000)
    with pytest.raises(errors.RemoteError, match="has been running for 1 s without news"):
        client.run(own, deadline=1)
    (job,) = client.jobs()
    assert job.state == "waiting"
    assert client.accepted() == 1
    client.arm("", 0)
    agree(client.run(own), expected)
    assert client.accepted() == 0


def test_a_server_that_hangs_ends_at_the_deadline(
    client: Client, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = Patience(unreachable=5, first=0.05, longest=0.1, read=4)
    model = client.model()
    client.run(own, model, cells="chef/policy")  # the server is warm, and answers in time
    monkeypatch.setattr(dispatch, "PATIENCE", short)
    client.arm("poll_hangs", 1000)
    with pytest.raises(errors.UnreachableError, match="did not answer for 5 s"):
        client.run(own, model)
    client.arm("", 0)
    monkeypatch.setattr(dispatch, "PATIENCE", HASTE)
    client.run(own, model)
    assert client.accepted() == 0


SLOW = "    norms = {}\n"


def _slowed(own: Path, seconds: float) -> None:
    own.write_text(EXAMPLE.replace(SLOW, f"    import time\n    time.sleep({seconds})\n{SLOW}"))


def test_a_server_killed_and_started_again_in_the_middle_of_a_job(
    client: Client, server: Host, own: Path, expected: xr.Dataset
) -> None:
    _slowed(own, 1.0)

    def replace() -> None:
        while not client.jobs():
            time.sleep(0.05)
        server.start_again()

    killer = threading.Thread(target=replace)
    killer.start()
    result = client.run(own)
    killer.join()
    agree(result, expected)
    (job,) = client.jobs()
    assert job.submissions == 2


@pytest.mark.parametrize(
    ("blow", "code"),
    [pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow), (signal.SIGINT, 130)],
)
def test_a_client_that_ends_in_the_middle_of_a_job(
    client: Client, own: Path, expected: xr.Dataset, tmp_path: Path, blow: int, code: int
) -> None:
    _slowed(own, 1.0)
    grid = tmp_path / "small.toml"
    tables = {"personas": client.grid.personas, "tasks": client.grid.tasks}
    grid.write_text(
        "\n".join(
            f"[{name}]\n" + "\n".join(f'{key} = "{text}"' for key, text in table.items())
            for name, table in tables.items()
        )
    )
    request = ["run", own, "--model", client.folder, "--as", "tiny/qwen2", "--grid", grid]
    rest = ["--backend", client.url, "--store", client.store, "--cells", CELLS]
    # A shell starts what it leaves in the background, these tests perhaps, deaf to SIGINT.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from persona_nns.cli.commands import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, [*request, *rest])],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not client.jobs():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(0.3)  # until the client has come back from writing the job down
    process.send_signal(blow)
    said = process.communicate()[1]
    assert process.returncode == code, said
    if blow == signal.SIGINT:
        assert "1 job stays on the server, and the same command takes what comes of it" in said
        assert "Interrupted; completed cells are kept" in said
    assert client.accepted() == 1
    client.grid = pn.load_grid(grid)
    agree(client.run(own), expected)
    assert client.accepted() == 1


@pytest.mark.parametrize("key", ["wrong-sekret", ""])
def test_a_wrong_key_is_one_sentence_without_the_key(
    client: Client, own: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("NDIF_API_KEY", key)
    with pytest.raises(errors.AccessError, match="set NDIF_API_KEY") as caught:
        client.run(own)
    assert "sekret" not in str(caught.value)
    assert client.accepted() == 1
    assert not client.store.exists()


def test_a_model_that_is_not_hosted_is_one_sentence_with_those_that_are(
    client: Client, own: Path
) -> None:
    sentence = "does not host 'other/model'; it hosts: tiny/qwen2"
    with pytest.raises(errors.NotHostedError, match=sentence):
        client.run(own, client.model(label="other/model"))
    assert client.jobs() == []
    assert client.accepted() == 1


@pytest.mark.parametrize(
    ("line", "kind", "sentence"),
    [
        ("raise KeyError('gone')", errors.JobFailedError, "KeyError: 'gone'"),
        ("import xarray", errors.JobFailedError, "needs 'xarray' in measure, which the server"),
        ("import persona_nns", errors.JobFailedError, "needs 'persona_nns' in measure, which"),
        ("raise Variable('no')", errors.JobFailedError, "missing 1 required positional argument"),
        (
            "import torch; raise torch.OutOfMemoryError('CUDA out of memory')",
            errors.JobTooLargeError,
            "held a single cell, chef/haiku",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:A job did not fit")
def test_an_exception_in_the_experiment_is_told_with_its_traceback(
    client: Client, own: Path, line: str, kind: type[errors.RemoteError], sentence: str
) -> None:
    own.write_text(EXAMPLE.replace(SLOW, f"    {line}\n{SLOW}"))
    with pytest.raises(kind, match=sentence) as caught:
        client.run(own)
    number = own.read_text().splitlines().index(f"    {line}") + 1
    assert f"line {number}, in measure" in caught.value.server_traceback
    assert str(Path.cwd()) not in caught.value.server_traceback
    assert str(own.parent) not in caught.value.server_traceback
    assert all(job.state == "refused" for job in client.jobs())


def test_a_job_too_large_is_cut_in_half(client: Client, own: Path, expected: xr.Dataset) -> None:
    full = "if len(cells) > 1: raise MemoryError('DefaultCPUAllocator: not enough memory')"
    own.write_text(EXAMPLE.replace(SLOW, f"    {full}\n{SLOW}"))
    with pytest.warns(UserWarning, match="did not fit.* Going on with 1 cells a job"):
        agree(client.run(own), expected)
    assert sorted((job.state, len(job.units)) for job in client.jobs()) == [
        ("refused", 2),
        ("written", 1),
        ("written", 1),
    ]


def test_a_warning_of_the_experiment_is_heard_here(client: Client, own: Path) -> None:
    loud = "import warnings; warnings.warn('Short continuation.', stacklevel=2)"
    own.write_text(EXAMPLE.replace(SLOW, f"    {loud}\n{SLOW}"))
    with pytest.warns(UserWarning, match="Short continuation"):
        client.run(own)


def test_the_key_is_nowhere_in_the_store(client: Client, own: Path) -> None:
    client.run(own)
    files = [file for file in client.store.rglob("*") if file.is_file()]
    assert files
    assert all(KEY.encode() not in file.read_bytes() for file in files)
