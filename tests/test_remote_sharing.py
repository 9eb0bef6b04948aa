"""Clients that ask one server for the same: every unit once, and jobs of those that are gone."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import xarray as xr
from fake_server import FACTS, FakeServer, value_of
from nnsight import TransformersModel
from nnsight.schema.response import ResponseModel, Status
from readme_example import EXAMPLE

import persona_nns as pn
from persona_nns.errors import RemoteError
from persona_nns.models.loopback import LoopbackServer
from persona_nns.results import claims
from persona_nns.results.store import begin_group
from persona_nns.runs import plan_run
from persona_nns.runs.remote import dispatch
from persona_nns.runs.remote.connection import Patience
from persona_nns.runs.remote.job_book import Job, accepted, read_jobs
from persona_nns.runs.remote.sizing import MOST_REFUSED, units_per_job

HERE = Path(__file__).parent
HASTE = Patience(unreachable=20, news=60, unknown=1, first=0.02, longest=0.1, others=0.5)
N_CELLS = len(pn.load_grid("long").cells)
OWN = '''
"""A number for each cell, which the server of these tests makes up."""
from persona_nns import Variable

variables = {"value": Variable("cell", "value")}

def measure(model, cells):
    raise AssertionError("measured here")
'''

pytestmark = [
    pytest.mark.filterwarnings("ignore:The server .* does not say which versions"),
    pytest.mark.filterwarnings("ignore:The server .* runs other versions"),
    pytest.mark.filterwarnings("ignore:A job did not fit"),
]


@pytest.fixture(autouse=True)
def haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "PATIENCE", HASTE)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    server = FakeServer()
    server.install(monkeypatch)
    return server


@pytest.fixture(scope="module")
def model(random_folder: Callable[[str], Path]) -> TransformersModel:
    """Client of a hosted model; nothing answers at the address."""
    return pn.load_model(random_folder("qwen2"), backend="https://host.invalid", label="tiny/qwen2")


class Run:
    """The experiment in a store."""

    def __init__(self, folder: Path, model: TransformersModel) -> None:
        (folder / "own.py").write_text(OWN)
        self.file, self.store, self.model = folder / "own.py", folder / "s.zarr", model

    def __call__(self, **settings: Any) -> xr.Dataset:
        asked = {"store": self.store, "progress": False, **settings}
        return pn.run(self.file, self.model, "long", **asked)

    def plan(self, **settings: Any) -> Any:
        return plan_run(self.file, self.model, "long", store=self.store, **settings)

    def dispatcher(self, **settings: Any) -> dispatch.Dispatcher:
        """As a command makes one, for its parts."""
        made: list[dispatch.Dispatcher] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dispatch.Dispatcher, "run", lambda self: made.append(self))
            self.plan(**settings).carry_out(progress=False)
        return made[0]

    @property
    def name(self) -> str:
        return self.plan().request.block.run

    def jobs(self) -> list[Job]:
        return list(read_jobs(self.store, "own", self.name).values())

    def sessions(self) -> list[Any]:
        (info,) = pn.list_runs(self.store)
        return list(info.group.sessions().values())


@pytest.fixture
def run(tmp_path: Path, model: TransformersModel) -> Run:
    return Run(tmp_path, model)


def values_are_right(results: xr.Dataset) -> bool:
    cells = results.cell.values.tolist()
    return results.value.values[0].tolist() == [value_of(cell) for cell in cells]


@pytest.mark.parametrize("n_clients", [2, 4])
def test_clients_that_begin_together_measure_every_cell_once(
    server: FakeServer, run: Run, n_clients: int
) -> None:
    server.seconds = 0.01
    errors: list[BaseException] = []

    def work() -> None:
        try:
            run()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(n_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    measured = server.measured()
    assert len(measured) == N_CELLS
    print(f"{n_clients} clients: {[len(job) for job in server.sent]}")
    assert sum(measured.values()) - N_CELLS <= n_clients * len(server.sent[0])
    results = pn.open_results(run.store, "own")
    assert values_are_right(results)
    notes = run.sessions()
    assert len(notes) == n_clients
    # Two that measured one batch may come to write it at the same moment too.
    repeated = sum(note["n_written"] for note in notes) - N_CELLS
    assert 0 <= repeated <= sum(measured.values()) - N_CELLS
    assert sum(note["n_written"] > 0 for note in notes) > 1
    assert all(note["ended"] and note["claims"] == [] for note in notes)
    assert {job.state for job in run.jobs()} == {"written"}


def test_a_client_that_comes_later_repeats_nothing(server: FakeServer, run: Run) -> None:
    server.seconds = 0.02
    first = threading.Thread(target=run)
    first.start()
    while not run.store.exists() or not run.jobs():
        time.sleep(0.01)
    run()
    first.join()
    assert set(server.measured().values()) == {1}
    assert len(server.measured()) == N_CELLS


def waiting_job(run: Run, server: FakeServer, n_units: int = 4, **note: Any) -> Job:
    """A job of another client, noted as that would, and what is noted of the client."""
    other = run.dispatcher()
    units = other.request.plan.units[:n_units]
    other.claims._note |= note
    other.claims.join()
    other.claims.claim(units)
    labels = [unit.label for unit in units]
    job = accepted(server.accept(labels), other.hosted.server.url, labels, 10)
    job = replace(job, session=other.claims.name)
    other.book.note(job)
    return job


@pytest.mark.parametrize(
    "note",
    [
        {"process": 2**22 + 1},  # no such process on this machine
        {"ended": "2026-01-01T00:00:00+00:00"},
        {"host": "another machine"},  # nobody knows, but it gives no signs of life
    ],
)
def test_jobs_of_a_client_that_is_gone_are_taken_up(
    server: FakeServer, run: Run, monkeypatch: pytest.MonkeyPatch, note: dict[str, Any]
) -> None:
    monkeypatch.setattr(claims, "SILENCE", 0.2)
    job = waiting_job(run, server, **note)
    cells = [*job.units, *(cell.label for cell in pn.load_grid("long").cells[20:24])]
    run(cells=cells)
    assert server.measured() == dict.fromkeys(cells, 1)
    taken = {one.id: one for one in run.jobs()}[job.id]
    assert taken.state == "written"
    assert taken.session != job.session
    assert len(run.jobs()) == 2


def test_a_sign_of_long_ago_is_none(server: FakeServer, run: Run) -> None:
    job = waiting_job(run, server, host="another machine")
    group = begin_group(run.store, "own", run.name)
    ((name, note),) = group.sessions().items()
    group.note("sessions", name, {**note, "seen": "2026-01-01T00:00:00.000+00:00"})
    run(cells=list(job.units))
    assert server.measured() == dict.fromkeys(job.units, 1)
    (taken,) = run.jobs()
    assert taken.session != job.session  # at once, while that of a living client stays its own


def test_a_job_of_a_living_client_is_left_to_it_and_then_asked_about_but_never_sent_again(
    server: FakeServer, run: Run
) -> None:
    job = waiting_job(run, server, host="another machine")
    started = time.monotonic()
    run(cells=list(job.units))
    assert time.monotonic() - started > HASTE.others
    assert server.measured() == dict.fromkeys(job.units, 1)
    assert [(one.state, one.session) for one in run.jobs()] == [("written", job.session)]


def test_a_claim_without_a_job_is_waited_for_and_then_done(server: FakeServer, run: Run) -> None:
    other = run.dispatcher()
    other.claims._note["host"] = "another machine"
    other.claims.join()
    units = other.pending[:3]
    other.claims.claim(units)
    started = time.monotonic()
    run(cells=[unit.label for unit in units])
    assert time.monotonic() - started > HASTE.others
    assert server.measured() == dict.fromkeys((unit.label for unit in units), 1)


def test_a_job_that_nobody_needs_any_more_is_dropped(server: FakeServer, run: Run) -> None:
    job = waiting_job(run, server)
    run(cells=list(job.units))  # after a while, by the job of the living client
    waiting_job(run, server, ended="now")
    run(cells=[unit.label for unit in pn.load_grid("long").cells[8:10]])
    assert {one.state for one in run.jobs()} == {"written"}
    assert len(run.jobs()) == 2


def test_two_that_want_the_same_units_turn_away(run: Run, server: FakeServer) -> None:
    del server
    first, second = run.dispatcher(), run.dispatcher()
    for each in (first, second):
        each.claims.join()
        each.share.look()
    units = first.pending[:4]
    assert first.share.take(units)
    assert not second.share.take(units)
    second.share.look()
    assert not set(second.share.next_units(48)) & set(units)
    assert len(second.share.next_units(48)) == N_CELLS - 4


def test_two_jobs_for_the_same_units_are_both_found(run: Run, server: FakeServer) -> None:
    del server
    book = run.dispatcher().book
    jobs = [accepted(name, "https://host", ["a/b"], 1) for name in ("1", "2")]
    for job in jobs:
        book.note(job)
    assert sorted(job.id for job in book.waiting()) == ["1", "2"]
    book.written(jobs[0], 5, 1.0)
    assert book.waiting() == [jobs[1]]


def test_a_job_noted_by_a_former_version_is_found_and_not_noted_twice(
    run: Run, server: FakeServer
) -> None:
    job = waiting_job(run, server, ended="now")
    book = run.dispatcher().book
    (former,) = (run.store / "own" / run.name / "jobs").glob("*.*/")
    former.rename(former.with_name(book.key(job.units)))
    run(cells=list(job.units))
    assert server.measured() == dict.fromkeys(job.units, 1)
    assert [one.state for one in run.jobs()] == ["written"]


def test_a_job_that_ended_for_good_is_not_asked_about_again(server: FakeServer, run: Run) -> None:
    job = waiting_job(run, server, ended="now")
    del server.results[job.id]
    end = "Request cancelled by operator."
    said = server.status

    def status(asked: str) -> Any:
        if asked == job.id:
            return ResponseModel(id=job.id, status=Status.ERROR, description=end)
        return said(asked)

    server.status = status  # type: ignore[method-assign]
    with pytest.raises(RemoteError, match="cancelled by operator"):
        run(cells=list(job.units))
    assert run.jobs() == []
    assert int(run(cells=list(job.units)).completed.sum()) == 4


def test_what_the_server_computes_with_is_recorded(server: FakeServer, run: Run) -> None:
    del server
    before = run.plan().request.block.attrs
    results = run()
    assert results.attrs["attn_implementation"] == "sdpa"
    assert results.attrs["identity"] == before["identity"]
    (note,) = run.sessions()
    assert note["server"] == FACTS
    (info,) = pn.list_runs(run.store)
    assert info.computing == "float32 sdpa"


@pytest.mark.parametrize("batch_size", [None, 5, 7, 8, 16, 48])
def test_a_size_that_failed_is_remembered(
    server: FakeServer, run: Run, batch_size: int | None
) -> None:
    server.most = 6
    results = run(batch_size=batch_size)
    print(f"batch size {batch_size}: {[len(job) for job in server.sent]}")
    assert values_are_right(results)
    assert len(server.refused) <= MOST_REFUSED
    for failed in server.refused:
        sizes = [len(labels) for labels in server.sent]
        later = sizes[sizes.index(failed) + 1 :]
        assert all(size < failed for size in later)
    assert max(len(labels) for labels in server.sent if len(labels) <= 6) >= min(batch_size or 4, 4)


def test_sizes_grow_to_what_fits_one_larger_job_at_a_time(server: FakeServer, run: Run) -> None:
    run()
    assert [len(labels) for labels in server.sent] == [4, 16, 28]


def test_clients_learn_from_each_other_what_is_refused(server: FakeServer, run: Run) -> None:
    server.most, server.seconds = 6, 0.01
    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"3 clients: {[len(labels) for labels in server.sent]}, refused {server.refused}")
    assert len(server.measured()) == N_CELLS
    assert len(server.refused) <= MOST_REFUSED + 2  # a race is lost by each of the others at most


def test_the_next_command_knows_what_was_refused(server: FakeServer, run: Run) -> None:
    server.most = 6
    half = [cell.label for cell in pn.load_grid("long").cells[:30]]
    run(cells=half)
    assert server.refused
    n_refused = len(server.refused)
    run()
    assert len(server.refused) == n_refused
    assert set(server.measured().values()) == {1}


@pytest.mark.parametrize("n_units", [48, 240])
@pytest.mark.parametrize("batch_size", [None, *range(1, 49)])
def test_no_more_than_some_sizes_are_refused_whatever_fits(
    n_units: int, batch_size: int | None
) -> None:
    for most in range(1, 60):
        notes, left = list[Job](), n_units
        while left:
            size = min(units_per_job(notes, batch_size), left)
            job = accepted(str(len(notes)), "", ["u"] * size, 1)
            fits = size <= most
            notes.append(replace(job, state="written" if fits else "refused", seconds=0.01))
            left -= size * fits
        assert [job.state for job in notes].count("refused") <= MOST_REFUSED, most


CLIENT = """
import sys
import persona_nns as pn
from persona_nns.runs import plan_run
from persona_nns.runs.remote import dispatch
from persona_nns.runs.remote.connection import Patience

