"""How well workers share cells: a model of fixed latency, 1, 2, 4 and 8 workers of Ray.

``python tests/benchmarks/scaling.py`` prints, for each number of workers, the time
from the moment all of them are ready until every cell is complete, the cells measured twice,
and the efficiency: the time that the measuring alone takes, over workers times that time. Nothing
is computed while a batch is measured, so more workers than cores are as good as more machines.
``--batch 32 --cells 2560 --per-chunk 256`` shares blocks of a large grid.
"""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE))
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent)])

from store_writer import write_all  # noqa: E402

from persona_nns.results.reading import list_runs  # noqa: E402
from persona_nns.runs.workers import run_on_workers  # noqa: E402


@dataclass(frozen=True)
class Sleeping:
    """Work that takes a fixed time a batch, begun by all workers at once."""

    store: str
    n_cells: int
    seconds: float
    n_workers: int
    batch: int
    per_chunk: int | None

    def __call__(self) -> "Sleeping":
        return self

    @property
    def group(self) -> tuple[str, str]:
        return "e", "m.g.i"

    def carry_out(self, *, progress: bool, shared: bool) -> None:
        del progress
        ready = Path(self.store + ".ready")
        ready.mkdir(exist_ok=True)
        (ready / str(os.getpid())).touch()
        while len(list(ready.iterdir())) < self.n_workers:
            time.sleep(0.02)
        started = time.time()
        write_all(
            self.store,
            self.n_cells,
            self.batch,
            self.seconds,
            shared=shared,
            per_chunk=self.per_chunk,
        )
        Path(self.store + f".{os.getpid()}.time").write_text(f"{started} {time.time()}")


def measure(
    folder: Path, n_workers: int, n_cells: int, seconds: float, batch: int, per_chunk: int | None
) -> None:
    store = folder / f"{n_workers}.zarr"
    work = Sleeping(str(store), n_cells, seconds, n_workers, batch, per_chunk)
    run_on_workers(work, n_workers)
    times = [tuple(map(float, file.read_text().split())) for file in folder.glob("*.time")]
    taken = min(end for _, end in times) - min(start for start, _ in times)
    (info,) = list_runs(store)
    notes = info.group.sessions().values()
    repeated = sum(note["n_repeated"] for note in notes)
    efficiency = n_cells / batch * seconds / (n_workers * taken)
    print(
        f"{n_workers} workers: {info.n_completed} cells, {batch} in {seconds} s, in {taken:.1f} s, "
        f"{repeated} measured twice, efficiency {100 * efficiency:.1f} %",
        flush=True,
    )


def main(
    n_cells: int, seconds: float, numbers: list[int], batch: int, per_chunk: int | None
) -> None:
    for n_workers in numbers:
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), n_workers, n_cells, seconds, batch, per_chunk)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cells", type=int, default=80)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--per-chunk", type=int)
    given = parser.parse_args()
    main(given.cells, given.seconds, given.workers, given.batch, given.per_chunk)
