"""A run is removed whole, or what is left of it holds nothing that is complete."""

import os
import socket
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_writer import block_of, values_are_right, write_all
from test_crash import Killed
from test_merging import write

import persona_nns as pn
from persona_nns.results.allocation import attach
from persona_nns.results.choosing import choose_run
from persona_nns.results.claims import at_work
from persona_nns.results.reading import list_runs, open_results
from persona_nns.results.removing import remove_run


def test_a_run_goes_with_all_below_it_and_others_stay(tmp_path: Path) -> None:
    write_all(tmp_path, 3, 2)
    write_all(tmp_path, 2, 2, identity="stays")
    remove_run(tmp_path, "e", "m.g.i")
    assert not (tmp_path / "e" / "m.g.i").exists()
    assert [info.run for info in list_runs(tmp_path)] == ["m.g.stays"]
    assert values_are_right(open_results(tmp_path, "e"))
    with pytest.raises(pn.UsageError, match=r"no run 'e/m\.g\.i'"):
        remove_run(tmp_path, "e", "m.g.i")
    assert sum(map(len, write_all(tmp_path, 3, 2))) == 3


@settings(max_examples=8)
@given(n=st.integers(0, 45))
def test_whatever_cuts_a_removal_off_nothing_is_taken_for_complete(n: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "s.zarr"
        write_all(store, 3, 2)
        left = [n]
        originals = {name: getattr(os, name) for name in ("unlink", "rmdir")}

        def cut(name: str):
            def call(*arguments: object, **settings: object) -> None:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                originals[name](*arguments, **settings)

            return call

        patch = pytest.MonkeyPatch()
        for name in originals:
            patch.setattr(os, name, cut(name))
        try:
            remove_run(store, "e", "m.g.i")
        except Killed:
            pass
        finally:
            patch.undo()
        if list_runs(store):
            assert values_are_right(open_results(store, "e"))
        group = store / "e" / "m.g.i"
        if n % 2 and group.exists():
            remove_run(store, "e", "m.g.i")
            assert not group.exists()
        write_all(store, 3, 2)  # measures what is not complete
        results = open_results(store, "e")
        assert results.completed.all()
        assert values_are_right(results)


def test_a_run_that_is_being_computed_is_not_removed(tmp_path: Path) -> None:
    group = write(tmp_path, [0])
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        note = {"host": socket.gethostname(), "process": other.pid, "claims": []}
        started = datetime.now(UTC) + timedelta(seconds=1)
        group.note("sessions", "s", {**note, "started": started.isoformat()})
        with pytest.raises(pn.UsageError, match=rf"being computed \(process {other.pid} on"):
            remove_run(tmp_path, "e", "m.g.i")
        other.communicate(b"\n")
    remove_run(tmp_path, "e", "m.g.i")
    assert list_runs(tmp_path) == []


def test_a_later_process_of_the_same_number_is_another_one(tmp_path: Path) -> None:
    group = write(tmp_path, [0])
    note = {"host": socket.gethostname(), "process": os.getpid(), "claims": []}
    group.note("sessions", "s", {**note, "started": "2020-01-01T00:00:00+00:00"})
    assert at_work(group) == ([], [])
    group.note("sessions", "s", {**note, "started": datetime.now(UTC).isoformat()})
    assert at_work(group) == ([f"process {os.getpid()} on {socket.gethostname()}"], [])
    group.note("sessions", "s", {**note, "host": "elsewhere"})
    assert at_work(group) == ([], [f"process {os.getpid()} on elsewhere"])
    group.note("sessions", "s", {**note, "host": "elsewhere", "ended": "2026"})
    assert at_work(group) == ([], [])


def test_a_run_is_chosen_by_any_of_its_names(tmp_path: Path) -> None:
    write_all(tmp_path, 2, 2, identity="one")
    group = attach(tmp_path, block_of(2, "one"))
    group.say({"name": "first", "created": "2025-01-01T00:00:00+00:00"})
    write_all(tmp_path, 2, 2, identity="two")
    for asked, run in {
        "e/m.g.one": "m.g.one",
        "m.g.two": "m.g.two",
        "first": "m.g.one",
        "e/first": "m.g.one",
        "latest": "m.g.two",
        "e/latest": "m.g.two",
    }.items():
        assert choose_run(tmp_path, asked).run == run
    for asked in ("e", "f/latest", "e/three", ""):
        with pytest.raises(pn.UsageError, match=r"there are: e/m\.g\.one, e/m\.g\.two"):
            choose_run(tmp_path, asked)
    attach(tmp_path, block_of(2, "two")).say({"name": "first"})
    with pytest.raises(pn.UsageError, match=r"Several runs are called 'first': e/m\.g\.one, e/m"):
        choose_run(tmp_path, "first")
