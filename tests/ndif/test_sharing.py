"""Several clients of one run on the real server: every cell once, and what a killed one leaves."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ndif_stack import NAME

import persona_nns as pn
from persona_nns.runs.remote.job_book import Job, read_jobs

BATCH = 2
CLIENT = f"""
import sys
import persona_nns as pn
model = pn.load_model("organism-qwen2", backend=sys.argv[1], label={NAME!r})
asked = dict(layers="2", batch_size={BATCH}, store=sys.argv[2], progress=False)
pn.run("localized_positions", model, "short", **asked)
"""


@pytest.fixture
def url(server: tuple[str, str]) -> str:
    mode, address = server
    if mode == "simulate":
        pytest.skip("The simulated server's clients are tested elsewhere.")
    return address


def start(url: str, store: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", CLIENT, url, str(store)])


def jobs_of(store: Path) -> list[Job]:
    runs = pn.list_runs(store) if store.exists() else []
    return [job for info in runs for job in read_jobs(store, info.experiment, info.run).values()]


@pytest.mark.parametrize("n_clients", [2, 4])
def test_clients_share_the_cells(n_clients: int, url: str, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    clients = [start(url, store) for _ in range(n_clients)]
    assert [client.wait(timeout=600) for client in clients] == [0] * n_clients
    (info,) = pn.list_runs(store)
    notes = list(info.group.sessions().values())
    jobs = jobs_of(store)
    print(f"{n_clients} clients: jobs of {[len(job.units) for job in jobs]} cells")
    assert info.n_completed == info.n_units == 12
    assert sum(note["n_written"] > 0 for note in notes) > 1
    # Those that begin at the same moment may have their first batch twice, no more.
    assert sum(len(job.units) for job in jobs) - 12 <= BATCH * n_clients
    assert {job.state for job in jobs} == {"written"}


def test_jobs_of_a_killed_client_are_taken_up(url: str, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    first = start(url, store)
    until = time.monotonic() + 300
    while not [job for job in jobs_of(store) if job.state == "waiting"]:
        assert time.monotonic() < until
        assert first.poll() is None
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    left = {job.id for job in jobs_of(store) if job.state == "waiting"}
    assert start(url, store).wait(timeout=600) == 0
    jobs = jobs_of(store)
    assert left <= {job.id for job in jobs if job.state == "written"}
    cells = [cell for job in jobs for cell in job.units]
    assert sorted(cells) == sorted(set(cells))
    assert len(cells) == 12
