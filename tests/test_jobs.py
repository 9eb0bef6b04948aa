"""Jobs in a store: whoever looks, and whenever, sees a job whole or not at all."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from zarr.storage import LocalStore

from persona_nns.results.allocation import attach
from persona_nns.results.groups import subgroups
from persona_nns.results.store import RunGroup
from persona_nns.runs.remote.job_book import Job, JobBook, accepted, read_jobs
from tests.test_store import make_block

JOB = accepted("7", "https://host", ["chef/haiku"], 100)


@pytest.fixture
def book(tmp_path: Path) -> JobBook:
    return JobBook(tmp_path / "s.zarr", make_block(), "https://host", {"layers": [1]})


def known(store: Path) -> list[Job]:
    return list(read_jobs(store, "e", "m.g.1").values())


@pytest.fixture
def snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Path]]:
    """Copies of the store after every file that was written: what a killed process would leave."""
    plain = LocalStore.set

    async def written(self: LocalStore, key: str, value: Any) -> None:
        await plain(self, key, value)
        copy = tmp_path / f"after-{len(list(tmp_path.iterdir())):03d}"
        shutil.copytree(tmp_path / "s.zarr", copy, ignore=shutil.ignore_patterns("*.partial"))

    monkeypatch.setattr(LocalStore, "set", written)
    return lambda: sorted(tmp_path.glob("after-*"))


def test_a_reader_sees_a_job_whole_or_not_at_all(
    book: JobBook, snapshots: Callable[[], list[Path]]
) -> None:
    book.note(JOB)
    book.written(JOB, result_bytes=5, seconds=1.5)
    seen = [known(store) for store in snapshots()]
    whole = replace(JOB, state="written", result_bytes=5, seconds=1.5)
    assert all(jobs in ([], [JOB], [whole]) for jobs in seen)
    assert [JOB] in seen
    assert seen[-1] == [whole]


def test_a_job_whose_note_was_cut_off_is_noted_again(book: JobBook, tmp_path: Path) -> None:
    book.note(JOB)
    note = tmp_path / "s.zarr/e/m.g.1/jobs" / book.name(JOB) / "zarr.json"
    note.write_bytes(note.read_bytes()[:40])
    assert known(tmp_path / "s.zarr") == []
    assert book.waiting() == []
    book.note(JOB)
    assert book.waiting() == [JOB]


@pytest.fixture
def run(tmp_path: Path) -> RunGroup:
    return attach(tmp_path / "s.zarr", make_block())


def test_a_reader_sees_a_session_whole_or_not_at_all(
    run: RunGroup, snapshots: Callable[[], list[Path]]
) -> None:
    run.note("sessions", "s", {"claims": ["chef/haiku"]})
    run.note("sessions", "s", {"claims": []})
    seen = [
        dict(note.attrs)
        for store in snapshots()
        for _, note in subgroups(attach(store, make_block())._group, "sessions")
    ]
    assert {"claims": ["chef/haiku"]} in seen
    assert all("claims" in note for note in seen)
