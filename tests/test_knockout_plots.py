"""Figures of knockout and controls: what stands on them is what was measured."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from nnsight import TransformersModel

import persona_nns as pn
from persona_nns.figures.drawing import draw
from persona_nns.prompts.grids import Grid

pytestmark = pytest.mark.filterwarnings("ignore:The grid has no markers")


def test_knockout_curves_show_the_medians_over_cells(
    tmp_path: Path, random_model: Callable[[str], TransformersModel], small_grid: Grid
) -> None:
    model = random_model("llama")
    ds = pn.run("attention_knockout", model, small_grid, store=tmp_path / "s.zarr", n_tokens=2)
    assert ds.kl.dims == ("model", "cell", "blocked", "layer_band")
    assert ds.any_marker.dims == ("model", "cell", "blocked")
    figures = draw(ds, "attention_knockout")
    assert list(figures) == ["kl_by_band", "markers"]
    axes = figures["kl_by_band"].axes
    assert len(axes) == 2 * 3
    median = ds.kl.isel(model=0).median("cell")
    expected = {
        0: [str(layer) for layer in range(5)],
        1: ["0", "0:2", "0:3", "0:4", "all"],
        2: ["all", "1:5", "2:5", "3:5", "4"],
    }
    for column, labels in expected.items():
        for line, blocked in zip(axes[column].lines, ds.blocked.values, strict=False):
            drawn = np.asarray(line.get_ydata(), dtype=float)
            known = median.sel(blocked=blocked, layer_band=labels).values
            assert drawn == pytest.approx(known, rel=1e-5)


def test_the_figure_of_controls_shows_the_medians_over_cells(
    tmp_path: Path, random_model: Callable[[str], TransformersModel], small_grid: Grid
) -> None:
    model = random_model("olmo2")  # without input norms, so without the control rms
    ds = pn.run(
        "injection_controls", model, small_grid, store=tmp_path / "s.zarr", layer_sets="1;3"
    )
    assert ds.closure.dims == ("model", "cell", "layer_set", "control", "source")
    figure = draw(ds, "injection_controls")["closure"]
    assert len(figure.axes) == 2
    drawn = {
        float(line.get_xdata()[0])  # type: ignore[index]
        for line in figure.axes[0].lines
        if len(np.asarray(line.get_xdata())) == 1
    }
    closure = ds.closure.isel(model=0, layer_set=0).median("cell", skipna=True)
    known = closure.values[np.isfinite(closure.values)]
    assert sorted(drawn) == pytest.approx(sorted(set(known.tolist())))
