"""The map over positions: ranges of them are measured as their names are, and drawn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from nnsight import TransformersModel

import persona_nns as pn
from persona_nns.figures import draw, few_positions, position_map, save_figure
from persona_nns.prompts import Grid
from persona_nns.runs import plan_run

RANGE = "p_last-5:p_last,g1:g3"
NAMES = ["p_last-5", "p_last-4", "p_last-3", "p_last-2", "p_last-1", "p_last", "g1", "g2", "g3"]


def test_a_range_has_the_identity_of_its_names(
    golden_model: Callable[[str], TransformersModel], small_grid: Grid, tmp_path: Path
) -> None:
    model, store = golden_model("qwen2"), tmp_path / "s.zarr"
    ranged, named = (
        plan_run("localized_positions", model, small_grid, positions=each, store=store).request
        for each in (RANGE, ",".join(NAMES))
    )
    assert ranged.arguments["positions"] == NAMES
    assert ranged.block.attrs["identity"] == named.block.attrs["identity"]


def test_a_map_has_the_median_of_every_layer_and_position(
    golden_model: Callable[[str], TransformersModel], small_grid: Grid, tmp_path: Path
) -> None:
    model, store = golden_model("qwen2"), tmp_path / "s.zarr"
    chosen: dict[str, Any] = {"layers": "0,2,4", "n_eval": 2, "rms": False, "store": store}
    ds = pn.run("localized_positions", model, small_grid, positions=RANGE, **chosen)
    figure = position_map(ds, "kl")
    assert figure is not None
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == NAMES
    assert [label.get_text() for label in axis.get_yticklabels()] == ["4", "2", "0"]
    drawn: Any = axis.collections[0].get_array()
    expected = ds.kl.sel(layer=[4, 2, 0]).median("cell")[0].values
    low = float(drawn.min())
    np.testing.assert_allclose(np.ravel(drawn), np.ravel(expected.clip(min=low)), rtol=1e-6)
    assert (expected > low).mean() > 0.5
    figures = draw(ds, "localized_positions")
    assert set(figures) == {
        *("kl_by_layer", "cosines_by_layer", "norm", "kl_by_persona", "kl_by_task", "kl_map")
    }
    lines = {line.get_label() for line in figures["kl_by_layer"].axes[0].get_lines()}
    assert {"p_last-5", "p_last-2", "p_last", "g3"} <= lines
    assert not {"p_last-4", "g1"} & lines
    assert few_positions(ds).position.values.tolist() == ["p_last-5", "p_last-2", "p_last", "g3"]


def test_few_positions_need_no_map_and_forty_have_one(
    golden_model: Callable[[str], TransformersModel], small_grid: Grid, tmp_path: Path
) -> None:
    model, store = golden_model("qwen2"), tmp_path / "s.zarr"
    chosen: dict[str, Any] = {"cells": "yoda/haiku", "layers": "2,4", "n_eval": 2, "rms": False}
    few = pn.run("localized_positions", model, small_grid, store=store, **chosen)
    assert few.sizes["position"] == 3
    assert "kl_map" not in draw(few, "localized_positions")
    many = pn.run(
        "localized_positions",
        model,
        small_grid,
        positions="p_last-19:g20",
        store=tmp_path / "many.zarr",
        **chosen,
    )
    assert many.sizes["position"] == 40
    assert few_positions(many).position.values.tolist() == ["p_last-19", "p_last", "g7", "g20"]
    for name, figure in draw(many, "localized_positions").items():
        save_figure(figure, tmp_path / f"{name}.png")
        assert max(figure.get_size_inches()) < 20
    assert (tmp_path / "kl_map.png").stat().st_size > 10_000
