"""A run that is cut off anywhere leaves a store that opens and that the same command finishes."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
import zarr.storage._local as local
from hypothesis import given, settings
from hypothesis import strategies as st
from store_writer import block_of, cells_of, values_are_right, values_of, write_all

import persona_nns as pn
from persona_nns.results.allocation import attach
from persona_nns.results.locations import Location, location_of
from persona_nns.results.reading import list_runs, open_results
from persona_nns.results.store import check_writable

HERE = Path(__file__).parent


class Killed(BaseException):
    """Stands for a signal: nothing of ours catches it."""


def fail_at(write: int, error: Callable[[], BaseException]) -> Any:
    """Let zarr's n-th file fail to be written, and all after it."""
    original, left = local._put, [write]

    def put(*arguments: Any, **settings: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise error()
        return original(*arguments, **settings)

    patch = pytest.MonkeyPatch()
    patch.setattr(local, "_put", put)
    return patch


@settings(max_examples=6)
@given(
    write=st.integers(0, 120),
    full=st.booleans(),
    batch_size=st.integers(1, 5),
    n_cells=st.integers(1, 5),
)
def test_whatever_write_is_the_last_complete_cells_are_right_and_the_rest_is_finished(
    write: int, full: bool, batch_size: int, n_cells: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "s.zarr"
        no_space = OSError(errno.ENOSPC, "No space left on device")
        said = ""
        patch = fail_at(write, lambda: no_space if full else Killed())
        try:
            write_all(store, n_cells, batch_size)
        except pn.PersonaError as error:
            said = str(error)
        except Killed:
            said = "killed"
        finally:
            patch.undo()
        assert not said or ("No space left on device" in said) == full
        assert "\n" not in said
        found: list[str] = []
        check_writable(store)
        if location_of(store).open_root() and list_runs(store):
            results = open_results(store, "e")
            assert values_are_right(results)
            found = results.cell[results.completed.values[0]].values.tolist()
        measured = [label for batch in write_all(store, n_cells, batch_size) for label in batch]
        assert not set(measured) & set(found)
        results = open_results(store, "e")
        assert bool(results.completed.all())
        assert values_are_right(results)


@pytest.mark.slow
def test_processes_killed_at_random_moments_lose_nothing() -> None:
    script = HERE / "benchmarks" / "kill_points.py"
    answer = subprocess.run(
        [sys.executable, script, "60", "1"], capture_output=True, text=True, check=False
    )
    print(answer.stdout)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "60 killed" in answer.stdout
    assert "0 stores with wrong cells, 0 that do not open" in answer.stdout


def test_a_store_of_which_only_an_unfinished_file_is_there_is_none_yet(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    store.mkdir()
    (store / "zarr.0123.partial").write_bytes(b"{")
    check_writable(store)
    write_all(store, 2, 1)
    assert values_are_right(open_results(store, "e"))


@pytest.mark.parametrize("damage", [b"", b"\0" * 40, b'{"zarr_format": 3, "no'])
def test_metadata_that_were_cut_off_are_written_anew(tmp_path: Path, damage: bytes) -> None:
    store = tmp_path / "s.zarr"
    write_all(store, 2, 1)
    for place in ("zarr.json", "e/zarr.json", "e/m.g.i/zarr.json", "e/m.g.i/kl/zarr.json"):
        (store / place).write_bytes(damage)
        write_all(store, 2, 1)
        attach(store, block_of(2))
        results = open_results(store, "e")
        assert bool(results.completed.all())
        assert values_are_right(results)


def test_one_damaged_run_does_not_hide_the_others(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    write_all(store, 2, 1, identity="one")
    write_all(store, 2, 1, identity="two")
    (store / "e" / "m.g.two" / "zarr.json").write_bytes(b"")
    assert [info.run for info in list_runs(store)] == ["m.g.one"]
    assert values_are_right(open_results(store, "e"))


def test_a_flag_that_was_cut_off_is_a_cell_that_is_not_complete(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    write_all(store, 3, 1)
    (store / "e/m.g.i/completed/c.0.1").write_bytes(b"")
    (store / "e/m.g.i/kl/c.0.1.0.0").write_bytes(b"\x28")
    results = open_results(store, "e")
    assert results.completed.values.tolist() == [[True, False, True]]
    assert values_are_right(results)
    assert write_all(store, 3, 1) == [["p001/t"]]
    assert bool(open_results(store, "e").completed.all())


def test_a_complete_cell_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    write_all(store, 2, 1)
    (store / "e/m.g.i/kl/c.0.1.0.0").write_bytes(b"\x28")
    with pytest.raises(pn.PersonaError, match="holds a complete cell that cannot be read"):
        open_results(store, "e")


def test_data_are_flushed_before_cells_are_called_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    put, flush = local._put, Location.flush

    def record(path: Path, *arguments: Any, **settings: Any) -> int:
        events.append(f"{path.parent.name}/{path.name}")
        return put(path, *arguments, **settings)

    monkeypatch.setattr(local, "_put", record)
    monkeypatch.setattr(Location, "flush", lambda place: (events.append("flush"), flush(place)))
    group = attach(tmp_path / "s.zarr", block_of(2))
    allocated = list(events)
    assert allocated.index("flush") > allocated.index("cell/c.0")
    assert allocated.index("flush") < allocated.index("completed/zarr.json")
    events.clear()
    (cell,) = cells_of([0])
    values = {name: array[0, ...] for name, array in values_of([cell]).items()}
    group.write_units([(cell, values)], 1.0)
    assert events[-2:] == ["flush", "completed/c.0.0"]
    assert {"kl/c.0.0.0.0", "text/c.0.0", "seconds/c.0.0"} <= set(events[:-2])


def test_large_cells_are_cut_by_layer_and_position(tmp_path: Path) -> None:
    from dataclasses import replace

    from persona_nns.declarations.variables import Variable

    wide = {"h": Variable("cell layer position d_model", "residual")}
    block = replace(block_of(2), variables=wide, d_model=2**16)
    group = attach(tmp_path / "s.zarr", block)
    values = np.random.default_rng(0).normal(size=(2, 2, 2**16)).astype(np.float32)
    group.write_units([(cells_of([1])[0], {"h": values})], 1.0)
    array = zarr.open_group(tmp_path / "s.zarr", mode="r")["e/m.g.i/h"]
    assert isinstance(array, zarr.Array)
    assert (array.shards, array.chunks) == ((1, 1, 2, 2, 2**16), (1, 1, 1, 1, 2**16))
    ds = open_results(tmp_path / "s.zarr", "e")
    np.testing.assert_array_equal(ds.h.sel(model="m", cell="p001/t").values, values)


KILLED = '''
"""Says how long its cells' names are, and is killed after two batches."""
import os, signal
import torch
from persona_nns import Variable

protocol_version = 1
variables = {"length": Variable("cell layer", "letters")}
calls = []

def measure(model, cells, *, layers: list[int]):
    calls.append(cells)
    if os.environ.get("KILL") and len(calls) > int(os.environ["KILL"]):
        os.kill(os.getpid(), signal.SIGKILL)
    ids = [model.tokenizer(cell.label)["input_ids"][:1] for cell in cells]
    with model.trace(torch.tensor(ids)):
        norm = model.layers[0].input[:, -1].norm(dim=-1).save()
    return {"length": norm[:, None] * torch.tensor(layers)}
'''


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("kill", [1, 2, 3, 5, 9])
def test_a_real_run_that_is_killed_is_finished_by_the_same_command(
    tmp_path: Path, kill: int
) -> None:
    file = tmp_path / "killed.py"
    file.write_text(KILLED)
    store, model = tmp_path / "s.zarr", str(HERE / "golden" / "qwen2")
    request = ["run", str(file), "--model", model, "--grid", "short", "--batch-size", "1"]
    request += ["--store", str(store)]
    answer = subprocess.run(
        [sys.executable, "-c", "from persona_nns.cli.commands import main; main()", *request],
        env={**os.environ, "KILL": str(kill)},
        check=False,
    )
    assert answer.returncode == -signal.SIGKILL
    cut = open_results(store, "killed")
    assert int(cut.completed.sum()) == kill
    assert int(cut.length.notnull().sum()) == kill * cut.sizes["layer"]
    whole = pn.run(file, model, "short", batch_size=1, store=store)
    single = pn.run(file, model, "short", batch_size=1, store=tmp_path / "t.zarr")
    np.testing.assert_array_equal(whole.length, single.length)
    notes = [info.group.sessions().values() for info in list_runs(store)]
    (finished,) = [note for note in notes[0] if note.get("ended")]
    assert finished["n_written"] == whole.sizes["cell"] - kill
