"""What figures say of what they show: how many cells, what is left out, what stands for what."""

from typing import Any

import numpy as np
import pytest
import xarray as xr
from IPython.core.formatters import DisplayFormatter
from matplotlib.figure import Figure

from persona_nns.declarations.bands import band_labels
from persona_nns.figures.by_layer import cells_heatmap, lines_by_layer
from persona_nns.figures.closure import closure_by_band, closure_by_graft, closure_heatmap
from persona_nns.figures.estimates import closure_figure, estimates, shares_heatmap
from persona_nns.figures.intervals import share_interval
from persona_nns.figures.knockout import kl_by_band
from persona_nns.figures.patching import accuracy_by_persona, recovery_by_head, recovery_by_pair
from persona_nns.figures.tables import result_table

CELLS = [f"{persona}/{task}" for persona in ("chef", "yoda", "marx") for task in ("haiku", "plan")]


def dataset(variables: dict[str, Any], n_done: int, **coords: Any) -> xr.Dataset:
    """Results of 6 cells of one model with 8 layers; those that are not complete are NaN."""
    done = np.arange(6) < n_done
    ds = xr.Dataset(
        {**variables, "completed": (("model", "cell"), done[None])},
        coords={
            "model": ["m"],
            "cell": CELLS,
            "persona": ("cell", [cell.partition("/")[0] for cell in CELLS]),
            "task": ("cell", [cell.partition("/")[2] for cell in CELLS]),
            "n_layers": ("model", [8]),
            **coords,
        },
        attrs={"experiment": "e", "grid": "g"},
    )
    return ds.assign({name: ds[name].where(ds.completed) for name in variables})


def by_layer(n_done: int) -> xr.Dataset:
    rng = np.random.default_rng(0)
    dims = ("model", "cell", "layer", "position")
    kl = rng.lognormal(-3, 1, size=(1, 6, 4, 3)) * np.array([1, 1e-4, 1])
    kl[:, :, 3] = np.nan  # not asked for
    attrs = {"long_name": "causal KL", "units": "nat"}
    found = (rng.random((1, 6, 4)) < 0.5).astype(float)
    found[:, :, 3] = np.nan
    return dataset(
        {
            "kl": (dims, kl, attrs),
            "hit": (dims[:3], found, {"kind": "bool", "long_name": "any marker"}),
        },
        n_done,
        layer=[1, 2, 3, 8],
        position=["p_last", "g1", "g2"],
    )


def words(figure: Figure) -> str:
    """Title and caption."""
    said = [figure.get_suptitle(), figure.get_supxlabel()]
    return " ".join(" ".join(said).split())


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


@pytest.mark.parametrize(("n_done", "counted"), [(2, "2 of its 6 cells"), (6, "g grid, 6 cells")])
def test_a_figure_counts_the_cells_that_were_measured(n_done: int, counted: str) -> None:
    results = by_layer(n_done)
    for figure in (
        lines_by_layer(results, ["kl"]),
        cells_heatmap(results, "kl", "persona"),
        estimates(results, {"kl": "median"}, x="layer", hue="position"),
        shares_heatmap(results.assign(hit=results.hit.expand_dims(c=["a"])), "hit", "persona", "c"),
    ):
        assert counted in words(figure)


def test_a_notebook_shows_a_figure_as_a_picture() -> None:
    data, _ = DisplayFormatter().format(lines_by_layer(by_layer(6), ["kl"]))
    assert data["image/png"].startswith(b"\x89PNG")


def test_models_with_different_numbers_of_cells_are_counted_apart() -> None:
    two = xr.concat([by_layer(2), by_layer(6).assign_coords(model=["n"])], "model")
    assert "2 (m), 6 (n) of its 6 cells" in words(lines_by_layer(two, ["kl"]))


