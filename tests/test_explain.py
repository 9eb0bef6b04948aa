"""What is told of a run before it starts is what it then does."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnsight import TransformersModel, save
from test_judge import Endpoint

import persona_nns as pn
from persona_nns.cli import main
from persona_nns.models import outline_model
from persona_nns.results.reading import find_run
from persona_nns.runs.estimates import job_sizes
from persona_nns.runs.remote.job_book import read_jobs
from persona_nns.runs.run import plan_run
from persona_nns.traits import load_traits
from persona_nns.traits.endpoint import EndpointJudge

NAMES: Any = ("BB", "XB", "BY", "XY", "BARE")
ASK: dict[str, Any] = {"layers": "1,3", "positions": "p_last,g1"}


@pytest.fixture
def model(random_model: Callable[[str], TransformersModel]) -> TransformersModel:
    return random_model("qwen2")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "s.zarr"


def chunks(store: Path, explained: pn.Explanation) -> list[Path]:
    """Files of units: those of all arrays but labels."""
    group = store / explained.experiment / explained.run
    results = pn.open_results(store, explained.experiment, run=explained.run)
    arrays = [*results.data_vars, "seconds", "completed"]
    return [file for name in {*map(str, arrays)} for file in (group / name).glob("c*")]


def test_units_and_bytes_are_those_of_the_run(
    model: TransformersModel, small_grid: pn.Grid, store: Path
) -> None:
    ask: dict[str, Any] = {**ASK, "cells": ["chef/haiku"], "store": store}
    first = pn.explain("localized_positions", model, small_grid, **ask)
    assert not store.exists()
    assert (first.n_asked, first.n_complete, first.n_left) == (1, 0, 1)
    assert (first.rate, first.seconds, first.jobs, first.judging) == (None, None, None, None)
    results = pn.run("localized_positions", model, small_grid, **ask, progress=False)
    assert results.attrs["run"] == first.run
    files = chunks(store, first)
    assert len(files) == first.written.n_chunks
    total = sum(file.stat().st_size for file in files)
    assert first.written.n_bytes / 3 < total <= first.written.n_bytes
    again = pn.explain("localized_positions", model, small_grid, **ask)
    assert (again.n_complete, again.n_left, again.seconds) == (1, 0, 0.0)
    assert str(again).endswith("1 cell asked for, 1 complete: nothing to compute")


def test_what_other_runs_hold_is_not_measured(
    model: TransformersModel, small_grid: pn.Grid, store: Path
) -> None:
    pn.run("localized_positions", model, small_grid, **ASK, store=store, progress=False)
    cells = [cell.label for cell in small_grid.cells]
    grid = pn.Grid("grown", {**small_grid.personas, "poet": "a poet"}, small_grid.tasks)

    def told(grid: pn.Grid, layers: str) -> pn.Explanation:
        ask = {**ASK, "layers": layers}
        return pn.explain("localized_positions", model, grid, **ask, store=store)

    grown, wider = told(grid, "1,3"), told(small_grid, "1,2,3")
    assert (grown.n_elsewhere, grown.n_left, grown.n_partly) == (len(cells), 2, 0)
    assert (wider.n_elsewhere, wider.n_left, wider.n_partly) == (0, len(cells), len(cells))
    assert "copied from other runs" in str(grown)
    assert "at some layers only" in str(wider)


def test_time_is_that_of_earlier_runs(
    model: TransformersModel, small_grid: pn.Grid, store: Path
) -> None:
    first, *rest = (cell.label for cell in small_grid.cells)
    results = pn.run(
        "localized_positions", model, small_grid, **ASK, cells=[first], store=store, progress=False
    )
    took = float(results["seconds"].max())
    left = pn.explain("localized_positions", model, small_grid, **ASK, store=store)
    assert left.n_left == len(rest)
    assert left.seconds == pytest.approx(took * len(rest), rel=1e-6)
    assert f"as 1 cell of the run {left.run} took" in str(left)
    other = pn.explain(
        "localized_positions", model, small_grid, layers="2", positions="g1", store=store
    )
    assert f"of the run {left.run} with other settings (layers=1,3, positions=" in str(other)


def test_token_layers_are_counted(
    model: TransformersModel, small_grid: pn.Grid, localized_positions: Any, store: Path
) -> None:
    work: list[int] = []
    hooks = [
        layer.mlp._module.register_forward_pre_hook(lambda _, given: work.append(given[0].numel()))
        for layer in model.layers
    ]
    cells = list(small_grid.cells)
    localized_positions.measure(model, cells, layers=[1, 3], positions=["p_last", "g1"])
    for hook in hooks:
        hook.remove()
    told = pn.explain("localized_positions", model, small_grid, **ASK, store=store, calibrate=True)
    assert told.calibration is not None
    assert told.calibration.n_units == len(cells)
    width = model.config.hidden_size
    assert told.calibration.token_layers == sum(work) / width
    assert told.seconds == pytest.approx(told.calibration.seconds, rel=1e-6)
    assert not store.exists()
    rows = {
        prompt.ids
        for cell in cells
        for prompt in pn.render_cell(model.tokenizer, cell, NAMES).values()
    }
    beginnings = {row[:stop] for row in rows for stop in range(1, len(row) + 1)}
    assert (told.read.n_prompts, told.read.n_tokens) == (len(rows), sum(map(len, rows)))
    assert told.read.n_shared == len(beginnings)
    assert f"{len(beginnings) * 5:,} token-layers, before anything" in str(told)
    assert f"about {told.calibration.token_layers:,}, from the" in str(told)


@pytest.mark.parametrize("name", ["organism-qwen2", "qwen2", "gemma2"])
def test_an_outline_is_known_as_the_model_is(
    random_folder: Callable[[str], Path], small_grid: pn.Grid, store: Path, name: str
) -> None:
    source = name if name.startswith("organism") else random_folder(name)
    several: list[dict[str, Any]] = [
        {},
        {"dtype": "bfloat16"},
        {"attention": "sdpa", "label": "another"},
    ]
    for asked in several:
        if name == "gemma2" and "attention" in asked:
            continue  # it has no sdpa
        loaded, outline = pn.load_model(source, **asked), outline_model(source, **asked)
        assert outline.device.type == "meta"
        blocks = [
            plan_run("localized_positions", each, small_grid, layers="1", store=store).request.block
            for each in (loaded, outline)
        ]
        ours, theirs = ({**block.attrs, "created": "", "session": ""} for block in blocks)
        assert ours == theirs
        assert find_run(store, blocks[0]) is None


def norm(model: TransformersModel, cells: list[pn.Cell]) -> dict[str, torch.Tensor]:
    batch = pn.left_pad([pn.render_cell(model.tokenizer, cell)["XY"].ids for cell in cells])
    with model.trace(batch.tokens, position_ids=batch.position_ids, use_cache=False):
        norms = save(model.layers[1].input[:, -1].norm(dim=-1))
    return {"norm": norms}


def test_a_function_is_explained_too(
    model: TransformersModel, small_grid: pn.Grid, store: Path
) -> None:
    variables = {"norm": pn.Variable("cell", "norm")}
    told = pn.explain(norm, model, small_grid, variables=variables, store=store, calibrate=True)
    rows = [pn.render_cell(model.tokenizer, cell)["XY"].ids for cell in small_grid.cells]
    assert told.calibration is not None
    assert told.calibration.token_layers == max(map(len, rows)) * len(rows) * 5
    results = pn.run(norm, model, small_grid, variables=variables, store=store, progress=False)
    assert results.attrs["run"] == told.run
    assert np.isfinite(results["norm"]).all()


def test_judges_are_asked_as_often_as_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    endpoint, asked = Endpoint(), list[int]()
    ask = EndpointJudge.ask

    def counted(judge: EndpointJudge, prompts: list[str]) -> Any:
        asked.append(len(prompts))
        return ask(judge, prompts)

    monkeypatch.setattr(EndpointJudge, "ask", counted)
    monkeypatch.setattr("persona_nns.traits.endpoint.DEFAULT_CACHE", tmp_path / "judge.sqlite")
    model = pn.load_model("organism-qwen2")
    how: dict[str, Any] = {
        "trait": "terse", "judge": endpoint.url, "judge_prices": "2.0,8.0", "max_new_tokens": 4,
        "store": tmp_path / "s.zarr",
    }  # fmt: skip
    told = pn.explain("trait_responses", model, **how)
    assert asked == endpoint.requests == []
    pn.run("trait_responses", model, **how, progress=False)
    rubric = load_traits("terse", "extraction")[0].eval_prompt
    assert told.judging is not None
    assert told.judging.n_calls == sum(asked) == 20 * 5 * 2 * 2
    assert len(endpoint.requests) <= told.judging.n_calls
    assert told.judging.dollars == pytest.approx(
        400 * ((len(model.tokenizer(rubric)["input_ids"]) + 4) * 2.0 + 8.0) / 1e6
    )
    assert told.written.n_texts == 200
    endpoint.server.shutdown()


@pytest.mark.slow  # a server starts
def test_jobs_are_those_of_the_run(random_folder: Callable[[str], Path], store: Path) -> None:
    client = pn.load_model(random_folder("gemma2"), backend="simulate")
    ask: dict[str, Any] = {**ASK, "store": store}
    told = pn.explain("localized_positions", client, "short", **ask)
    assert told.jobs is not None
    pn.run("localized_positions", client, "short", **ask, progress=False)
    jobs = sorted(read_jobs(store, told.experiment, told.run).values(), key=lambda j: j.submitted)
    assert [len(job.units) for job in jobs] == list(told.jobs.sizes) == [4, 8]
    assert jobs[0].request_bytes == pytest.approx(told.jobs.sent, rel=0.1)
    returned = sum(job.result_bytes for job in jobs)
    assert told.jobs.returned / 3 < returned < 3 * told.jobs.returned


def test_jobs_grow_as_the_server_allows() -> None:
    assert job_sizes(100, None, 1e3) == [4, 16, 32, 32, 16]
    assert job_sizes(20, 6, 1e3) == [6, 6, 6, 2]
    assert job_sizes(10, None, 1e3, unit_seconds=100.0) == [4, 3, 3]  # five minutes a job


def test_what_cannot_be_told_says_why(store: Path, small_grid: pn.Grid) -> None:
    with pytest.raises(pn.UsageError, match="'trait_vectors' first measures what it needs"):
        pn.explain("trait_vectors", "organism-qwen2", trait="terse", store=store)
    outline = outline_model("organism-qwen2")
    with pytest.raises(pn.UsageError, match="of a model that is loaded here"):
        pn.explain("localized_positions", outline, small_grid, store=store, calibrate=True)


def test_the_command_line_takes_what_run_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def said(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["persona-nns", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        return capsys.readouterr().out

    asked = ("localized_positions", "--model", "organism-qwen2", "--grid", "short")
    lines = said(
        "explain", *asked, "--cells", "marx/haiku,yoda/haiku", "--layers", "3"
    ).splitlines()
    assert lines[0] == "localized_positions on organism-qwen2, short"
    assert lines[1].strip() == "2 cells asked for, 0 complete: 2 to measure"
    assert lines[-1].startswith("  time: not known, there is no earlier run in the store")
    assert list(tmp_path.iterdir()) == []
    server = said("explain", *asked, "--backend", "simulate", "--batch-size", "5")
    assert "server: 3 jobs of 5, 5, 2 cells" in server
    options = {
        command: {word for word in said(command, asked[0], "--help").split() if word[:2] == "--"}
        for command in ("run", "explain")
    }
    assert options["explain"] - options["run"] == {"--calibrate"}
    assert options["run"] <= options["explain"]
