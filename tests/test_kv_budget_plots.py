"""What the figures of kv_budget show, and the one that has every method on an axis."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure
from nnsight import TransformersModel

import persona_nns as pn
from persona_nns.figures import methods_by_bytes
from persona_nns.figures.drawing import draw
from persona_nns.prompts.grids import Grid

pytestmark = pytest.mark.filterwarnings("ignore:The grid has no markers")


@pytest.fixture(scope="module")
def store(
    random_model: Callable[[str], TransformersModel],
    small_grid: Grid,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Two models, of three experiments each."""
    path = tmp_path_factory.mktemp("store") / "s.zarr"
    for name in ("qwen2", "llama"):
        model = random_model(name)
        pn.run("kv_budget", model, small_grid, store=path, cells="chef/haiku,yoda/haiku")
        pn.run("kv_graft", model, small_grid, store=path, bands="all", n_tokens=2)
        pn.run("host_injection", model, small_grid, store=path, layer_sets="2;1,3", n_tokens=2)
    return path


@pytest.fixture(scope="module")
def results(store: Path) -> xr.Dataset:
    return pn.open_results(store, "kv_budget")


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def test_a_persona_is_written_out_and_coloured(results: xr.Dataset) -> None:
    figure = draw(results, "kv_budget")["persona_tokens"]
    panel: Any = figure.axes[0]
    cell = results.sel(model="qwen2", cell="chef/haiku")
    tokens = [text.strip(" ") for text in cell.token_text.values if text]
    written = texts_of(figure)
    assert written[: len(tokens) + 1] == ["chef", *tokens]
    assert written.count("yoda") == 2  # of both models
    share = (cell.token_effect / cell.kl_none).values
    most = int(np.nanargmax(np.abs(share)))
    colours = np.array([box.get_facecolor()[:3] for box in panel.patches[: len(tokens)]])
    assert int(colours.min(axis=1).argmin()) == most  # the furthest from white
    right = [box.get_x() + box.get_width() for box in panel.patches]
    assert max(right) <= panel.get_xlim()[1]


def test_closure_stands_at_the_bytes_that_are_kept(results: xr.Dataset) -> None:
    figure = draw(results, "kv_budget")["closure_by_bytes"]
    axis: Any = figure.axes[0]
    assert axis.get_xscale() == "log"
    line = axis.get_lines()[0]
    of = results.sel(model="qwen2", unit="layer_head")
    kept = np.unique(of.cache_bytes.median("cell").values)
    np.testing.assert_allclose(line.get_xdata(), kept[kept > 0])
    closure = of.closure.sel(ranking="effect").median("cell")
    assert line.get_ydata()[-1] == pytest.approx(float(closure.sel(budget="all")))
    assert line.get_ydata()[0] == pytest.approx(float(closure.sel(budget="1")))


def test_what_was_not_asked_for_is_not_drawn(
    random_model: Callable[[str], TransformersModel], small_grid: Grid, tmp_path: Path
) -> None:
    model = random_model("qwen2")
    asked: dict[str, Any] = {"cells": "yoda/haiku", "store": tmp_path / "s.zarr"}
    tokens = pn.run("kv_budget", model, small_grid, units="token", rankings="random", **asked)
    curves = {"closure", "closure_by_bytes", "needed"}
    assert set(draw(tokens, "kv_budget")) == curves
    heads = pn.run("kv_budget", model, small_grid, units="layer_head", **asked)
    assert set(draw(heads, "kv_budget")) == {*curves, "heads"}


def test_every_method_is_on_one_axis(store: Path) -> None:
    names = ("kv_budget", "kv_graft", "host_injection")
    experiments = {name: pn.open_results(store, name) for name in names}
    shape = (2, 2, 1, 1, 2, 2)
    experiments["persona_cartridge"] = xr.Dataset(
        {
            "closure": (
                ("model", "persona", "task", "form", "slots", "split"),
                np.broadcast_to([0.25, 0.75], shape),
            ),
            "cache_bytes": (("model", "persona", "slots"), np.full((2, 2, 2), [640, 1280])),
        },
        {
            "model": ["qwen2", "llama"],
            "persona": ["chef", "other"],
            "form": ["graft"],
            "slots": [1, 2],
            "split": ["train", "held_out"],
        },
    )
    figure = methods_by_bytes(experiments)
    axis: Any = figure.axes[0]
    drawn = {
        container.get_label(): np.array(container[0].get_xydata()) for container in axis.containers
    }
    assert list(drawn) == [
        "key-value heads, best by effect",
        "tokens, best by effect",
        "whole persona grafted",
        "additive keys and values",
        "residual itself (oracle)",
        "cartridge (graft), tasks held out",
    ]
    cells = ["chef/haiku", "yoda/haiku"]
    graft = experiments["kv_graft"].sel(
        model="qwen2", graft="persona", layer_band="all", cell=cells
    )
    whole = drawn["whole persona grafted"][0]
    np.testing.assert_allclose(whole[0], graft.cache_bytes.median())
    np.testing.assert_allclose(whole[1], graft.closure.median(), rtol=1e-5)
    np.testing.assert_allclose(drawn["tokens, best by effect"][-1], whole, rtol=1e-4)
    oracle = experiments["host_injection"].sel(model="qwen2", source="oracle", cell=cells)
    np.testing.assert_allclose(drawn["residual itself (oracle)"][:, 0], [32 * 4, 2 * 32 * 4])
    middle = oracle.closure.median("cell").values
    np.testing.assert_allclose(drawn["residual itself (oracle)"][:, 1], middle, rtol=1e-5)
    cartridge = drawn["cartridge (graft), tasks held out"]
    np.testing.assert_array_equal(cartridge, [[640, 0.75], [1280, 0.75]])