def test_fewer_than_four_cells_have_no_quartiles() -> None:
    results = by_layer(3)
    figure = lines_by_layer(results, ["kl"])
    assert len(figure.axes[0].get_lines()) == 3  # the medians
    dots = figure.axes[0].collections[0]
    drawn = np.sort(np.asarray(dots.get_offsets())[:, 1])
    values = results.kl.sel(position="p_last").values
    np.testing.assert_allclose(drawn, np.sort(values[np.isfinite(values)]))
    assert "dots: the cells" in words(figure)
    assert "25 and 75 %" in words(lines_by_layer(by_layer(4), ["kl"]))


def test_bands_of_three_series_are_not_filled() -> None:
    axis = lines_by_layer(by_layer(6), ["kl"]).axes[0]
    assert not axis.collections
    assert len(axis.get_lines()) == 3 + 2 * 3


def test_layers_and_personas_without_numbers_are_named() -> None:
    results = by_layer(4)
    assert "Not at layer 8: causal KL." in words(lines_by_layer(results, ["kl"]))
    figure = cells_heatmap(results, "kl", "persona")
    assert "Not measured: persona marx." in words(figure)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["chef", "yoda"]


def test_each_position_of_a_heatmap_has_a_scale_of_its_own() -> None:
    figure = cells_heatmap(by_layer(6), "kl", "task")
    for axis in figure.axes[:3]:
        mesh: Any = axis.collections[0]
        shades = mesh.norm(mesh.get_array())
        assert float(np.ptp(shades)) > 0.4


def test_lines_that_are_compared_with_are_named() -> None:
    assert legend(lines_by_layer(by_layer(6), ["kl"], reference=0.1))[-1] == "0.1 nat"
    rng = np.random.default_rng(0)
    kl = rng.lognormal(size=(1, 6, 1, 2))
    dims = ("model", "cell", "layer_set", "source")
    host = dataset(
        {"kl": (dims, kl), "closure": (dims, 1 - kl / kl[..., :1])},
        6,
        layer_set=["3"],
        source=["none", "oracle"],
    )
    figure = closure_figure(host)
    assert {"0: as the host", "1: as the long persona"} <= set(legend(figure))
    assert "1 − median KL / median KL(none)" in words(figure)
    figure = estimates(host, {"kl": "median"}, x="layer_set", hue="source")
    assert figure.axes[0].get_ylim()[0] <= 0  # a cut axis makes small differences look large


def banded(n_layers: int) -> xr.Dataset:
    rng = np.random.default_rng(0)
    labels = band_labels(n_layers)
    dims = ("model", "cell", "graft", "layer_band")
    closure = rng.uniform(size=(1, 6, 2, len(labels)))
    kl = rng.uniform(size=(1, 6, 2, len(labels)))
    gap = rng.uniform(size=(1, 6))
    blocked = (*dims[:2], "blocked", "layer_band")
    return dataset(
        {
            "closure": (dims, closure),
            "kl": (blocked, kl),
            "kl_host": (blocked, kl),
            "kl_clean_host": (dims[:2], gap),
            "kl_host_clean": (dims[:2], gap),
        },
        6,
        graft=["none", "persona"],
        blocked=["last", "later"],
        layer_band=labels,
        n_layers=("model", [n_layers]),
    )


def test_a_heatmap_of_many_layers_stays_on_a_page() -> None:
    for n_layers in (8, 30, 80):
        figure = closure_heatmap(banded(n_layers))
        assert figure.get_figwidth() < 14.5
        numbers = figure.axes[1].texts
        assert bool(numbers) == (n_layers == 8)


def test_kinds_of_bands_and_blocked_queries_are_said() -> None:
    results = banded(8)
    figure = closure_by_band(results)
    kinds = ["layer k alone", "layers before k (0:k)", "layers from k on (k:n)"]
    assert legend(figure) == [*kinds, "0.9: nearly all of the gap"]
    assert all(axis.get_legend() is None for axis in figure.axes)
    assert "0.9: nearly all of the gap" in legend(closure_by_graft(results))
    figure = kl_by_band(results)
    assert "later = every position after the persona" in words(figure)
    titles = [axis.get_title() for axis in figure.axes[:3]]
    assert titles == [f"m\n{kind}" for kind in kinds]


