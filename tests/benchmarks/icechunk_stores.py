"""Arrays as a run has them in an Icechunk repository, beside plain Zarr folders.

``python tests/benchmarks/icechunk_stores.py [OUT.csv]`` (needs ``pip install icechunk``) writes
cells in batches, in turns: to plain Zarr, and to a repository with one transaction for a batch. It
prints milliseconds a cell, files and megabytes; CSV goes where it is told.
"""

import csv
import statistics
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import zarr

icechunk: Any = import_module("icechunk")  # no dependency

VARIABLES, LAYERS, POSITIONS, TURNS = 11, 8, 2, 3
# Cells, cells in a chunk, cells in a batch.
SHAPES = ((256, 1, 32), (1024, 32, 32), (4096, 256, 256), (2048, 256, 32))


def allocate(root: zarr.Group, cells: int, chunk: int) -> None:
    """Make the arrays."""
    for name in range(VARIABLES):
        shape = (1, cells, LAYERS, POSITIONS)
        chunks = (1, chunk, LAYERS, POSITIONS)
        root.create_array(f"v{name}", shape=shape, chunks=chunks, dtype="f4")
    root.create_array("completed", shape=(1, cells), chunks=(1, chunk), dtype="bool")


def write(root: zarr.Group, begin: int, end: int) -> None:
    """Write the cells of a batch, and that they are complete."""
    numbers = np.random.default_rng(begin)
    for name in range(VARIABLES):
        array: Any = root[f"v{name}"]
        array[0, begin:end] = numbers.random((end - begin, LAYERS, POSITIONS), "f4")
    completed: Any = root["completed"]
    completed[0, begin:end] = True


def plain(folder: Path, cells: int, chunk: int, batch: int) -> float:
    """Seconds that all batches take in plain Zarr."""
    root = zarr.open_group(folder, mode="w")
    allocate(root, cells, chunk)
    begun = time.perf_counter()
    for begin in range(0, cells, batch):
        write(root, begin, begin + batch)
    return time.perf_counter() - begun


def transactions(folder: Path, cells: int, chunk: int, batch: int) -> float:
    """Seconds that all batches take, each a transaction."""
    storage = icechunk.local_filesystem_storage(str(folder))
    repository = icechunk.Repository.create(storage)
    session = repository.writable_session("main")
    allocate(zarr.open_group(session.store, mode="a"), cells, chunk)
    session.commit("allocated")
    begun = time.perf_counter()
    for begin in range(0, cells, batch):
        session = repository.writable_session("main")
        write(zarr.open_group(session.store, mode="a"), begin, begin + batch)
        session.commit("a batch")
    return time.perf_counter() - begun


def main() -> None:
    """Print and write the table."""
    icechunk.set_logs_filter("error")  # it says for each repository that a folder is not for two
    rows: list[dict[str, object]] = []
    for cells, chunk, batch in SHAPES:
        times: dict[str, list[float]] = {"plain Zarr": [], "Icechunk": []}
        sizes: dict[str, list[int]] = {}
        for _ in range(TURNS):
            for store, measured in (("plain Zarr", plain), ("Icechunk", transactions)):
                with tempfile.TemporaryDirectory() as folder:
                    seconds = measured(Path(folder) / "s", cells, chunk, batch)
                    times[store].append(1000 * seconds / cells)
                    files = [file for file in Path(folder).rglob("*") if file.is_file()]
                    sizes[store] = [file.stat().st_size for file in files]
        for store, of_store in times.items():
            rows.append(
                {
                    "store": store,
                    "cells": cells,
                    "cells in a chunk": chunk,
                    "cells in a batch": batch,
                    "ms a cell": f"{statistics.median(of_store):.2g}",
                    "files": len(sizes[store]),
                    "MB": f"{sum(sizes[store]) / 1e6:.1f}",
                }
            )
            print(*rows[-1].values(), flush=True)
    if len(sys.argv) > 1:
        with Path(sys.argv[1]).open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)


if __name__ == "__main__":
    main()
