"""How far a run has come is told on a terminal, in a notebook, and in a log."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from nnsight import TransformersModel
from rich.console import Console

import persona_nns as pn
from persona_nns.prompts.grids import Grid
from persona_nns.runs import progress, threads
from persona_nns.runs.progress import UnitProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time, which a test can set."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


def test_a_run_without_a_terminal_says_how_far_it_is_and_then_that_it_is_complete(
    golden_model: Callable[[str], TransformersModel],
    small_grid: Grid,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    request: dict[str, Any] = {"layers": "2", "batch_size": 2, "store": tmp_path / "s.zarr"}
    model = golden_model("qwen2")
    capsys.readouterr()
    pn.run("localized_positions", model, small_grid, **request)
    out, err = capsys.readouterr()
    first, *later = err.splitlines()
    assert out == ""
    assert first == "qwen2 · small: 4 cells, 2 at a time, on 1 thread"
    assert later[0].startswith("qwen2 · small: batch 1 of 2, 2 of 4 cells, 0:0")
    assert later[-1].startswith("qwen2 · small: batch 2 of 2, 4 of 4 cells, 0:0")
    pn.run("localized_positions", model, small_grid, **request)
    assert capsys.readouterr().err == ("qwen2 · small: 4 of 4 cells complete, nothing computed\n")
    pn.run("localized_positions", model, small_grid, progress=False, **request)
    assert capsys.readouterr().err == ""


def test_lines_come_now_and_then(
    clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    with UnitProgress("m · g", "cell", 1000, 100, enabled=True) as bar:
        for k in range(1, 901):
            clock.seconds += 1.0
            bar.update(100 + k, (k, 900))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "m · g: batch 1 of 900, 101 of 1000 cells, 0:01, about 14:59 left"
    assert lines[1] == "m · g: batch 6 of 900, 106 of 1000 cells, 0:06, about 14:54 left"
    assert lines[-1] == "m · g: batch 900 of 900, 1000 of 1000 cells, 15:00"
    assert 20 < len(lines) < 60  # one in ten seconds or so, and ever fewer


def test_a_terminal_has_a_bar_and_no_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Console, "is_terminal", True)
    with UnitProgress("m · g", "cell", 4, enabled=True) as bar:
        bar.update(2, (1, 2))
        bar.states(["running", "running"])
    shown = capsys.readouterr().err
    assert "2/4" in shown
    assert "jobs: 2 running" in shown
    assert "batch 1 of 2" not in shown


def test_a_notebook_has_one_line_that_changes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []
    handle = SimpleNamespace(update=lambda text, **_: shown.append(text["text/plain"]))

    def display(text: dict[str, str], **_: Any) -> SimpleNamespace:
        assert shown == []  # once
        shown.append(text["text/plain"])
        return handle

    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    module = ModuleType("IPython.display")
    module.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    with UnitProgress("m · g", "cell", 4, enabled=True) as bar:
        bar.update(1, (1, 4))
        bar.update(4, (4, 4))
    assert capsys.readouterr().err == ""
    assert shown[0].startswith("██████░░░░░░░░░░░░░░░░░░ m · g: batch 1 of 4, 1 of 4 cells")
    assert shown[1].startswith("████████████████████████ m · g: batch 4 of 4, 4 of 4 cells")
    assert shown[1].endswith(", complete")
    del shown[:]
    bar = UnitProgress("m", "cell", 4, enabled=True)
    bar.update(1, (1, 4))
    bar.__exit__(KeyboardInterrupt)
    assert shown[-1].startswith("██████░░░░░░░░░░░░░░░░░░ m: batch 1 of 4, 1 of 4 cells, 0:0")
    assert shown[-1].endswith(", stopped")


@pytest.mark.parametrize(("others", "free"), [(0.0, 4), (1.2, 3), (4.0, 1), (9.0, 1)])
def test_threads_are_as_many_as_cores_are_free(
    others: float, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four cores that others keep busy, or not; what this process did itself does not count."""
    seconds = 10.0
    monkeypatch.setattr(threads, "_BEGAN", (0.0, 0.0, 0.0))
    monkeypatch.setattr(threads.time, "monotonic", lambda: seconds)
    monkeypatch.setattr(psutil, "cpu_times", lambda: (others * seconds + 7.0, 0.0, 0.0))
    monkeypatch.setattr(threads.os, "times", lambda: (7.0, 0.0, 0, 0, 0))
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert threads.free_cores() == free


def test_threads_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(threads, "free_cores", lambda: 6)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    threads.set_threads(None)
    assert asked == []  # the user has decided
    threads.set_threads(5)
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads.set_threads(None)
    assert asked == [5, 6]
