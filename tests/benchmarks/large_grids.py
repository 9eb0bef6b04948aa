"""What large grids cost: planned, stored, opened and sliced, beside what a user would write.

``python tests/benchmarks/large_grids.py [FILE.csv]`` runs an experiment of eleven variables that
computes nothing, through `pn.run` with a bundled model, on grids of 1,000, 10,000 and 100,000
cells; each step in a process of its own, of which the peak memory is told as well. Beside it stand
two loops over cells that a user would write in its place: pandas rows kept and written as Parquet
after each batch (so that nothing is lost), and the same with a file for each batch.

``… kills STORE N_CELLS N`` kills the run at random moments and sees that nothing is lost or wrong.
"""

import json
import resource
import subprocess
import sys
import time
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
RUN = {"layers": "1,2,3", "positions": "p_last,g1,g2"}


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
    from persona_nns.runs.run import plan_run

    model = pn.load_model("organism-qwen2")
    file = folder / "numbers_only.py"
    file.write_text(MEASURE)
    store = folder / "s.zarr"
    started = time.perf_counter()
    plan_run(str(file), model, grid_of(n_cells), store=store, **RUN)
    planned = time.perf_counter() - started
    started = time.perf_counter()
    pn.run(str(file), model, grid_of(n_cells), store=store, progress=False, **RUN)
    return {"plan": planned, "all": time.perf_counter() - started}


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
    "run": measure_run,
    "again": measure_again,
    "list": measure_listing,
    "open": measure_opening,
}


def of_pandas(folder: Path, n_cells: int, batch: int = 32) -> dict[str, float]:
    """A loop over cells that keeps rows, and writes all of them after every batch."""
    import pandas as pd

    class Cell:
        def __init__(self, label: str) -> None:
            self.label = label

    space: dict[str, Any] = {}
    exec(MEASURE, space)
    labels = [
        f"{p}/{t}"
        for p in list(grid_of(n_cells).personas)[1:]
        for t in list(grid_of(n_cells).tasks)[1:]
    ]
    one = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for start in range(0, n_cells, batch):
        cells = [Cell(label) for label in labels[start : start + batch]]
        found = space["measure"](None, cells, layers=[1, 2, 3], positions=["a", "b", "c"])
        rows += [
            {
                "cell": cell.label,
                **{
                    f"{n}.{i}": v
                    for n, of in found.items()
                    for i, v in enumerate(of[row].ravel() if n.startswith("number") else [of[row]])
                },
            }
            for row, cell in enumerate(cells)
        ]
        if start // batch % 100 == 0:  # every batch would be quadratic: a hundredth of it is shown
            pd.DataFrame(rows).to_parquet(folder / "all.parquet")
    pd.DataFrame(rows).to_parquet(folder / "all.parquet")
    stored = time.perf_counter() - one
    one = time.perf_counter()
    frame = pd.read_parquet(folder / "all.parquet")
    opened = time.perf_counter() - one
    one = time.perf_counter()
    frame[frame.cell.str.startswith(f"p{n_cells // 200}/")]
    return {"all": stored, "open": opened, "persona": time.perf_counter() - one}


def in_process(step: str, folder: Path, n_cells: int) -> dict[str, float]:
    """A step in a process of its own, with its peak memory in MiB."""
    command = [sys.executable, str(HERE), "step", step, str(folder), str(n_cells)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise SystemExit(answer.stderr)
    return json.loads(answer.stdout.splitlines()[-1])


if __name__ == "__main__":
    if sys.argv[1:2] == ["step"]:
        name, place, number = sys.argv[2:]
        steps = {**STEPS, "pandas": of_pandas}
        result = steps[name](Path(place), int(number))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({**result, "MiB": peak}))
