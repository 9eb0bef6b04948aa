"""What the store costs: its share of a demo run, and opening a store with a hundred runs.

``python tests/benchmarks/store_overhead.py`` runs the demo into a temporary folder and prints the
time spent in sharing and writing cells beside the time of the runs; then it allocates a hundred
runs of twenty cells and prints how long a listing and an opening take.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.console import Console
from store_writer import write_all

from persona_nns.cli import demo
from persona_nns.results.claims import Claims
from persona_nns.results.reading import list_runs, open_results
from persona_nns.runs import queue

spent: dict[str, float] = {}


def timed(owner: Any, name: str) -> None:
    """Add up the time that calls of a function take."""
    original: Callable[..., Any] = getattr(owner, name)

    def call(*arguments: Any, **settings: Any) -> Any:
        started = time.perf_counter()
        try:
            return original(*arguments, **settings)
        finally:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - started

    setattr(owner, name, call)


def measure_demo(folder: Path) -> None:
    for owner, name in (
        (Claims, "write"),
        (Claims, "end"),
        (queue.Queue, "_next"),
        (import_module("persona_nns.runs.run"), "_carry_out"),
    ):
        timed(owner, name)
    started = time.perf_counter()
    console = Console(quiet=True)
    demo.run_demo(demo.ON_ORGANISMS, str(folder / "s.zarr"), folder / "figures", console)
    total = time.perf_counter() - started
    store = sum(spent[name] for name in ("write", "end", "_next"))
    print(
        f"demo: {total:.1f} s, of which runs {spent['_carry_out']:.1f} s, and of these sharing and "
        f"writing {store:.2f} s: {100 * store / spent['_carry_out']:.1f} % of the runs, "
        f"{100 * store / total:.1f} % of the demo"
    )


def measure_opening(folder: Path) -> None:
    store = folder / "hundred.zarr"
    for index in range(100):
        write_all(store, 20, 20, identity=str(index))
    for name, look in (
        ("listing 100 runs", lambda: [info.attrs["identity"] for info in list_runs(store)]),
        ("with their completeness", lambda: [info.n_completed for info in list_runs(store)]),
        ("opening one of them", lambda: open_results(store, "e", run="m.g.42")),
    ):
        started = time.perf_counter()
        look()
        print(f"{name}: {time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        measure_opening(Path(name))
        measure_demo(Path(name))
