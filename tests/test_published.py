"""The store of published numbers holds what the paper prints, and is what the files make."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

from persona_nns.prompts.grids import load_grid
from persona_nns.published.store import published_store
from persona_nns.published.write import write_published
from persona_nns.results.reading import list_runs, open_results

STORE = published_store()
GEMMA, QWEN, QWEN_3B = (
    "google/gemma-2-2b-it",
    "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen/Qwen2.5-3B-Instruct",
)

# Tables 1 and 2 as printed: (layer, "median [25 %, 75 %]") at p_last, g1, g2.
TABLES = {
    "short": {
        GEMMA: [
            (6, "0.0004 [.000,.001]", "0.002 [.001,.004]", "0.001 [.000,.003]"),
            (10, "0.033 [.022,.060]", "0.005 [.003,.033]", "0.013 [.004,.023]"),
            (14, "0.371 [.275,.443]", "0.049 [.021,.124]", "0.060 [.024,.139]"),
        ],
        QWEN: [
            (7, "0.022 [.016,.028]", "0.027 [.012,.069]", "0.016 [.008,.028]"),
            (11, "0.026 [.019,.033]", "0.050 [.032,.077]", "0.023 [.013,.037]"),
            (15, "0.065 [.030,.136]", "0.118 [.070,.206]", "0.034 [.016,.125]"),
        ],
        QWEN_3B: [
            (9, "0.031 [.013,.060]", "0.021 [.017,.035]", "0.021 [.011,.029]"),
            (14, "0.030 [.013,.076]", "0.045 [.020,.147]", "0.026 [.023,.055]"),
            (20, "0.074 [.021,.196]", "0.104 [.025,.225]", "0.040 [.029,.065]"),
        ],
    },
    "long": {
        GEMMA: [
            (10, "0.072 [.038,.114]", "0.017 [.007,.059]", "0.012 [.008,.028]"),
            (14, "0.229 [.157,.386]", "0.056 [.031,.182]", "0.056 [.015,.087]"),
            (18, "0.518 [.266,1.17]", "0.157 [.069,.374]", "0.138 [.035,.320]"),
        ],
        QWEN: [
            (7, "0.030 [.014,.045]", "0.018 [.010,.034]", "0.014 [.008,.023]"),
            (15, "0.112 [.060,.183]", "0.095 [.049,.193]", "0.097 [.044,.137]"),
            (20, "0.198 [.153,.284]", "0.231 [.094,.385]", "0.279 [.143,.481]"),
        ],
    },
}
PRINTED = [
    (grid, model, layer, position, text)
    for grid, models in TABLES.items()
    for model, rows in models.items()
    for layer, *texts in rows
    for position, text in zip(("p_last", "g1", "g2"), texts, strict=True)
]


@cache
def results(experiment: str, grid: str | None = None) -> xr.Dataset:
    return open_results(STORE, experiment, grid=grid)


def is_printed(value: float, text: str) -> bool:
    """Whether a number rounds to what is printed."""
    digits = len(text.partition(".")[2])
    return abs(value - float(text)) <= 0.5 * 10.0**-digits + 1e-9


@pytest.mark.parametrize(("grid", "model", "layer", "position", "text"), PRINTED)
def test_tables_1_and_2(grid: str, model: str, layer: int, position: str, text: str) -> None:
    median, low, high = text.replace("[", "").replace("]", "").replace(",", " ").split()
    kl = results("localized_positions", grid).kl.sel(model=model, layer=layer, position=position)
    assert kl.notnull().sum() == {"short": 12, "long": 48}[grid]
    measured = kl.quantile([0.5, 0.25, 0.75]).values.tolist()
    assert all(map(is_printed, measured, (median, low, high))), measured


def test_the_text_of_section_4_beyond_table_1() -> None:
    ds = results("localized_positions", "short").sel(model=GEMMA)
    medians = ds.kl.sel(position="p_last", layer=[6, 10, 14, 18]).median("cell").values.tolist()
    assert all(map(is_printed, medians, ("0.0004", "0.033", "0.371", "1.371")))
    cosines = ds.cos_additive.sel(layer=14, statistic="median", position=["p_last", "g1", "g2"])
    assert all(map(is_printed, cosines.values.tolist(), ("0.874", "0.935", "0.898")))


def test_the_text_of_section_5_beyond_table_2() -> None:
    ds = results("localized_positions", "long").sel(statistic="median", position=["p_last", "g1"])
    gemma, qwen = ds.sel(model=GEMMA, layer=14), ds.sel(model=QWEN, layer=7)
    assert all(map(is_printed, gemma.cos_additive.values.tolist(), ("0.818", "0.875")))
    assert all(map(is_printed, gemma.cos_persona_task.values.tolist(), ("0.171", "0.234")))
    assert all(map(is_printed, qwen.cos_additive.values.tolist(), ("0.862", "0.936")))

    kl = results("localized_positions", "long").kl.sel(position="p_last")
    by_persona = kl.sel(model=GEMMA, layer=14).groupby("persona").median()
    assert is_printed(float(by_persona.min()), "0.14")
    assert is_printed(float(by_persona.max()), "0.39")
    by_persona = kl.sel(model=QWEN, layer=7).groupby("persona").median()
    assert is_printed(float(by_persona.min()), "0.02")
    assert is_printed(float(by_persona.max()), "0.035")


def test_table_3() -> None:
    ds = results("behavioral_markers").sel(model=GEMMA, layer=14)
    printed = {
        "clean": (16, "66.7", "1.21"),
        "additive": (14, "58.3", "0.92"),
        "remove_persona": (15, "62.5", "0.96"),
        "bare": (1, "4.2", "0.08"),
    }
    assert ds.condition.values.tolist() == list(printed)
    assert ds.any_marker.dtype == bool
    assert ds.distinct_markers.dtype == int
    for condition, (count, percent, distinct) in printed.items():
        here = ds.sel(condition=condition)
        assert int(here.any_marker.sum()) == count
        assert is_printed(100 * float(here.any_marker.mean()), percent)
        assert is_printed(float(here.distinct_markers.mean()), distinct)


def test_table_4() -> None:
    ds = results("host_injection").sel(model=GEMMA)
    printed = {
        ("14", "none"): "3.05",
        ("14", "oracle"): "2.64",
        ("14", "cached"): "2.84",
        ("10,12,14", "cached"): "2.81",
        ("10,12,14,16,18", "cached"): "2.82",
        ("10,12,14,16,18,20,22", "cached"): "3.04",
        ("6,8,10,12,14,16,18,20,22", "cached"): "3.01",
    }
    for (layers, source), text in printed.items():
        kl = ds.kl.sel(layer_set=layers, source=source)
        assert kl.notnull().all()
        assert is_printed(float(kl.median()), text)
    assert (ds.kl.sel(source="none") == ds.kl.sel(source="none", layer_set="14")).all()
    assert ds.kl.sel(source="oracle").drop_sel(layer_set="14").isnull().all()
    assert is_printed(float(ds.closure.sel(source="oracle", layer_set="14").median()), "0.22")


def test_cells_and_texts_are_those_of_the_bundled_grids() -> None:
    runs = list_runs(STORE)
    assert len(runs) == 7
    for info in runs:
        grid = load_grid(info.attrs["grid"])
        assert info.attrs["grid_digest"] == grid.digest
        ds = open_results(STORE, info.experiment, run=info.run)
        assert ds.cell.values.tolist() == [cell.label for cell in grid.cells]
        assert info.n_completed == info.n_units == len(grid.cells)
        assert "2605.23147" in info.attrs["source"]


def test_what_the_files_do_not_hold_is_nan() -> None:
    ds = results("localized_positions", "long").sel(model=GEMMA)
    assert ds.layer.values.tolist()[:27] == list(range(27))
    tested = [10, 14, 18]
    assert ds.kl.sel(layer=tested).notnull().all()
    assert ds.kl.drop_sel(layer=tested).isnull().all()
    assert ds.cos_additive.drop_sel(layer=tested).isnull().all()


def test_plain_xarray_reads_one_chunk_an_array() -> None:
    root = zarr.open_group(str(STORE), mode="r")
    for info in list_runs(STORE):
        group = f"{info.experiment}/{info.run}"
        ds = xr.open_zarr(STORE, group=group, consolidated=False).load()
        assert {"persona", "task", "n_layers", "precision"} <= set(ds.coords)
        for name in ds.variables:
            array = root[f"{group}/{name}"]
            assert isinstance(array, zarr.Array)
            assert array.chunks == array.shape
        for name in info.attrs["variables"]:
            assert {"long_name", "units", "description"} <= set(ds[name].attrs)


def test_the_store_is_what_the_files_make(tmp_path: Path) -> None:
    write_published(tmp_path / "published")
    runs = list_runs(tmp_path / "published")
    assert [info.run for info in runs] == [info.run for info in list_runs(STORE)]
    for info in runs:
        group = f"{info.experiment}/{info.run}"
        made, kept = (
            xr.open_zarr(store, group=group, consolidated=False).load()
            for store in (tmp_path / "published", STORE)
        )
        xr.testing.assert_identical(made, kept)
        assert not any(np.isinf(array).any() for array in made.values() if array.dtype.kind == "f")
