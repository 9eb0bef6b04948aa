"""The prompts that a run keeps to be looked at: the tokens and spans of each cell, as text."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from nnsight import TransformersModel
from store_writer import block_of

import persona_nns as pn
from persona_nns.declarations.plans import ShownPrompt
from persona_nns.prompts.grids import Grid, load_grid
from persona_nns.prompts.render import ROLE_PROMPTS, render_cell, with_prompts
from persona_nns.results.allocation import attach
from persona_nns.results.merging import merge_stores
from persona_nns.results.reading import list_runs, open_results
from persona_nns.results.shown_prompts import read_shown
from persona_nns.runs.grid_plan import plan_grid


def pieces(prompt: ShownPrompt) -> list[str]:
    starts = (0, *prompt.ends[:-1])
    return [prompt.text[a:b] for a, b in zip(starts, prompt.ends, strict=True)]


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_pieces_are_the_tokens(
    random_model: Callable[[str], TransformersModel], small_grid: Grid, architecture: str
) -> None:
    tokenizer = random_model(architecture).tokenizer
    grid = replace(small_grid, tasks={**small_grid.tasks, "odd": "sing «naïve 🦊 詩» twice"})
    plan = plan_grid(tokenizer, grid, [])
    assert [*plan.shown] == [cell.label for cell in grid.cells]
    for cell in grid.cells:
        prompt, shown = render_cell(tokenizer, cell)["XY"], plan.shown[cell.label]
        assert "".join(pieces(shown)) == shown.text == prompt.text
        assert len(shown.ends) == len(prompt.ids) == shown.stops[-1]
        assert shown.user_last == prompt.user_last
        persona = "".join(pieces(shown)[shown.stops[0] : shown.stops[1]])
        task = "".join(pieces(shown)[shown.stops[1] : shown.stops[2]])
        assert cell.persona_text in persona
        assert cell.task_text in task
        said = [tokenizer.decode([each]) for each in prompt.ids]
        whole = [k for k, one in enumerate(said) if "\ufffd" not in one and pieces(shown)[k]]
        assert len(whole) > len(prompt.ids) / 2
        assert [pieces(shown)[k].strip() for k in whole] == [said[k].strip() for k in whole]


def test_a_run_keeps_its_prompts_and_results_do_not_see_them(
    random_model: Callable[[str], TransformersModel], small_grid: Grid, tmp_path: Path
) -> None:
    model, store = random_model("qwen2"), tmp_path / "s.zarr"
    asked: dict[str, Any] = {"positions": "p_last", "layers": "1", "cells": "chef/haiku"}
    results = pn.run(
        "localized_positions", model, small_grid, store=store, keep_residuals=True, **asked
    )
    (info,) = list_runs(store)
    plan = plan_grid(model.tokenizer, small_grid, [])
    assert read_shown(store, "localized_positions", info.run) == plan.shown
    assert not any("ends" in each or "stops" in each for each in (results.variables, results.dims))
    there = xr.open_zarr(store, group=f"localized_positions/{info.run}/prompts", consolidated=False)
    assert there.stops.sel(cell="chef/haiku", span="tail") == len(plan.shown["chef/haiku"].ends)
    below = sorted(
        path.name for path in (store / "localized_positions" / info.run).glob("*/*.json")
    )
    assert below.count("zarr.json") > 5
    assert not (store / "localized_positions" / info.run / "residuals" / "prompts").exists()


def block_with(shown: dict[str, ShownPrompt]) -> Any:
    block = block_of(2)
    return replace(block, plan=replace(block.plan, shown=shown))


def test_an_older_run_gets_its_prompts_and_what_was_cut_off_is_none(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    first = attach(store, block_with({}))
    assert read_shown(store, "e", "m.g.i") == {}
    shown = {
        "p000/t": ShownPrompt("As a, b", (2, 4, 5, 7), (1, 2, 4, 4), None),
        "p001/t": ShownPrompt("As ŭ", (2, 4, 4), (1, 2, 3, 3), 2),
    }
    attach(store, block_with(shown))
    before = {file: file.read_bytes() for file in (store / "e/m.g.i/prompts").rglob("*/c*")}
    attach(store, block_with(shown))
    assert read_shown(store, "e", "m.g.i") == shown
    assert before == {file: file.read_bytes() for file in before}
    assert len(before) == 6  # one chunk an array, and one that is all fill none
    for _ in range(2):
        merge_stores(tmp_path / "merged.zarr", store)
        assert read_shown(tmp_path / "merged.zarr", "e", "m.g.i") == shown
    assert first.attrs["identity"] == "i"
    assert np.asarray(open_results(store, "e").completed).tolist() == [[False, False]]
    shutil.rmtree(store / "e/m.g.i/prompts/ends")
    assert read_shown(store, "e", "m.g.i") == {}


def test_what_travels_does_without(random_model: Callable[[str], TransformersModel]) -> None:
    tokenizer, cell = random_model("qwen2").tokenizer, load_grid("short").cells[0]
    travelling = with_prompts(tokenizer, cell).prompts
    assert not any(travelling[name].ends for name in ROLE_PROMPTS)
    assert travelling["XY"] == render_cell(tokenizer, cell)["XY"]