@pytest.mark.parametrize("n_layers", [1, 2, 4, 6])
def test_shares_are_drawn_at_every_layer_that_was_asked_for(n_layers: int) -> None:
    rng = np.random.default_rng(0)
    found = (rng.random((1, 6, n_layers, 2)) < 0.5).astype(float)
    layers = list(range(10, 10 + n_layers))
    results = dataset(
        {"hit": (("model", "cell", "layer", "condition"), found, {"kind": "bool"})},
        6,
        layer=layers,
        condition=["clean", "bare"],
    )
    figure = shares_heatmap(results, "hit", "persona", "condition")
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    if n_layers <= 4:
        assert titles == [f"m · layer {layer}" for layer in layers]
    else:
        assert titles == ["m · clean", "m · bare"]
        drawn: Any = figure.axes[0].collections[0].get_array()
        expected = 100 * results.hit.sel(condition="clean").groupby("persona").mean("cell")
        expected = expected.sel(persona=["chef", "yoda", "marx"]).transpose(..., "persona", "layer")
        np.testing.assert_allclose(np.ravel(drawn), np.ravel(expected))


def test_intervals_of_shares_are_wilsons() -> None:
    assert share_interval(0, 6) == pytest.approx((0.0, 0.3903), abs=1e-4)
    assert share_interval(24, 24) == pytest.approx((0.8620, 1.0), abs=1e-4)
    assert share_interval(5, 24) == pytest.approx((0.0924, 0.4047), abs=1e-3)
    assert np.isnan(share_interval(0, 0)).all()
    results = by_layer(6).assign(hit=lambda ds: ds.hit * 0)
    table = result_table(results, "hit")
    assert "\\[0,39]" in str(table.columns[-1]._cells[0])
    assert "Wilson" in str(table.caption)


def patching(answers_right: bool) -> xr.Dataset:
    rng = np.random.default_rng(0)
    personas, pair = ["good", "bad"], ("model", "clean_persona", "corrupt_persona")
    ld = rng.uniform(0.1, 1, size=(1, 2, 4)) * (1 if answers_right else -1)
    recovery = rng.uniform(size=(1, 2, 2, 4, 2, 3, 1))
    return xr.Dataset(
        {
            "recovery": ((*pair, "question", "component", "layer", "position_set"), recovery),
            "head_recovery": ((*pair, "question", "head", "layer", "position_set"), recovery),
            "ld": (("model", "persona", "question"), ld),
            "accuracy": (("model", "persona"), np.full((1, 2), float(answers_right))),
            "completed": (pair, np.ones((1, 2, 2), dtype=bool)),
        },
        coords={
            "model": ["m"],
            "persona": personas,
            "clean_persona": personas,
            "corrupt_persona": personas,
            "component": ["mlp", "attn"],
            "layer": [0, 1, 2],
            "position_set": ["all"],
            "n_layers": ("model", [3]),
        },
        attrs={"experiment": "persona_patching", "grid": "bundled"},
    )


@pytest.mark.parametrize("known", [True, False])
def test_no_recovery_is_drawn_where_no_answer_is_right(known: bool) -> None:
    results = patching(answers_right=False)
    if not known:
        results["accuracy"] = results.accuracy * np.nan
    for draw in (recovery_by_pair, recovery_by_head):
        figure = draw(results, "all")
        assert not any(axis.collections for axis in figure.axes)
        assert "No persona answers any question right" in figure.axes[0].texts[0].get_text()
        assert draw(patching(answers_right=True), "all").axes[0].collections
    figure = accuracy_by_persona(patching(answers_right=False))
    assert len(figure.axes[0].containers) == 2


def test_a_panel_without_numbers_says_so() -> None:
    results = patching(answers_right=True)
    results["accuracy"] = results.accuracy * np.nan
    figure = accuracy_by_persona(results)
    assert figure.axes[0].texts[0].get_text() == "nothing measured"
    assert "Not measured yet: 2 personas." in words(figure)
