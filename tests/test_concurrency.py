"""Several processes on one store: nothing lost, hardly anything twice, readers never misled."""

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from store_writer import block_of, cells_of, values_are_right, values_of, write_all

import persona_nns as pn
from persona_nns.results.claims import Claims
from persona_nns.results.locations import location_of
from persona_nns.results.reading import list_runs, open_results
from persona_nns.runs.queue import Queue

WRITER = Path(__file__).with_name("store_writer.py")
N_PROCESSES, N_CELLS, BATCH = 3, 24, 2


def start(store: str, seconds: float = 0.1) -> subprocess.Popen[str]:
    command = [sys.executable, WRITER, store, str(N_CELLS), str(BATCH), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_share_a_run_while_it_is_read(tmp_path: Path) -> None:
    store = str(tmp_path / "s.zarr")
    processes = [start(store) for _ in range(N_PROCESSES)]
    seen: list[int] = []
    while any(process.poll() is None for process in processes):
        try:
            results = open_results(store, "e")
        except pn.UsageError:
            continue  # nothing is there yet
        assert values_are_right(results)
        seen.append(int(results.completed.sum()))
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * N_PROCESSES
    measured = Counter(
        label for text in said for batch in text.split() for label in batch.split(",")
    )
    assert len(measured) == N_CELLS
    twice = {label for label, n in measured.items() if n > 1}
    print(f"{len(twice)} of {N_CELLS} cells measured more than once by {N_PROCESSES} processes")
    assert sum(measured.values()) - N_CELLS <= N_PROCESSES * BATCH
    results = open_results(store, "e")
    assert bool(results.completed.all())
    assert values_are_right(results)
    assert seen == sorted(seen)
    shares = [len(text.split()) for text in said]
    assert sum(1 for n in shares if n) >= 2
    notes = list_runs(store)[0].group.sessions().values()
    assert sum(note["n_written"] + note["n_repeated"] for note in notes) == sum(measured.values())


def test_different_configurations_do_not_disturb_each_other(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    write_all(
        store, 3, 1, identity="one", on_batch=lambda _: write_all(store, 4, 2, identity="two")
    )
    for identity, n_cells in (("one", 3), ("two", 4)):
        results = open_results(store, "e", run=f"m.g.{identity}")
        assert results.completed.values.tolist() == [[True] * n_cells]
        assert values_are_right(results)


def claims_of(store: Path, name: str) -> Claims:
    return Claims(store, [block_of(6)], name, {})


def test_a_claim_leaves_no_store_where_nothing_was_measured(tmp_path: Path) -> None:
    other = claims_of(tmp_path / "t.zarr", "other")
    assert other.claimed_by_others() == Counter()
    other.claim(cells_of([0, 1]))  # nothing is written before there is a run
    assert not (tmp_path / "t.zarr").exists()


def test_a_batch_of_a_process_that_is_gone_is_taken_over(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    gone = claims_of(store, "gone")
    gone.write(cells_of([0]), values_of(cells_of([0])), 1.0)
    gone.claim(cells_of([1, 2]))
    assert claims_of(store, "mine").claimed_by_others() == {"p001/t": 1, "p002/t": 1}

    gone._note["process"] = 2**22 + 1  # no such process on this machine
    gone.claim(cells_of([1, 2]))
    assert claims_of(store, "mine").claimed_by_others() == Counter()

    gone._note["host"] = "another machine"  # nobody knows whether it is gone
    gone.claim(cells_of([1, 2]))
    mine = claims_of(store, "mine")
    order: list[str] = []
    queue = Queue(cells_of(range(6)), 2, mine, order=random.Random(0))
    queue._patience = 0.05
    for batch in queue:
        order += [cell.label for cell in batch]
        mine.write(batch, values_of(batch), 1.0)
    assert sorted(order) == [cell.label for cell in cells_of(range(1, 6))]
    assert set(order[-2:]) == {"p001/t", "p002/t"}


def test_a_cell_that_somebody_else_completed_is_not_written_again(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    first, second = claims_of(store, "first"), claims_of(store, "second")
    first.write(cells_of([0]), values_of(cells_of([0])), 1.0)
    wrong = {name: array[::-1] for name, array in values_of(cells_of([0, 1])).items()}
    second.write(cells_of([0, 1]), wrong, 1.0)
    second.end("now")
    ds = open_results(store, "e")
    assert ds.kl.sel(cell="p000/t", layer=1, position="p_last").item() == 0.25
    note = list_runs(store)[0].group.sessions()["second"]
    assert (note["n_written"], note["n_repeated"], note["claims"]) == (1, 1, [])


@pytest.mark.parametrize("seed", range(5))
def test_each_process_has_an_order_of_its_own_and_batches_keep_neighbours(
    tmp_path: Path, seed: int
) -> None:
    cells = cells_of(range(6))
    queue = Queue(cells, 2, claims_of(tmp_path / "s.zarr", "a"), order=random.Random(seed))
    batches = queue._batches
    in_order = sorted(batches, key=lambda batch: batch[0].label)
    assert in_order == [cells[:2], cells[2:4], cells[4:]]


def test_an_unfinished_file_may_be_put_in_place_while_it_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (tmp_path / "e" / "run" / f"c.0.{name}.partial" for name in ("old", "new"))
    for file in (old, new):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"1")
    os.utime(old, (0, 0))

    def put_in_place() -> float:  # what another process does between the listing and the look
        new.unlink(missing_ok=True)
        return 1e9

    monkeypatch.setattr("persona_nns.results.locations.time.time", put_in_place)
    location_of(tmp_path).discard_damaged_metadata("e/run")
    assert not list(old.parent.iterdir())
