"""Figures show the numbers of the result: medians and quartiles of the values themselves."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from persona_nns.declarations.bands import band_labels, band_layers
from persona_nns.errors import UsageError
from persona_nns.figures.by_layer import cells_heatmap, lines_by_layer
from persona_nns.figures.closure import closure_heatmap
from persona_nns.figures.drawing import check_format, default_figures, save_figure
from persona_nns.figures.style import axis_label, panels

PERSONAS = ["chef", "yoda"]
TASKS = ["haiku", "policy"]


@pytest.fixture
def results() -> xr.Dataset:
    rng = np.random.default_rng(0)
    cells = [(persona, task) for persona in PERSONAS for task in TASKS]
    kl = rng.lognormal(-3, 2, size=(2, 4, 3, 2)).astype(np.float32)
    kl[:, :, 2] = np.nan  # a layer that was not asked for
    return xr.Dataset(
        {
            "kl": (
                ("model", "cell", "layer", "position"),
                kl,
                {"long_name": "causal KL", "units": "nat"},
            )
        },
        coords={
            "model": ["m", "n"],
            "cell": ["/".join(cell) for cell in cells],
            "persona": ("cell", [cell[0] for cell in cells]),
            "task": ("cell", [cell[1] for cell in cells]),
            "layer": [1, 2, 3],
            "position": ["p_last", "g1"],
            "n_layers": ("model", [3, 3]),
        },
        attrs={"experiment": "e", "grid": "g"},
    )


@pytest.mark.parametrize("log", [False, True])
def test_a_line_is_the_median_over_cells(results: xr.Dataset, log: bool) -> None:
    figure = lines_by_layer(results, ["kl"], log=log, reference=0.1)
    assert [axis.get_title() for axis in figure.axes] == ["m (3 layers)", "n (3 layers)"]
    assert figure.axes[0].get_ylabel() == "causal KL (nat)"
    for axis, model in zip(figure.axes, ["m", "n"], strict=True):
        for line, position in zip(axis.get_lines(), ["p_last", "g1"], strict=False):
            expected = results.kl.sel(model=model, position=position, layer=[1, 2]).median("cell")
            np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-6)  # type: ignore[arg-type]
            assert np.asarray(line.get_xdata()).tolist() == [1, 2]


def test_a_band_reaches_from_the_lower_to_the_upper_quartile(results: xr.Dataset) -> None:
    figure = lines_by_layer(results, ["kl"], log=True)
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    expected = results.kl.sel(model="m", position="p_last", layer=1).quantile([0.25, 0.75])
    at_layer_1 = np.asarray(band)[np.asarray(band)[:, 0] == 1, 1]
    np.testing.assert_allclose([at_layer_1.min(), at_layer_1.max()], expected, rtol=1e-6)


def test_a_heatmap_cell_is_the_median_over_the_cells_of_a_persona(results: xr.Dataset) -> None:
    figure = cells_heatmap(results, "kl", "persona")
    panel: Any = figure.axes[3].collections[0].get_array()  # second model, second position
    expected = (
        results.kl.sel(model="n", position="g1", layer=[1, 2])
        .groupby("persona")
        .median("cell")
        .sel(persona=PERSONAS)
        .transpose("persona", "layer")
    )
    np.testing.assert_allclose(np.ravel(panel), np.ravel(expected.clip(min=1e-3)), rtol=1e-6)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == PERSONAS


def test_bands_of_models_of_different_depth_stand_at_their_own_layers() -> None:
    bands = list(dict.fromkeys([*band_labels(5), *band_labels(3)]))
    closure = np.full((2, 1, 1, len(bands)), np.nan)
    for index, n_layers in enumerate((5, 3)):
        for label in band_labels(n_layers):
            carried = len(band_layers(label, n_layers)) / n_layers
            closure[index, 0, 0, bands.index(label)] = carried
    results = xr.Dataset(
        {"closure": (("model", "cell", "graft", "layer_band"), closure)},
        coords={
            "model": ["m", "n"],
            "cell": ["a/b"],
            "graft": ["persona"],
            "layer_band": bands,
            "n_layers": ("model", [5, 3]),
        },
        attrs={"experiment": "e", "grid": "g"},
    )
    figure = closure_heatmap(results)
    nan = np.nan
    expected = {
        1: [[0.2] * 5, [nan, 0.2, 0.4, 0.6, 0.8], [nan, 0.8, 0.6, 0.4, 0.2]],
        3: [
            [1 / 3, 1 / 3, 1 / 3, nan, nan],
            [nan, 1 / 3, 2 / 3, nan, nan],
            [nan, 2 / 3, 1 / 3, nan, nan],
        ],
    }
    for place, values in expected.items():
        drawn: Any = figure.axes[place].collections[0].get_array()
        np.testing.assert_allclose(np.ma.filled(drawn, nan), values)


def test_one_legend_holds_what_any_panel_shows_and_every_series_of_a_panel() -> None:
    with panels((4, 2), columns=["a", "b"]) as drawn:
        for _, column, axis in drawn:
            for label in ("twice", "twice") if column == "a" else ("twice", "once"):
                axis.plot([0, 1], label=label)
            axis.legend()
        drawn.legend("what")
    (legend,) = drawn.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["twice", "twice", "once"]
    assert [axis.get_legend() for axis in drawn.axes.flat] == [None, None]


def test_an_experiment_without_figures_gets_one_a_variable(results: xr.Dataset) -> None:
    results["label"] = ("cell", ["a", "b", "c", "d"])
    assert list(default_figures(results)) == ["kl_by_layer"]


def test_units_stand_on_the_axis(results: xr.Dataset) -> None:
    assert axis_label(results.kl) == "causal KL (nat)"
    assert axis_label(results.kl.assign_attrs(units="1")) == "causal KL"


def test_figures_are_written_as_asked(tmp_path: Path) -> None:
    written = save_figure(Figure(), tmp_path / "new" / "f.png", pdf=True)
    assert written == [str(tmp_path / "new" / "f.png"), str(tmp_path / "new" / "f.pdf")]
    assert (tmp_path / "new" / "f.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "new" / "f.pdf").read_bytes().startswith(b"%PDF")


def test_a_file_that_cannot_be_a_figure_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'f\.txt' does not end in a figure format"):
        check_format(Path("f.txt"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        save_figure(Figure(), tmp_path / "file" / "f.png")
