"""What large grids cost: planned, stored, opened and sliced, beside what a user would write.

``python tests/benchmarks/large_grids.py FILE.csv [N_CELLS …]`` runs an experiment of eleven
variables that computes nothing, through `pn.run` with a bundled model, on grids of 1,000, 10,000
and 100,000 cells; each step in a process of its own, of which the peak memory is told as well.
Beside it stands a loop over cells that a user would write in its place: a Parquet file for each
batch, without prompts, provenance or a word about what is complete.

``… kills STORE N_CELLS N`` kills the run at random moments and sees that nothing is lost or wrong.
"""

import csv
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
MEASURE = '''
"""Numbers that follow from the label of a cell, in eleven variables."""
import numpy as np
from persona_nns import Variable

protocol_version = 1
variables = {
    **{f"number_{i}": Variable("cell layer position", f"number {i}") for i in range(6)},
    **{f"each_{i}": Variable("cell", f"number {i}") for i in range(2)},
    "count": Variable("cell", "count", kind="int"),
    "hit": Variable("cell", "hit", kind="bool"),
    "text": Variable("cell", "what was said", kind="text"),
}


def numbers_of(labels):
    """The number of each cell."""
    return np.array([sum(int(part[1:]) * n for part, n in zip(label.split("/"), (1000, 1)))
                     for label in labels])


def measure(model, cells, *, layers: list[int], positions: list[str]):
    index = numbers_of([cell.label for cell in cells])
    wide = np.broadcast_to(index[:, None, None], (len(cells), len(layers), len(positions)))
    return {
        **{f"number_{i}": (wide + i).astype(np.float32) for i in range(6)},
        **{f"each_{i}": (index + i).astype(np.float32) for i in range(2)},
        "count": index,
        "hit": index % 2 == 0,
        "text": np.array([f"said of {cell.label}" for cell in cells], dtype=object),
    }
'''
RUN: dict[str, Any] = {"layers": "1,2,3", "positions": "p_last,g1,g2"}


