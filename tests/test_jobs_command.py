"""``persona-nns jobs``: what a store notes of jobs, how they stand, and how to be rid of them."""

import json
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from store_writer import block_of, write_all

from persona_nns.cli.commands import main
from persona_nns.results.groups import open_group
from persona_nns.runs.remote import standing
from persona_nns.runs.remote.connection import Patience
from persona_nns.runs.remote.job_book import Job, JobBook, accepted, read_jobs

KEY = "sekret"


class StatusServer:
    """Answers questions about jobs, and keeps who asked."""

    def __init__(self) -> None:
        self.said: dict[str, dict[str, str]] = {}
        self.asked: list[tuple[str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                job = self.path.rpartition("/")[2]
                outer.asked.append((job, self.headers.get("ndif-api-key")))
                known = job in outer.said
                body = json.dumps({"id": job, **outer.said.get(job, {})}).encode()
                self.send_response(200 if known else 404)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *_: Any) -> None:  # noqa: A002
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[StatusServer]:
    server = StatusServer()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NDIF_API_KEY", KEY)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(standing, "_PATIENCE", Patience(unreachable=0.2, first=0.01, longest=0.1))
    write_all(tmp_path / "s.zarr", 4, 2)
    return tmp_path / "s.zarr"


def book_of(store: Path, host: str) -> JobBook:
    return JobBook(store, block_of(4), host, [])


def job_of(host: str, letter: str, n_units: int = 2) -> Job:
    return accepted(letter * 32, host, [f"p00{k}/t" for k in range(n_units)], 21_500)


def call(store: Path, *arguments: str) -> int:
    before, sys.argv = sys.argv, ["persona-nns", "jobs", str(store), *arguments]
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = before
    return int(ended.value.code or 0)


def test_jobs_are_listed_as_they_stand_and_asked_about_without_the_key(
    store: Path, server: StatusServer, capsys: pytest.CaptureFixture[str]
) -> None:
    book = book_of(store, server.url)
    for letter in "abcde":
        book.note(job_of(server.url, letter))
    book.note(job_of("http://127.0.0.1:9", "f"))
    book.written(job_of(server.url, "1"), 12_345, 4.25)
    book.refused(job_of(server.url, "2", 4))
    server.said = {
        "a" * 32: {"status": "QUEUED", "description": "Moved to position 3."},
        "b" * 32: {"status": "RUNNING", "description": "Your job has started running."},
        "c" * 32: {"status": "COMPLETED", "description": "Done."},
        "d" * 32: {"status": "ERROR", "description": "Your job was cancelled by the server."},
    }
    assert call(store) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    flat = re.sub(r" \d+ s ", " AGE ", " ".join(printed.split()))
    for words in (
        f"{'a' * 32} 2 AGE 22 kB",
        f"e/m.g.i on {server.url}",
        "e/m.g.i on http://127.0.0.1:9",
        "waiting: queued (position 3)",
        "waiting: running",
        "waiting: done; the same command takes its result",
        "waiting: failed: The server ended a job: Your job was cancelled by the server",
        "waiting: unknown to the server, or not begun",
        "waiting: the server does not answer",
        f"{'1' * 32} 2 AGE 22 kB 12 kB 4.2 s",
        "refused: it was too large for the server",
    ):
        assert words in flat, printed
    assert sorted(job[0] for job, _ in server.asked) == list("abcde")  # not those that are over
    assert {key for _, key in server.asked} == {None}
    server.asked.clear()
    assert call(store, "--no-ask") == 0
    assert server.asked == []
    assert "waiting:" not in capsys.readouterr().out


def test_what_is_forgotten(
    store: Path, server: StatusServer, capsys: pytest.CaptureFixture[str]
) -> None:
    book = book_of(store, server.url)
    jobs = [job_of(server.url, letter) for letter in ("a", "ab", "c")]
    jobs = [replace(job, id=job.id[:32]) for job in jobs]
    for job in jobs[:2]:
        book.note(job)
    book.written(jobs[2], 1, 1.0)
    book.refused(job_of(server.url, "d", 4))
    assert call(store, "--forget", "a") == 2
    assert "Several jobs begin with 'a'" in capsys.readouterr().err
    assert call(store, "--forget", "aaaa") == 0
    assert f"Forgotten: {'a' * 32} (e/m.g.i)" in capsys.readouterr().out
    assert len(read_jobs(store, "e", "m.g.i")) == 3
    assert call(store, "--forget", "all") == 0
    assert [job.state for job in read_jobs(store, "e", "m.g.i").values()] == ["written"]
    capsys.readouterr()
    assert call(store, "--forget", "all") == 2
    assert "No job of the store is waiting or refused." in capsys.readouterr().err
    assert call(store, "--forget", "cccc") == 0
    assert read_jobs(store, "e", "m.g.i") == {}
    assert call(store) == 0
    assert "No jobs in" in capsys.readouterr().out


def test_a_run_of_which_only_a_job_was_noted_goes_with_it(tmp_path: Path) -> None:
    book = book_of(tmp_path / "s.zarr", "https://host")
    book.note(job_of("https://host", "a"))
    assert call(tmp_path / "s.zarr", "--forget", "all") == 0
    experiment = open_group(tmp_path / "s.zarr", "e", "r")
    assert experiment is not None
    assert list(experiment.group_keys()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--cancel", "aaa"], "(https://host) takes no request to end a job; whoever runs it can"),
        (["--cancel", "all"], f"(ndif kill {'a' * 32}), and --forget drops the note here."),
        (["--cancel", "b"], f"The job {'b' * 32} is over (it is written)."),
        (["--cancel", "x"], "The store has no job 'x'; `persona-nns jobs` lists them."),
        (["--forget", ""], "The store has no job ''; `persona-nns jobs` lists them."),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    store: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    book = book_of(store, "https://host")
    book.note(job_of("https://host", "a"))
    book.written(job_of("https://host", "b"), 1, 1.0)
    assert call(store, *arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1
    assert len(read_jobs(store, "e", "m.g.i")) == 2


def test_no_store_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tmp_path / "no.zarr") == 2
    assert "There is no Zarr store at" in capsys.readouterr().err
