"""Workers started by Ray share a run, and one that dies is replaced."""

import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_writer import plan_of, values_are_right, write_all

import persona_nns as pn
from persona_nns.prompts.grids import load_grid
from persona_nns.results.reading import list_runs, open_results
from persona_nns.runs.workers import run_on_workers

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Writing:
    """Work without a model: cells whose values follow from their labels."""

    store: str
    n_cells: int
    seconds: float

    def __call__(self) -> "Writing":
        return self

    @property
    def group(self) -> tuple[str, str]:
        return "e", "m.g.i"

    def carry_out(self, *, progress: bool, shared: bool) -> None:
        assert shared
        assert not progress
        write_all(self.store, self.n_cells, 1, self.seconds, shared=shared)


@pytest.fixture
def ray_here(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    # Workers find what the tests import.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent)]))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_a_worker_that_is_killed_is_replaced(tmp_path: Path) -> None:
    store = str(tmp_path / "s.zarr")
    started: list[int] = []
    killed: list[int] = []

    def kill_one() -> None:
        runs = list_runs(store) if Path(store, "zarr.json").exists() else []
        if runs and runs[0].n_completed >= 3 and started and not killed:
            os.kill(started[0], signal.SIGKILL)
            killed.append(started[0])

    deaths = run_on_workers(
        Writing(store, 24, 0.4),
        2,
        on_look=kill_one,
        on_start=lambda process, _group: started.append(process),
    )
    assert (deaths, len(killed)) == (1, 1)
    assert len(started) >= 2
    results = open_results(store, "e")
    assert bool(results.completed.all())
    assert values_are_right(results)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_two_workers_finish_the_long_grid_and_one_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from persona_nns.declarations.catalog import load_experiment
    from persona_nns.runs import workers

    store = str(tmp_path / "s.zarr")
    original = workers.run_on_workers
    killed: list[int] = []

    def supervised(*arguments: Any, **settings: Any) -> int:
        started: list[int] = []
        look, start = settings.pop("on_look"), settings.pop("on_start")

        def on_start(process: int, group: tuple[str, str]) -> None:
            started.append(process)
            start(process, group)

        def on_look() -> None:
            look()
            runs = list_runs(store) if Path(store, "zarr.json").exists() else []
            if runs and runs[0].n_completed >= 4 and not killed:
                os.kill(started[0], signal.SIGKILL)
                killed.append(started[0])

        return original(*arguments, on_look=on_look, on_start=on_start, **settings)

    monkeypatch.setattr(workers, "run_on_workers", supervised)
    model = {"name": str(HERE / "golden" / "qwen2"), "label": "qwen2"}
    settings = {"grid": "long", "cells": None, "store": store, "batch_size": 2}
    sites: dict[str, Any] = {"layers": "2,4", "positions": "p_last"}
    experiment = load_experiment("localized_positions")
    plan = replace(plan_of(0), units=load_grid("long").cells)
    run = workers.launch(experiment, model, {**settings, **sites}, plan, 2, None)
    assert len(killed) == 1
    shared = open_results(store, "localized_positions", run=run)
    assert bool(shared.completed.all())
    single = pn.run(
        "localized_positions", model["name"], "long", store=tmp_path / "t.zarr", **sites
    )
    assert single.attrs["identity"] == shared.attrs["identity"]
    for name in ("kl", "cos_additive", "interaction_ratio"):
        np.testing.assert_allclose(shared[name], single[name], rtol=1e-3, atol=1e-5)
    notes = list_runs(store)[0].group.sessions().values()
    print([(note["n_written"], note["n_repeated"]) for note in notes])


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_an_error_of_a_worker_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(pn.PersonaError, match="cannot be written") as caught:
        run_on_workers(Writing(str(tmp_path / "file" / "s.zarr"), 2, 0.0), 1)
    assert "\n" not in str(caught.value)


def test_without_ray_a_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(pn.UsageError, match=r"pip install 'persona-nns\[ray\]'"):
        run_on_workers(Writing("s.zarr", 1, 0.0), 2)


def test_a_wrong_number_of_workers_is_refused() -> None:
    with pytest.raises(pn.UsageError, match="0 workers"):
        run_on_workers(Writing("s.zarr", 1, 0.0), 0)
