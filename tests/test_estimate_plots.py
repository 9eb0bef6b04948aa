"""Estimates over cells: what is drawn is the statistic of what was measured, and of no more."""

from typing import Any

import numpy as np
import pytest
import xarray as xr

from persona_nns.figures.estimates import (
    closure_figure,
    closures_of_medians,
    estimate_table,
    estimates,
    host_markers,
    shares_heatmap,
)
from persona_nns.figures.intervals import interval
from persona_nns.figures.tables import result_table
from persona_nns.results.measured import measured_values


@pytest.fixture
def host() -> xr.Dataset:
    rng = np.random.default_rng(0)
    kl = rng.lognormal(0, 1, size=(2, 6, 2, 3)).astype(np.float32)
    kl[0, :, 1] = kl[1, :, 0] = np.nan  # each model has a layer set of its own
    any_marker = (rng.random((2, 6, 2, 3)) < 0.5).astype(float)
    distinct = np.where(any_marker, 2.0, 0.0)
    any_marker[1, 0] = distinct[1, 0] = np.nan  # a cell without markers
    completed = np.array([[True] * 6, [True] * 5 + [False]])
    kl[1, 5] = distinct[1, 5] = any_marker[1, 5] = np.nan
    cell = ("model", "cell")
    by_set, by_site = (*cell, "layer_set", "source"), (*cell, "site", "source")
    truth = {"kind": "bool"}
    return xr.Dataset(
        {
            "kl": (by_set, kl, {"units": "nat", "long_name": "KL"}),
            "closure": (by_set, 1 - kl / kl[..., :1]),
            "any_marker": (by_site, any_marker, {"long_name": "any persona marker", **truth}),
            "distinct_markers": (by_site, distinct),
            "clean_any_marker": (cell, any_marker[:, :, 0, 0], truth),
            "clean_distinct_markers": (cell, distinct[:, :, 0, 0]),
            "completed": (cell, completed),
        },
        coords={
            "model": ["m", "n"],
            "cell": list("abcdef"),
            "persona": ("cell", list("xxxyyy")),
            "layer_set": ["3", "4"],
            "source": ["none", "cached", "oracle"],
            "site": ["p_last", "p_last+g1+g2"],
            "n_layers": ("model", [6, 8]),
        },
        attrs={"experiment": "host_injection", "grid": "g"},
    )


def test_an_estimate_is_of_the_measured_cells(host: xr.Dataset) -> None:
    table = estimate_table(host, "kl", "median").set_index(["model", "layer_set", "source"])
    assert len(table) == 6  # nothing for the sets that a model does not have
    cells = host.kl.sel(model="n", layer_set="4", source="oracle").values[:5]
    row = table.loc[("n", "4", "oracle")]
    assert row["value"] == pytest.approx(np.median(cells))
    assert (row["low"], row["high"]) == pytest.approx(interval(cells.astype(float)))


def test_a_cell_that_was_not_measured_counts_in_no_rate(host: xr.Dataset) -> None:
    table = estimate_table(host, "any_marker", "mean").set_index(["model", "site", "source"])
    site = {"site": "p_last", "source": "cached"}
    measured = host.any_marker.sel({"model": "n", **site}).values[1:5]
    assert table.loc[("n", "p_last", "cached"), "value"] == pytest.approx(100 * measured.mean())
    values = measured_values(host, "any_marker").sel({"model": "n", **site})
    assert np.isnan(values.values).tolist() == [True, *[False] * 4, True]


def test_a_layer_that_a_model_lacks_has_no_rate() -> None:
    dims = ("model", "cell", "layer", "condition")
    found = np.full((2, 3, 2, 2), np.nan)
    found[0, :, 0] = found[1, :, 1] = 1
    results = xr.Dataset(
        {
            "any_marker": (dims, found, {"kind": "bool"}),
            "completed": (("model", "cell"), np.ones((2, 3), dtype=bool)),
        },
        coords={
            "model": ["m", "n"],
            "cell": list("abc"),
            "persona": ("cell", list("xxy")),
            "layer": [14, 15],
            "condition": ["clean", "bare"],
            "n_layers": ("model", [26, 28]),
        },
        attrs={"experiment": "e", "grid": "g"},
    )
    table = estimate_table(results, "any_marker", "mean")
    assert set(zip(table["model"], table["layer"], table["value"], strict=True)) == {
        ("m", 14, 100.0),
        ("n", 15, 100.0),
    }
    assert result_table(results, "any_marker").row_count == 2
    figure = shares_heatmap(results, "any_marker", "persona", "condition")
    assert [axis.get_title() for axis in figure.axes[:2]] == ["m · layer 14", "n · layer 15"]
    panel: Any = figure.axes[1].collections[0].get_array()
    assert np.ravel(panel).tolist() == [100.0] * 4


def test_the_closure_of_the_medians(host: xr.Dataset) -> None:
    table = closures_of_medians(host).set_index(["model", "layer_set", "source"])
    kl = host.kl.sel(model="m", layer_set="3").median("cell")
    for source in ("none", "cached", "oracle"):
        expected = 1 - float(kl.sel(source=source)) / float(kl.sel(source="none"))
        assert table.loc[("m", "3", source), "value"] == pytest.approx(expected, abs=1e-6)
    assert table.loc[("m", "3", "none"), "low"] == 0.0


def test_points_stand_at_the_estimates_with_the_intervals(host: xr.Dataset) -> None:
    figure = estimates(host, {"kl": "median"}, x="layer_set", hue="source")
    assert [axis.get_title() for axis in figure.axes] == ["m (6 layers)", "n (8 layers)"]
    assert figure.axes[0].get_ylabel() == "median KL (nat)"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["none", "cached", "oracle"]
    table = estimate_table(host, "kl", "median").set_index(["model", "source"])
    drawn = figure.axes[1].get_lines()
    assert [float(np.ravel(line.get_ydata())[0]) for line in drawn[::3]] == pytest.approx(
        [table.loc[("n", label), "value"] for label in labels]
    )


def test_the_figures_of_host_injection_leave_nothing_out(host: xr.Dataset) -> None:
    figure = closure_figure(host)
    assert [axis.get_ylabel() for axis in figure.axes] == [
        *("closure, median over cells", ""),
        *("closure, of the medians", ""),
    ]
    figure = host_markers(host)
    ticks = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert ticks == ["none", "cached", "oracle", "long persona"]