def grid_of(n_cells: int) -> Any:
    """Personas by tasks, a hundred tasks where there are as many cells."""
    from persona_nns.prompts.grids import Grid

    n_tasks = min(100, n_cells)
    personas = {f"p{i}": f"an expert of the field number {i}" for i in range(n_cells // n_tasks)}
    tasks = {f"t{i}": f"write a few lines about the subject number {i}." for i in range(n_tasks)}
    return Grid(
        "large",
        {"baseline": "someone", **personas},
        {"baseline": "write something.", **tasks},
    )


def measure_run(folder: Path, n_cells: int) -> dict[str, float]:
    """Plan, and measure and store what is missing."""
    import persona_nns as pn

    model = pn.load_model("organism-qwen2")
    file = folder / "numbers_only.py"
    file.write_text(MEASURE)
    store = folder / "s.zarr"
    started = time.perf_counter()
    pn.run(str(file), model, grid_of(n_cells), store=store, progress=False, **RUN)
    return {"all": time.perf_counter() - started}


def measure_planning(folder: Path, n_cells: int) -> dict[str, float]:
    """Plan alone."""
    import persona_nns as pn
    from persona_nns.runs.run import plan_run

    model = pn.load_model("organism-qwen2")
    file = folder / "numbers_only.py"
    file.write_text(MEASURE)
    started = time.perf_counter()
    plan_run(str(file), model, grid_of(n_cells), store=folder / "none.zarr", **RUN)
    return {"plan": time.perf_counter() - started}


def measure_again(folder: Path, n_cells: int) -> dict[str, float]:
    """The same command once more, which finds everything there."""
    return {"nothing to do": measure_run(folder, n_cells)["all"]}


def measure_opening(folder: Path, n_cells: int) -> dict[str, float]:
    import xarray as xr  # noqa: F401

    from persona_nns.results.reading import open_results

    started = time.perf_counter()
    ds = open_results(folder / "s.zarr", "numbers_only")
    opened = time.perf_counter() - started
    started = time.perf_counter()
    part = ds.sel(cell=ds.persona == f"p{n_cells // 200}").load()
    sliced = time.perf_counter() - started
    assert bool(part.completed.all())
    check(ds)
    return {"open": opened, "persona": sliced}


def measure_listing(folder: Path, n_cells: int) -> dict[str, float]:
    from persona_nns.results.reading import list_runs

    started = time.perf_counter()
    (info,) = list_runs(folder / "s.zarr")
    assert info.n_completed == n_cells
    return {"list": time.perf_counter() - started}


def check(ds: Any) -> None:
    """See that every complete cell holds its numbers, and every other none."""
    import numpy as np

    space: dict[str, Any] = {}
    exec(MEASURE, space)
    index = space["numbers_of"](ds.cell.values.tolist()).astype(float)
    done = ds.completed.values[0]
    expected = np.where(done, index, np.nan)
    for i in range(6):
        wide = np.broadcast_to((expected + i)[:, None, None], ds[f"number_{i}"].shape[1:])
        np.testing.assert_array_equal(ds[f"number_{i}"].values[0], wide.astype(np.float32))
    np.testing.assert_array_equal(ds["count"].values[0].astype(float), expected)
    said = [f"said of {label}" if d else "" for label, d in zip(ds.cell.values, done, strict=True)]
    assert ds.text.values[0].tolist() == said


STEPS = {
    "plan": measure_planning,
    "run": measure_run,
    "again": measure_again,
    "list": measure_listing,
    "open": measure_opening,
}


def of_pandas(folder: Path, n_cells: int) -> dict[str, float]:
    """A loop over cells in batches of 32, each written as a Parquet file of its own."""
    import pandas as pd

    space: dict[str, Any] = {}
    exec(MEASURE, space)
    cells, parts = grid_of(n_cells).cells, folder / "parts"
    parts.mkdir()
    started = time.perf_counter()
    for start in range(0, n_cells, 32):
        batch = cells[start : start + 32]
        found = space["measure"](None, batch, layers=[1, 2, 3], positions=["p_last", "g1", "g2"])
        columns: dict[str, Any] = {"cell": [cell.label for cell in batch]}
        for name, of in found.items():
            wide = of.reshape(len(batch), -1)
            columns |= {f"{name}.{i}": wide[:, i] for i in range(wide.shape[1])}
        pd.DataFrame(columns).to_parquet(parts / f"{start:06}.parquet")
    stored = time.perf_counter() - started
    started = time.perf_counter()
    frame = pd.read_parquet(parts)
    opened = time.perf_counter() - started
    started = time.perf_counter()
    assert len(frame[frame.cell.str.startswith(f"p{n_cells // 200}/")]) == min(100, n_cells)
    return {"all": stored, "open": opened, "persona": time.perf_counter() - started}


def in_process(step: str, folder: Path, n_cells: int) -> dict[str, float]:
    """A step in a process of its own, with its peak memory in MiB."""
    command = [sys.executable, str(HERE), "step", step, str(folder), str(n_cells)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise SystemExit(answer.stderr)
    return json.loads(answer.stdout.splitlines()[-1])


def rows_of(n_cells: int) -> Iterator[list[str]]:
    """What one size of grid costs, as rows of a table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan, run, again, listed, opened = (in_process(step, folder, n_cells) for step in STEPS)
        yield _row("persona_nns", n_cells, folder / "s.zarr", run, opened)
        print(
            f"{n_cells}: planned {plan['plan']:.1f} s, again {again['nothing to do']:.1f} s,",
            end="",
        )
        print(f" listed {listed['list']:.2f} s", flush=True)
        pandas = in_process("pandas", folder, n_cells)
        yield _row("pandas, a file for each batch", n_cells, folder / "parts", pandas, pandas)


def _row(
    name: str, n_cells: int, store: Path, run: Mapping[str, float], opened: Mapping[str, float]
) -> list[str]:
    n_files = sum(file.is_file() for file in store.rglob("*"))
    each = [1000 * run["all"] / n_cells, opened["open"], opened["persona"]]
    cpu = [1000 * run["CPU"] / n_cells]
    peak = max(run["MiB"], opened["MiB"])
    shown = [f"{value:.2f}" for value in (*each, *cpu)]
    return [f"{n_cells:,}", name, shown[0], shown[3], f"{n_files:,}", *shown[1:3], f"{peak:.0f}"]


HEADER = [
    "Cells",
    "",
    "ms a cell",
    "CPU of the process, ms a cell",
    "Files",
    "Opened, s",
    "A persona, s",
    "MiB",
]


def kill(store: Path, n_cells: int, times: int) -> None:
    """Kill the run at random moments of its writing; see that nothing is lost or wrong."""
    from persona_nns.results.reading import list_runs, open_results

    command = [sys.executable, str(HERE), "step", "run", str(store.parent), str(n_cells)]
    chance, n_before, n_killed = random.Random(0), 0, 0
    for _ in range(times):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            with suppress(Exception):
                if list_runs(store)[0].n_completed > n_before:
                    break
            time.sleep(0.1)
        time.sleep(chance.uniform(0, 4))
        process.send_signal(signal.SIGKILL)
        n_killed += process.wait() == -signal.SIGKILL
        ds = open_results(store, "numbers_only")
        check(ds)
        n_done = int(ds.completed.sum())
        assert n_done >= n_before
        print(f"killed: {n_before} were complete before, {n_done} are, and right", flush=True)
        n_before = n_done
    in_process("run", store.parent, n_cells)
    ds = open_results(store, "numbers_only")
    check(ds)
    assert bool(ds.completed.all())
    print(f"{n_killed} killed; {n_cells} cells are complete and right", flush=True)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "step":
        steps = {**STEPS, "pandas": of_pandas}
        result = steps[rest[0]](Path(rest[1]), int(rest[2]))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({**result, "CPU": time.process_time(), "MiB": peak}))
    elif what == "kills":
        kill(Path(rest[0]), int(rest[1]), int(rest[2]))
    else:
        with open(what, "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(HEADER)
            for size in map(int, rest or ("1000", "10000", "100000")):
                table.writerows(rows_of(size))
                file.flush()