dispatch.PATIENCE = Patience(unreachable=20, first=0.05, longest=0.2, others=5)
file, folder, url, store = sys.argv[1:]
model = pn.load_model(folder, backend=url, label="tiny/qwen2")
print("ready", flush=True)
sys.stdin.readline()
pn.run(file, model, "short", store=store, batch_size=2)
"""


@pytest.fixture(scope="module")
def loopback(random_folder: Callable[[str], Path]) -> Iterator[LoopbackServer]:
    folder = str(random_folder("qwen2"))
    server = LoopbackServer(folder, "tiny/qwen2", script=HERE / "faulty_server.py")
    yield server
    server.stop()


@pytest.mark.slow
@pytest.mark.parametrize(("n_clients", "n_killed"), [(2, 1), (4, 2)])
def test_processes_share_a_run_and_go_on_for_one_that_is_killed(
    loopback: LoopbackServer,
    random_folder: Callable[[str], Path],
    random_model: Callable[[str], TransformersModel],
    tmp_path: Path,
    n_clients: int,
    n_killed: int,
) -> None:
    url, store = loopback.address.url, tmp_path / "s.zarr"
    slow = EXAMPLE.replace(
        "    norms = {}\n", "    __import__('time').sleep(0.7)\n    norms = {}\n"
    )
    (tmp_path / "norms.py").write_text(slow)
    command = [sys.executable, "-c", CLIENT, tmp_path / "norms.py", random_folder("qwen2"), url]
    clients = [
        subprocess.Popen(
            [str(part) for part in (*command, store)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(n_clients)
    ]
    for client in clients:
        assert client.stdout is not None
        assert client.stdout.readline() == "ready\n"
    httpx.post(f"{url}/_faults", json={"kind": "", "times": 0})
    for client in clients:
        assert client.stdin is not None
        client.stdin.write("go\n")
        client.stdin.flush()

    def noted(what: str) -> dict[str, Any]:
        files = (store / "norms").glob(f"*/{what}/*/zarr.json")
        return {file.parent.name: json.loads(file.read_text())["attributes"] for file in files}

    killed = {client.pid for client in clients[:n_killed]}
    busy: set[int] = set()
    while not killed <= busy:  # until each of them has a job on the server
        assert all(client.poll() is None for client in clients), clients[0].communicate()
        time.sleep(0.02)
        waiting = {job["session"] for job in noted("jobs").values() if job["state"] == "waiting"}
        busy |= {note["process"] for name, note in noted("sessions").items() if name in waiting}
    for client in clients[:n_killed]:
        client.send_signal(signal.SIGKILL)
    said = [client.communicate() for client in clients]
    assert [client.returncode for client in clients[n_killed:]] == [0] * (n_clients - n_killed), (
        said
    )
    ds = pn.open_results(store, "norms")
    assert bool(ds.completed.all())
    sent = httpx.get(f"{url}/_faults").json()["request"]
    print(f"{n_clients} clients: {sent} jobs for {ds.cell.size // 2} batches")
    assert sent <= ds.cell.size // 2 + n_clients
    (info,) = pn.list_runs(store)
    jobs = list(read_jobs(store, "norms", info.run).values())
    assert {job.state for job in jobs} == {"written"}
    here = pn.run(tmp_path / "norms.py", random_model("qwen2"), "short", store=tmp_path / "h.zarr")
    np.testing.assert_allclose(ds.norm_ratio.values, here.norm_ratio.values, rtol=1e-4)
