"""Comparison of results with published ones: the numbers of the paper, and how far others agree."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from rich.console import Console
from typer.testing import CliRunner

import persona_nns as pn
from persona_nns.cli import terminal
from persona_nns.cli.commands import app
from persona_nns.declarations.variables import Variable
from persona_nns.errors import UsageError
from persona_nns.prompts.grids import Grid, load_grid
from persona_nns.published.compare import (
    Matched,
    Tolerance,
    agreement,
    compare_results,
    depth_distance,
    match_results,
    side_by_side,
    summarise,
)
from persona_nns.published.figures import compare_figures
from persona_nns.published.store import published_store
from persona_nns.published.tables import median_number
from persona_nns.results.allocation import attach
from persona_nns.results.block import Block
from persona_nns.results.reading import open_results
from persona_nns.runs.grid_plan import plan_of_grid

PUBLISHED = published_store()
GEMMA = "google/gemma-2-2b-it"
POSITIONS = ["p_last", "g1"]
Values = Callable[[str], np.ndarray[Any, Any]]


def write_run(
    store: Path,
    values: Values,
    *,
    model: str = GEMMA,
    grid: Grid | None = None,
    n_layers: int = 26,
    layers: Sequence[int] = (10, 14),
    precision: str = "float32",
    cells: int | None = None,
    **parameters: Any,
) -> None:
    """A run of ``localized_positions`` with given KL, [layer, position] for each cell label."""
    grid = grid or load_grid("short")
    variables = {"kl": Variable("cell layer position", "causal KL", units="nat")}
    identity = f"{model}{parameters}"
    block = Block(
        experiment="localized_positions",
        run=f"{model.replace('/', '--')}.{len(parameters)}",
        model=model,
        n_layers=n_layers,
        d_model=3,
        precision=precision,
        plan=plan_of_grid(grid, {}),
        layers=layers,
        positions=POSITIONS,
        variables=variables,
        attrs={
            "model": model,
            "grid": grid.name,
            "grid_digest": grid.digest,
            "precision": precision,
            "protocol_version": "1",
            "parameters": {"layers": list(layers), "n_eval": 10, **parameters},
            "created": "2026-01-01T00:00:00+00:00",
            "identity": identity,
        },
    )
    group = attach(store, block)
    for cell in grid.cells[:cells]:
        group.write_units([(cell, {"kl": values(cell.label)})], seconds=1)


@pytest.fixture
def published() -> xr.DataArray:
    """The published KL of Gemma on the short grid, at the layers and positions of `write_run`."""
    kl = open_results(PUBLISHED, "localized_positions", grid="short").kl
    return kl.sel(model=GEMMA, layer=[10, 14], position=POSITIONS)


def row_of(frame: pd.DataFrame, **labels: Any) -> dict[str, Any]:
    for name, label in labels.items():
        frame = frame.loc[frame[name] == label]
    (row,) = frame.to_dict("records")
    return {str(name): value for name, value in row.items()}


def compared(store: Path) -> Matched:
    (matched,) = match_results(store, "localized_positions", PUBLISHED)
    return matched


@pytest.mark.parametrize(
    ("experiment", "printed"),
    [
        (
            "localized_positions",
            [
                "0.0004 [.000,.001]",
                "0.033 [.022,.060]",
                "0.371 [.275,.443]",
                "1.371 [.974,1.935]",
                "0.229 [.157,.386]",
                "0.056 [.031,.182]",
                "0.056 [.015,.087]",
                "0.874   0.874   0.935   0.935   0.898   0.898",
                "0.818   0.818   0.875   0.875",
            ],
        ),
        (
            "behavioral_markers",
            [
                "16 (66.7%)",
                "14 (58.3%)",
                "15 (62.5%)",
                "1 (4.2%)",
                "1.21",
                "0.92",
                "0.96",
                "0.08",
            ],
        ),
        (
            "host_injection",
            [
                "3.045 [",
                "2.845 [",
                "2.639 [",
                "2.811 [",
                "2.821 [",
                "3.042 [",
                "3.006 [",
                "0.217 [",
                "0.134",
            ],
        ),
    ],
)
def test_published_with_itself_shows_what_the_paper_prints(
    experiment: str, printed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(width=110, record=True)
    monkeypatch.setattr(terminal, "out", console)
    request = ["compare", str(PUBLISHED), experiment, "-o", str(tmp_path)]
    answer = CliRunner().invoke(app, request, catch_exceptions=False)
    assert answer.exit_code == 0
    shown = console.export_text()
    for text in printed:
        assert text in shown
    beside = pd.read_csv(tmp_path / f"{experiment}-side_by_side.csv")
    for row in beside.to_dict("records"):
        assert row["published"] == row["measured"]
        assert row["model"] == row["measured_model"]
    agreed = pd.read_csv(tmp_path / f"{experiment}-agreement.csv")
    assert all(row["within"] == row["n"] for row in agreed.to_dict("records"))
    figures = {file.suffix for file in tmp_path.iterdir()}
    assert figures == {".csv", ".png", ".pdf"}


def test_side_by_side_holds_the_closures_of_the_paper() -> None:
    matched = match_results(PUBLISHED, "host_injection", PUBLISHED)
    frame = compare_results(matched).side_by_side
    oracle = {"source": "oracle", "layer_set": "14"}
    assert row_of(frame, variable="closure", **oracle)["measured"] == pytest.approx(
        0.2175, abs=1e-4
    )
    of_medians = row_of(frame, variable="closure_of_medians", **oracle)["published"]
    assert of_medians == pytest.approx(1 - 2.638812 / 3.045452, abs=1e-6)


def test_agreement_counts_cells_within_and_names_the_worst(
    tmp_path: Path, published: xr.DataArray
) -> None:
    def replicated(cell: str) -> np.ndarray[Any, Any]:
        kl = published.sel(cell=cell).values * 1.01  # 1 % off everywhere …
        return kl * np.where(cell == "yoda/haiku", 1.5, 1)  # … and one cell by half

    write_run(tmp_path / "s.zarr", replicated)
    frame = agreement(compared(tmp_path / "s.zarr"))
    row = row_of(frame, variable="kl", layer=14, position="p_last")
    assert (row["n"], row["within"], row["worst"]) == (12, 11, "yoda/haiku")
    theirs = published.sel(layer=14, position="p_last")
    assert row["published"] == pytest.approx(float(theirs.sel(cell="yoda/haiku")))
    assert row["measured"] == pytest.approx(1.515 * row["published"], rel=1e-6)
    ours = theirs.values * np.where(theirs.cell == "yoda/haiku", 1.515, 1.01)
    places = [np.argsort(np.argsort(values)) for values in (theirs.values, ours)]
    expected = 1 - 6 * sum((places[0] - places[1]) ** 2) / (12 * (12**2 - 1))
    assert row["rank_correlation"] == pytest.approx(expected)
    strict = agreement(compared(tmp_path / "s.zarr"), Tolerance(0.001, 0))
    assert set(strict["within"]) == {0}


def test_tolerance_is_that_of_the_lower_precision(tmp_path: Path, published: xr.DataArray) -> None:
    write_run(
        tmp_path / "s.zarr",
        lambda cell: published.sel(cell=cell).values * 1.1,
        precision="bfloat16",
    )
    frame = agreement(compared(tmp_path / "s.zarr"))
    assert set(zip(frame["share"], frame["relative"], strict=True)) == {(1.0, 0.2)}


def test_published_summaries_are_compared_with_summaries_of_cells() -> None:
    by_cell = xr.DataArray(np.arange(12.0), dims="cell")
    values = xr.Dataset(
        {"cos_additive": by_cell.expand_dims(model=["m"], layer=[3])},
        coords={"cell": [cell.label for cell in load_grid("short").cells]},
    ).assign(completed=xr.DataArray(np.ones((1, 12), bool), dims=("model", "cell")))
    values = values.assign_coords(n_layers=("model", [4]), precision=("model", ["float32"]))
    statistics = {"median": 5.5, "q25": 2.75, "q75": 8.25, "min": 0.0, "max": 10.0}
    summary = values.drop_vars("cos_additive").assign(
        cos_additive=xr.DataArray(
            [[[value] for value in statistics.values()]],
            dims=("model", "statistic", "layer"),
            coords={"model": ["m"], "statistic": list(statistics), "layer": [3]},
        )
    )
    matched = Matched("e", "g", (summary,), (values,))
    (row,) = agreement(matched).to_dict("records")
    assert (row["over"], row["n"], row["within"], row["worst"]) == ("statistic", 5, 4, "max")
    (beside,) = side_by_side(matched).to_dict("records")
    assert beside["published"] == beside["measured"] == 5.5
    assert beside["published_q25"] == beside["measured_q25"] == 2.75


def test_what_has_one_value_a_cell_and_no_site_is_compared_too() -> None:
    values = xr.Dataset(
        {
            "clean_kl": (("model", "cell"), [[1.0, 2.0, 6.0]]),
            "completed": (("model", "cell"), np.ones((1, 3), bool)),
        },
        coords={
            "model": ["m"],
            "cell": list("abc"),
            "n_layers": ("model", [4]),
            "precision": ("model", ["float32"]),
        },
    )
    matched = Matched("e", "g", (values,), (values.assign(clean_kl=2 * values.clean_kl),))
    beside = row_of(side_by_side(matched), variable="clean_kl")
    assert (beside["published"], beside["measured"]) == (2.0, 4.0)
    assert row_of(agreement(matched), variable="clean_kl")["worst"] == "c"


def test_another_model_stands_at_the_nearest_depth(tmp_path: Path) -> None:
    write_run(
        tmp_path / "s.zarr",
        lambda _: np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]),
        model="small",
        n_layers=8,
        layers=[2, 4, 7],
    )
    matched = compared(tmp_path / "s.zarr")
    frame = side_by_side(matched)
    assert len(set(frame["model"])) == 3
    expected = {6: (2, 0.1), 10: (4, 0.3), 14: (4, 0.3), 18: (7, 0.5), 22: (7, 0.5)}
    for layer, (nearest, median) in expected.items():
        row = row_of(frame, variable="kl", model=GEMMA, layer=layer, position="p_last")
        assert (row["measured_layer"], row["measured_depth"]) == (nearest, nearest / 8)
        assert row["depth"] == pytest.approx(layer / 26)
        assert row["measured"] == pytest.approx(median)
    assert agreement(matched).empty


def test_layer_sets_are_as_far_apart_as_their_layers() -> None:
    assert depth_distance(13, 26, 4, 8) == 0
    assert depth_distance("13,26", 26, "4,8", 8) == 0
    assert depth_distance("13", 26, "4,8", 8) == pytest.approx((0 + 0.25) / 2)
    assert depth_distance("10,12,14", 26, "3,4", 8) < depth_distance("10,12,14", 26, "1,7", 8)


def test_medians_are_over_the_cells_that_are_there(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    write_run(store, lambda cell: np.full((2, 2), len(cell)), cells=5)
    (results,) = compared(store).measured
    labels = [cell.label for cell in load_grid("short").cells[:5]]
    for row in summarise(results, "kl").to_dict("records"):
        assert (row["n"], row["value"]) == (5, np.median([len(cell) for cell in labels]))


def test_other_parameters_are_said(tmp_path: Path, published: xr.DataArray) -> None:
    write_run(tmp_path / "s.zarr", lambda cell: published.sel(cell=cell).values, n_eval=5)
    with pytest.warns(UserWarning, match="n_eval is 5, but 10 in what it is compared with"):
        compared(tmp_path / "s.zarr")


def test_what_cannot_be_compared_is_refused(tmp_path: Path, published: xr.DataArray) -> None:
    def values(cell: str) -> np.ndarray[Any, Any]:
        return published.sel(cell=cell).values

    store = tmp_path / "s.zarr"
    other = Grid("own", {"baseline": "a", "x": "b"}, {"baseline": "c", "y": "d"})
    write_run(store, lambda _: np.ones((2, 2)), grid=other, model="m")
    with pytest.raises(UsageError, match=r"on a grid to compare with .*its runs: m\."):
        match_results(store, "localized_positions", PUBLISHED)
    with pytest.raises(UsageError, match="holds no results of 'kv_graft' to compare with"):
        match_results(store, "kv_graft", PUBLISHED)
    write_run(store, values)
    write_run(store, values, n_other=3)
    with pytest.raises(UsageError, match="choose one with --run"):
        match_results(store, "localized_positions", PUBLISHED)
    with pytest.raises(UsageError, match="There is no run nothing"):
        match_results(store, "localized_positions", PUBLISHED, run=["nothing"])


def test_a_failed_comparison_writes_nothing(tmp_path: Path) -> None:
    request = ["compare", str(PUBLISHED), "kv_graft", "-o", str(tmp_path / "out")]
    answer = CliRunner().invoke(app, request)
    assert isinstance(answer.exception, UsageError)
    assert not (tmp_path / "out").exists()


def test_lines_of_the_figure_are_the_medians(tmp_path: Path, published: xr.DataArray) -> None:
    write_run(tmp_path / "s.zarr", lambda cell: published.sel(cell=cell).values * 2)
    matched = compared(tmp_path / "s.zarr")
    (figure,) = compare_figures([matched], side_by_side(matched)).values()
    (axis,) = [axis for axis in figure.axes if axis.get_title() == "gemma-2-2b-it"]
    theirs, *_, ours, _, reference = [
        line for line in axis.get_lines() if np.size(line.get_xdata())
    ]
    medians = published.sel(position="p_last").median("cell")
    np.testing.assert_allclose(np.asarray(theirs.get_ydata())[1:3], medians)
    np.testing.assert_allclose(np.asarray(ours.get_ydata()), 2 * medians, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(ours.get_xdata()), [10 / 26, 14 / 26])
    assert set(np.asarray(reference.get_ydata()).tolist()) == {0.1}
    assert axis.get_xlabel() == "depth (layer / layers)"
    assert "causal KL (nat)" in figure.axes[0].get_ylabel()


def test_bars_and_points_are_the_numbers_of_tables_3_and_4() -> None:
    matched = match_results(PUBLISHED, "behavioral_markers", PUBLISHED)
    (figure,) = compare_figures(matched, compare_results(matched).side_by_side).values()
    heights = [bar.get_height() for bar in figure.axes[0].containers[0]]
    np.testing.assert_allclose(heights, [66.7, 58.3, 62.5, 4.2], atol=0.05)

    matched = match_results(PUBLISHED, "host_injection", PUBLISHED)
    (figure,) = compare_figures(matched, compare_results(matched).side_by_side).values()
    points: Any = figure.axes[0].containers[0]
    drawn = np.asarray(points.lines[0].get_xdata())
    np.testing.assert_allclose(drawn, [3.05, 2.84, 2.81, 2.82, 3.04, 3.01, 2.64], atol=0.006)


def test_medians_are_printed_as_in_the_paper() -> None:
    texts = [median_number(value) for value in (0.00043, 0.0328, 1.3712, 0.0, -0.2)]
    assert texts == ["0.0004", "0.033", "1.371", "0.000", "-0.200"]


@pytest.mark.parametrize("seed", range(3))
def test_rows_do_not_depend_on_the_order_in_which_arrays_are_found(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """zarr lists a group's arrays as it comes upon them."""
    plainly = xr.open_zarr

    def shuffled(*arguments: Any, **settings: Any) -> xr.Dataset:
        found = plainly(*arguments, **settings)
        names = list(map(str, found.coords))
        random.Random(seed).shuffle(names)
        coords = {name: found.variables[name] for name in names}
        return xr.Dataset(dict(found.data_vars.variables), coords, found.attrs)

    def rows() -> list[tuple[str, str, str]]:
        (matched,) = match_results(PUBLISHED, "host_injection", PUBLISHED)
        frame = compare_results([matched]).side_by_side
        return list(zip(frame.variable, frame.source, frame.layer_set, strict=True))

    monkeypatch.setattr(xr, "open_zarr", shuffled)
    found = rows()
    assert [source for name, source, _ in found if name == "kl"] == [
        *(["none"] * 5),
        *(["cached"] * 5),
        "oracle",
    ]
    assert list(pn.open_results(PUBLISHED, "host_injection").coords) == sorted(
        ["cell", "layer_set", "model", "n_layers", "persona", "precision", "source", "task"]
    )
