"""Chunks that hold a block of cells: nothing is lost, whoever writes into one block, and when."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from store_writer import block_of, cells_of, plan_of, values_are_right, values_of, write_all
from zarr.storage import _local as local

import persona_nns as pn
from persona_nns.declarations.variables import Variable
from persona_nns.results import blocks, chunks
from persona_nns.results.allocation import attach, check_per_chunk, units_per_chunk
from persona_nns.results.blocks import default_per_chunk
from persona_nns.results.claims import Claims
from persona_nns.results.exporting import export_results
from persona_nns.results.locations import Location
from persona_nns.results.merging import merge_stores
from persona_nns.results.reading import list_runs, open_results
from persona_nns.results.removing import remove_run
from persona_nns.runs.queue import Queue
from persona_nns.runs.verify import verify_store

WRITER = Path(__file__).with_name("store_writer.py")


def write(store: Path, indices: list[int], n_cells: int, per_chunk: int | None = None) -> None:
    """Write some cells as a process does that asks for no more."""
    cells = cells_of(indices)
    group = attach(store, block_of(n_cells, per_chunk=per_chunk))
    values = values_of(cells)
    rows = [{name: of[row, ...] for name, of in values.items()} for row in range(len(cells))]
    group.write_units(list(zip(cells, rows, strict=True)), 1.0)


def files_of(store: Path, array: str) -> set[str]:
    return {file.name for file in (store / "e" / "m.g.i" / array).glob("c.*")}


@pytest.mark.parametrize(
    ("sizes", "n_arrays", "per_chunk"),
    [
        ([1000], 13, 1),
        ([10_000], 13, 64),
        ([100_000], 13, 256),
        ([1_000_000], 13, 4096),
        ([2000], 3, 64),
        ([40, 2500], 13, 64),
        ([40, 30], 13, 32),
        ([1, 5000], 13, 1),
    ],
)
def test_files_are_thousands_whatever_the_grid(
    sizes: list[int], n_arrays: int, per_chunk: int
) -> None:
    assert default_per_chunk(sizes, n_arrays) == per_chunk


def test_a_small_grid_lies_on_the_disk_as_before(tmp_path: Path) -> None:
    write_all(tmp_path / "s.zarr", 5, 2)
    assert files_of(tmp_path / "s.zarr", "completed") == {f"c.0.{i}" for i in range(5)}
    assert not list((tmp_path / "s.zarr").rglob("*.lock"))


def test_plain_xarray_reads_blocks(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    write_all(store, 10, 3, per_chunk=4)
    assert files_of(store, "kl") == {f"c.0.{i}.0.0" for i in range(3)}
    ds = xr.open_zarr(store, group="e/m.g.i", consolidated=False).load()
    assert bool(ds.completed.all())
    np.testing.assert_array_equal(ds.kl.values[0], values_of(cells_of(range(10)))["kl"])
    assert ds.text.values[0].tolist() == values_of(cells_of(range(10)))["text"].tolist()
    assert values_are_right(open_results(store, "e"))


def test_some_cells_and_then_the_rest(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    for indices in ([1], [9, 3], [0, 2, 8]):
        write(store, indices, 10, 4)
    results = open_results(store, "e")
    assert np.flatnonzero(results.completed.values[0]).tolist() == [0, 1, 2, 3, 8, 9]
    assert values_are_right(results)
    measured = {label for batch in write_all(store, 10, 4) for label in batch}
    assert measured == {f"p00{i}/t" for i in (4, 5, 6, 7)}
    assert values_are_right(open_results(store, "e"))
    assert bool(open_results(store, "e").completed.all())


@pytest.mark.parametrize("lazily", [False, True])
def test_parts_are_read_as_the_whole_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lazily: bool
) -> None:
    store = tmp_path / "s.zarr"
    write(store, [0, 1, 2, 5, 9, 10], 11, 4)
    whole = open_results(store, "e")
    if lazily:
        monkeypatch.setattr("persona_nns.results.opening._EAGER", 0)
    for part in (slice(1, 10, 3), slice(9, 2, -2), slice(4, 4), [10, 0, 5], 7):
        xr.testing.assert_identical(
            open_results(store, "e").isel(cell=part).load(), whole.isel(cell=part)
        )


def add_one_by_one(store: str, start: int, n_cells: int, per_chunk: int) -> None:
    for index in range(start, n_cells, 4):
        write(Path(store), [index], n_cells, per_chunk)


def write_at_once(store: Path, n_cells: int, per_chunk: int) -> None:
    """Four processes write cells of the same blocks, each every fourth."""
    context = get_context("fork")
    processes = [
        context.Process(target=add_one_by_one, args=(str(store), start, n_cells, per_chunk))
        for start in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4


def test_processes_that_write_into_one_block_lose_nothing(tmp_path: Path) -> None:
    write(tmp_path / "s.zarr", [], 64, 32)
    write_at_once(tmp_path / "s.zarr", 64, 32)
    results = open_results(tmp_path / "s.zarr", "e")
    assert int(results.completed.sum()) == 64
    assert values_are_right(results)


def test_a_writer_waits_for_the_lock_of_its_block_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "s.zarr"
    write(store, [], 8, 4)
    monkeypatch.setattr(blocks, "_PATIENCE", 0.05)
    with blocks.alone(store / "e/m.g.i/completed", 0):
        write(store, [5], 8)
        with pytest.raises(
            pn.PersonaError, match=r"Another process has been writing into .*m\.g\.i"
        ):
            write(store, [1], 8)
    write(store, [1], 8)
    assert np.flatnonzero(open_results(store, "e").completed.values[0]).tolist() == [1, 5]


class Killed(BaseException):
    """Stands for a signal: nothing of ours catches it."""


@pytest.mark.parametrize("moment", range(14))
def test_whatever_is_the_last_step_complete_cells_are_right_and_the_rest_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    store, left = tmp_path / "s.zarr", [moment]
    write(store, [0, 1], 6, 4)

    def cut_off(original: Any) -> Any:
        def step(*arguments: Any, **settings: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return original(*arguments, **settings)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "_stage", cut_off(blocks._stage))
        patch.setattr(os, "replace", cut_off(os.replace))
        patch.setattr(Location, "flush", cut_off(Location.flush))
        with pytest.raises(Killed):
            write(store, [2, 3], 6)
    results = open_results(store, "e")
    assert np.flatnonzero(results.completed.values[0]).tolist()[:2] == [0, 1]
    assert values_are_right(results)
    write_all(store, 6, 2)
    results = open_results(store, "e")
    assert bool(results.completed.all())
    assert values_are_right(results)


def test_chunks_reach_the_disk_before_they_take_the_place_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, events = tmp_path / "s.zarr", []
    write(store, [0], 4, 4)
    stage, replaced, flush = blocks._stage, os.replace, Location.flush

    def noting(what: str, original: Any) -> Any:
        def call(*of: Any) -> Any:
            events.append((what, Path(of[-1] if what == "r" else of[0]).parent.name))
            return original(*of)

        return call

    monkeypatch.setattr(blocks, "_stage", noting("w", stage))
    monkeypatch.setattr(os, "replace", noting("r", replaced))
    monkeypatch.setattr(Location, "flush", lambda at: (events.append(("flush", "")), flush(at)))
    write(store, [1], 4)
    names = ["seconds", "kl", "n_eval", "text", "hit"]
    first, second = (i for i, event in enumerate(events) if event[0] == "flush")
    assert events[:first] == [("w", name) for name in names]
    assert events[first + 1 : second] == [("r", name) for name in names] + [("w", "completed")]
    assert events[second + 1 :] == [("r", "completed")]


def test_processes_killed_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    store, chance = tmp_path / "s.zarr", random.Random(0)
    n_complete = 0
    command = [sys.executable, WRITER, store, "2000", "5", "0.001", "64"]
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not (store / "e/m.g.i/completed/zarr.json").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0.05, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        results = open_results(store, "e")
        assert values_are_right(results)
        assert int(results.completed.sum()) >= n_complete
        n_complete = int(results.completed.sum())
    assert 0 < n_complete < 2000
    write_all(store, 2000, 200)
    results = open_results(store, "e")
    assert bool(results.completed.all())
    assert values_are_right(results)


def test_a_run_that_was_begun_goes_on_as_it_is(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    write(store, [0, 3], 6, 1)  # as every run is that is older than blocks
    check_per_chunk(store, block_of(6))
    write_all(store, 6, 2)
    assert files_of(store, "kl") == {f"c.0.{i}.0.0" for i in range(6)}
    assert values_are_right(open_results(store, "e"))


def test_another_number_than_the_runs_own_is_refused(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    write(store, [0], 6, 4)
    check_per_chunk(store, block_of(6, per_chunk=4))
    with pytest.raises(pn.UsageError, match=r"has 4 cells a chunk.*not to 3; leave out"):
        check_per_chunk(store, block_of(6, per_chunk=3))
    with pytest.raises(pn.UsageError, match=r"has 4 cells a chunk"):
        attach(store, block_of(6, per_chunk=3))


def test_no_more_than_there_are(tmp_path: Path) -> None:
    write_all(tmp_path / "s.zarr", 3, 1, per_chunk=100)
    check_per_chunk(tmp_path / "s.zarr", block_of(3, per_chunk=50))
    assert files_of(tmp_path / "s.zarr", "kl") == {"c.0.0.0.0"}
    assert values_are_right(open_results(tmp_path / "s.zarr", "e"))


def test_blocks_are_refused_where_there_are_no_locks(tmp_path: Path) -> None:
    url = "memory://blocks.zarr"
    with pytest.raises(pn.UsageError, match=r"at the URL 'memory:.*persona-nns push"):
        check_per_chunk(url, block_of(6, per_chunk=4))
    check_per_chunk(url, block_of(6, per_chunk=1))
    assert units_per_chunk(url, block_of(2000)) == 1
    assert units_per_chunk(tmp_path / "s.zarr", block_of(2000)) == 64
    # What was copied there whole is read there; it grows elsewhere.
    write_all(tmp_path / "s.zarr", 9, 2, identity="j", per_chunk=4)
    merge_stores(url, tmp_path / "s.zarr")
    assert values_are_right(open_results(url, "e", run="m.g.j"))
    with pytest.raises(pn.UsageError, match="go on in a folder"):
        check_per_chunk(url, block_of(9, "j"))
    merge_stores(tmp_path / "back.zarr", url)
    assert values_are_right(open_results(tmp_path / "back.zarr", "e"))


def test_stores_are_merged_by_whole_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = tmp_path / "a.zarr", tmp_path / "b.zarr"
    write_all(a, 1000, 50, per_chunk=64)
    written: list[int] = []
    stage = blocks._stage
    monkeypatch.setattr(blocks, "_stage", lambda *of: (written.append(1), stage(*of))[1])
    (merged,) = merge_stores(b, a)
    assert (merged.n_added, len(written)) == (1000, 6 * 16)  # each chunk once
    assert values_are_right(open_results(b, "e"))


@pytest.mark.parametrize(("ours", "theirs"), [(4, 4), (4, 1), (1, 4), (6, 4)])
def test_halves_of_a_run_are_merged_whatever_their_blocks(
    tmp_path: Path, ours: int, theirs: int
) -> None:
    a, b = tmp_path / "a.zarr", tmp_path / "b.zarr"
    write(a, [0, 1, 2, 9], 10, ours)
    write(b, [1, 3, 4, 5, 8], 10, theirs)
    (merged,) = merge_stores(a, b)
    assert (merged.n_added, merged.n_complete) == (4, 8)
    results = open_results(a, "e")
    assert np.flatnonzero(results.completed.values[0]).tolist() == [0, 1, 2, 3, 4, 5, 8, 9]
    assert values_are_right(results)


def test_a_run_of_blocks_is_exported_and_removed(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    write(store, [0, 5], 6, 4)
    export_results(open_results(store, "e"), tmp_path / "t.csv", ["n_eval"])
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 1 + 2 * 2
    remove_run(store, "e", "m.g.i")
    assert list_runs(store) == []
    assert not (store / "e" / "m.g.i").exists()


def test_large_units_are_in_chunks_of_fewer(tmp_path: Path) -> None:
    """A residual of 1 MiB is a shard of its own, one of 256 KiB stands in chunks of 4 MiB."""
    wide = {
        "h": Variable("cell d_model", "residual"),
        "hs": Variable("cell layer position d_model", "residuals"),
    }
    block = replace(block_of(40, per_chunk=32), variables=wide, d_model=2**16)
    group = attach(tmp_path / "s.zarr", block)
    rng = np.random.default_rng(0)
    rows = {
        index: {
            "h": rng.normal(size=2**16).astype(np.float32),
            "hs": rng.normal(size=(2, 2, 2**16)).astype(np.float32),
        }
        for index in (3, 33, 4)
    }
    for index, values in rows.items():
        group.write_units([(cells_of([index])[0], values)], 1.0)
    found = zarr.open_group(tmp_path / "s.zarr", path="e/m.g.i", mode="r")
    shapes = {name: found[name].metadata.chunk_grid.chunk_shape[1] for name in ("completed", *wide)}  # type: ignore[union-attr]
    assert (shapes["completed"], shapes["h"], shapes["hs"]) == (32, 8, 1)
    ds = open_results(tmp_path / "s.zarr", "e")
    for index, values in rows.items():
        for name, array in values.items():
            np.testing.assert_array_equal(ds[name].values[0, index], array)


def test_what_two_allocations_disagree_on_is_written_under_one_lock(tmp_path: Path) -> None:
    """Two that allocate at one moment may each make some of the arrays."""
    store = tmp_path / "s.zarr"
    write(store, [], 24, 6)
    attach(store, replace(block_of(24, "j", 4)))
    for name in ("kl", "text"):
        (store / "e/m.g.i" / name / "zarr.json").write_bytes(
            (store / "e/m.g.j" / name / "zarr.json").read_bytes()
        )
    write_at_once(store, 24, 6)
    assert values_are_right(open_results(store, "e", run="m.g.i"))
    (info, _) = list_runs(store)
    assert info.group._per_lock == 12


def test_a_block_of_flags_that_was_cut_off_is_measured_anew(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    write_all(store, 8, 4, per_chunk=4)
    (store / "e/m.g.i/completed/c.0.1").write_bytes(b"")
    assert open_results(store, "e").completed.values[0].tolist() == [True] * 4 + [False] * 4
    (store / "e/m.g.i/kl/c.0.1.0.0").write_bytes(b"\x28")
    assert write_all(store, 8, 4) == [["p004/t", "p005/t", "p006/t", "p007/t"]]
    assert values_are_right(open_results(store, "e"))


def test_a_damaged_chunk_with_complete_cells_is_one_sentence(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    write(store, [0, 1], 4, 4)
    (store / "e/m.g.i/kl/c.0.0.0.0").write_bytes(b"\x28")
    with pytest.raises(pn.PersonaError, match="holds complete cells and cannot be read"):
        write(store, [2], 4)
    assert np.flatnonzero(list_runs(store)[0].group.flags()[0]).tolist() == [0, 1]


def test_a_run_in_blocks_is_the_same_run_and_can_be_verified(tmp_path: Path) -> None:
    folder = str(Path(__file__).with_name("golden") / "qwen2")
    model = pn.load_model(folder)
    asked: dict[str, Any] = {"layers": "1", "positions": "p_last", "progress": False}
    one, two = tmp_path / "one.zarr", tmp_path / "two.zarr"
    cells = pn.load_grid("short").cells[:3]
    asked["cells"] = [cell.label for cell in cells]
    pn.run("localized_positions", model, "short", store=one, **asked)
    pn.run("localized_positions", model, "short", store=two, cells_per_chunk=4, **asked)
    with pytest.raises(pn.UsageError, match="has 4 cells a chunk"):
        pn.run("localized_positions", model, "short", store=two, cells_per_chunk=2, **asked)
    with pytest.raises(pn.UsageError, match="0 cells a chunk are too few"):
        pn.run("localized_positions", model, "short", store=two, cells_per_chunk=0, **asked)
    ds = [open_results(store, "localized_positions") for store in (one, two)]
    assert ds[0].attrs["identity"] == ds[1].attrs["identity"]
    xr.testing.assert_equal(ds[0].drop_vars("seconds"), ds[1].drop_vars("seconds"))
    (verdict,) = verify_store(
        two, sample=1, models=[str(Path(__file__).with_name("golden") / "qwen2")]
    )
    assert (verdict.state, verdict.problems) == ("right", ())


def claims_of(store: Path, name: str, n_cells: int) -> Claims:
    return Claims(store, [block_of(n_cells, per_chunk=8)], name, {})


def test_processes_go_to_different_blocks(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    write(store, [], 32, 8)
    claims = [claims_of(store, name, 32) for name in ("a", "b", "c", "d")]
    for each in claims:
        each.begin()
    queues = [iter(Queue(plan_of(32).units, 2, each, order=random.Random(0))) for each in claims]
    batches = [next(queue) for queue in queues]
    assert len({int(batch[0].label[1:4]) // 8 for batch in batches}) == 4
    claims[0].write(batches[0], values_of(batches[0]), 1.0)
    following = next(queues[0])  # stays in its block
    assert int(following[0].label[1:4]) == int(batches[0][0].label[1:4]) + 2


def test_quick_batches_are_written_a_block_at_a_time(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    claims = claims_of(store, "a", 16)
    claims.begin()
    claims._written = time.monotonic()
    batches = [cells_of(range(start, start + 2)) for start in range(0, 12, 2)]
    seen: list[int] = []
    for batch in batches:
        claims.collect(batch, values_of(batch), batch[0].label == "p002/t")
        claims.claim([])
        seen.append(int(list_runs(store)[0].group.flags().sum()))
    assert seen == [0, 0, 0, 8, 8, 8]
    (note,) = list_runs(store)[0].group.sessions().values()
    assert note["claims"] == ["p008/t", "p009/t", "p010/t", "p011/t"]  # measured, and not written
    claims._written -= 2.0  # more than a second has passed
    claims.collect(cells_of([12]), values_of(cells_of([12])), 1.0)
    claims.settle()
    results = open_results(store, "e")
    assert np.flatnonzero(results.completed.values[0]).tolist() == [*range(13)]
    assert results.seconds.values[0, :5].tolist() == [0, 0, 1, 1, 0]
    assert values_are_right(results)


def opened(patch: pytest.MonkeyPatch, store: Path) -> list[Path]:
    """The files of a store that are read from now on."""
    seen: list[Path] = []
    read, get = chunks._read, local._get

    def note(original: Any) -> Any:
        def call(path: Path | str, *arguments: Any) -> Any:
            if store in Path(path).parents:
                seen.append(Path(path).relative_to(store))
            return original(path, *arguments)

        return call

    patch.setattr(chunks, "_read", note(read))
    patch.setattr(local, "_get", note(get))
    return seen


def test_completeness_is_a_file_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "s.zarr"
    write_all(store, 64, 64, per_chunk=16)
    (info,) = list_runs(store)
    with monkeypatch.context() as patch:
        seen = opened(patch, store)
        assert len(info.group.completed(plan_of(64).units)) == 64
        flags = [path for path in seen if path.name.startswith("c.") and "completed" in path.parts]
        assert len(flags) == 4
        seen.clear()
        assert len(info.group.completed(plan_of(64).units[3:9])) == 6
        assert len(seen) == 1


def test_sessions_that_are_over_are_read_by_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "s.zarr"
    write(store, [], 8)

    def reads(name: str, n_looks: int) -> int:
        claims = Claims(store, [block_of(8)], name, {})
        claims.begin()
        with monkeypatch.context() as patch:
            seen = opened(patch, store)
            for _ in range(n_looks):
                assert claims.others() == {}
            n_read = len([path for path in seen if "sessions" in path.parts])
        claims.claim([])
        claims.end("now")
        return n_read

    first = reads("s00", 3)
    for number in range(1, 20):
        reads(f"s{number:02}", 0)
    assert reads("s20", 3) == first
    gone = Claims(store, [block_of(8)], "gone", {})
    gone.begin()
    gone._note["process"] = 2**22 + 1  # no such process on this machine
    gone.claim([])
    assert reads("s21", 3) > first  # found to be gone, and said so
    assert reads("s22", 3) == first
