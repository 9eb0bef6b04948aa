"""Exported tables and files hold what `open_results` gives, and nothing that was not measured."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from store_writer import block_of
from test_merging import write

import persona_nns as pn
from persona_nns.declarations.variables import Variable
from persona_nns.results.allocation import attach
from persona_nns.results.choosing import open_chosen
from persona_nns.results.exporting import export_results, tables
from persona_nns.results.reading import open_results


def value_of(results: xr.Dataset, name: str, row: Any) -> Any:
    """What a row's labels select."""
    at = {str(dim): row[dim] for dim in results[name].dims}
    return results[name].sel(at).item()


def assert_tables_hold(results: xr.Dataset, made: dict[tuple[str, ...], Any]) -> None:
    """Every number of the results is in one row of one table, and every row says its labels."""
    for dims, frame in made.items():
        names = [str(n) for n in results.data_vars if set(results[n].dims) == set(dims)]
        names = [name for name in names if name in frame]
        assert list(frame.columns[: len(dims)]) == list(dims)
        assert not frame.duplicated(list(dims)).any()
        for _, row in frame.iterrows():
            for name in names:
                expected = value_of(results, name, row)
                if expected == expected:
                    assert row[name] == expected
                else:
                    assert pd.isna(row[name])
            for name, coordinate in results.coords.items():
                if set(coordinate.dims) <= set(dims):
                    at = {dim: row[dim] for dim in coordinate.dims}
                    assert row[name] == coordinate.sel(at).item()
        for name in names:
            held = results[name].notnull() if results[name].dtype.kind == "f" else None
            if held is not None:
                assert int(frame[name].notna().sum()) == int(held.sum())


@pytest.mark.parametrize("complete", [[0, 2], [0, 1, 2, 3], []])
def test_tables_hold_what_was_measured_and_no_more(tmp_path: Path, complete: list[int]) -> None:
    write(tmp_path, complete)
    results = open_results(tmp_path, "e")
    made = tables(results)
    assert list(made) == [
        ("model", "cell", "layer", "position"),
        ("model", "cell", "position"),
        ("model", "cell"),
        ("model", "cell", "condition"),
    ]
    n = len(complete)
    assert [len(frame) for frame in made.values()] == [4 * n, 2 * n, n, 2 * n]
    assert_tables_hold(results, made)
    kl, n_eval, text, hit = made.values()
    assert {"persona", "task", "depth", "n_layers", "precision"} <= set(kl.columns)
    assert "seconds" not in text
    assert str(n_eval.n_eval.dtype) == "Int64"
    assert str(hit.hit.dtype) == "boolean"


def test_models_of_other_layers_have_no_rows_for_what_they_lack(tmp_path: Path) -> None:
    write(tmp_path, [0, 1])
    block = block_of(4)
    other = {**block.attrs, "model": "n", "parameters": {"layers": [2], "positions": []}}
    parameters = {"layers": [2], "positions": ["p_last", "g1"]}
    group = attach(
        tmp_path,
        replace(
            block,
            run="n.g.i",
            model="n",
            layers=[2],
            attrs={**other, "identity": "n", "parameters": parameters},
        ),
    )
    values = {
        "kl": np.full((1, 2), 9.0, np.float32),
        "n_eval": np.array([1, 2]),
        "text": np.asarray("of n", dtype=object),
        "hit": np.array([True, False]),
    }
    group.write_units([(block.plan.units[3], values)], 1.0)
    results = open_chosen(tmp_path, "e")
    made = tables(results)
    assert_tables_hold(results, made)
    kl = made["model", "cell", "layer", "position"]
    assert len(kl) == 2 * 2 * 2 + 2
    assert kl[kl.model == "n"].layer.tolist() == [2, 2]
    assert len(made["model", "cell"]) == 3


def test_numbers_that_are_missing_in_a_row_are_empty_and_counts_stay_counts(tmp_path: Path) -> None:
    block = block_of(2)
    variables = {
        "ratio": Variable("cell", "ratio"),
        "many": Variable("cell", "count", kind="int"),
    }
    group = attach(tmp_path, replace(block, variables=variables))
    ratios = (np.nan, np.float32(0.1))
    rows = [
        (unit, {"ratio": np.asarray(ratio), "many": np.asarray(7)})
        for unit, ratio in zip(block.plan.units, ratios, strict=True)
    ]
    group.write_units(rows, 1.0)
    export_results(open_results(tmp_path, "e"), tmp_path / "t.csv")
    lines = (tmp_path / "t.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "model,cell,n_layers,persona,precision,task,ratio,many"
    assert lines[1:] == ["m,p000/t,4,p000,float32,t,,7", "m,p001/t,4,p001,float32,t,0.1,7"]


def test_an_array_that_is_called_as_a_dimension_is_a_column(tmp_path: Path) -> None:
    block, heads = block_of(1), {"head": ["a", "b"]}
    variables = {
        "head": Variable("cell head", "which", coords=heads),
        "size": Variable("cell head", "size", coords=heads),
    }
    group = attach(tmp_path, replace(block, variables=variables))
    values = {"head": np.array([1.0, 2.0]), "size": np.array([3.0, 4.0])}
    group.write_units([(block.plan.units[0], values)], 1.0)
    (frame,) = tables(open_results(tmp_path, "e")).values()
    assert frame[["head_index", "head", "size"]].values.tolist() == [[0, 1, 3], [1, 2, 4]]


def test_a_csv_is_read_back_and_says_what_its_columns_mean(tmp_path: Path) -> None:
    write(tmp_path / "s.zarr", [1, 3])
    results = open_results(tmp_path / "s.zarr", "e")
    written = export_results(results, tmp_path / "new" / "t.csv")
    names = ["t.csv", "t-cell_position.csv", "t-cell.csv", "t-cell_condition.csv", "t-columns.csv"]
    assert [Path(file).name for file in written] == names
    assert sorted(f.name for f in (tmp_path / "new").iterdir()) == sorted(names)
    back = {
        dims: pd.read_csv(file, dtype_backend="numpy_nullable")
        for dims, file in zip(tables(results), written, strict=False)
    }
    assert_tables_hold(results, back)
    assert "naïve “text” p001/t" in back["model", "cell"].text.tolist()
    assert "TRUE" in Path(written[3]).read_text(encoding="utf-8")
    columns = pd.read_csv(written[-1]).set_index(["file", "column"])
    assert columns.loc[("t.csv", "kl")].tolist() == ["causal KL", "nat", "of the test"]
    assert columns.loc[("t.csv", "depth"), "long_name"] == "depth (layer / n_layers)"


def test_chosen_variables_are_one_file_where_they_share_dimensions(tmp_path: Path) -> None:
    write(tmp_path / "s.zarr", [1, 3])
    results = open_results(tmp_path / "s.zarr", "e")
    assert len(export_results(results, tmp_path / "kl.parquet", ["kl"])) == 1
    (seconds,) = tables(results, ["seconds"]).values()
    assert seconds.seconds.tolist() == [1.5, 3.5]
    with pytest.raises(pn.UsageError, match="no variable 'kk'; there are: kl, n_eval"):
        export_results(results, tmp_path / "kl.csv", ["kk"])
    with pytest.raises(pn.UsageError, match=r"'kl\.xlsx' is no name .* \.csv, \.parquet or \.nc"):
        export_results(results, tmp_path / "kl.xlsx")


def test_parquet_keeps_types_units_and_attributes(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    write(tmp_path / "s.zarr", [0, 2], markers={"p000": ["é"]})
    results = open_results(tmp_path / "s.zarr", "e")
    written = export_results(results, tmp_path / "t.parquet")
    back = dict(zip(tables(results), map(pd.read_parquet, written), strict=True))
    assert_tables_hold(results, back)
    schema = pq.read_schema(written[0])
    assert schema.field("kl").metadata[b"units"] == b"nat"
    about = json.loads(schema.metadata[b"results"])
    assert json.loads(about["markers"]) == {"p000": ["é"]}
    assert [str(pq.read_schema(file).types[-1]) for file in written] == [
        *("float", "int64"),
        *("large_string", "bool"),
    ]


@pytest.mark.parametrize("complete", [[0, 2], [0, 1, 2, 3]])
def test_netcdf_is_read_back_equal_with_its_attributes(tmp_path: Path, complete: list[int]) -> None:
    write(tmp_path / "s.zarr", complete, markers={"p000": ["é"]})
    results = open_results(tmp_path / "s.zarr", "e")
    assert export_results(results, tmp_path / "t.nc") == [str(tmp_path / "t.nc")]
    with xr.open_dataset(tmp_path / "t.nc") as back:
        xr.testing.assert_equal(back.load(), results)
        assert back.attrs == results.attrs
        assert back.kl.attrs == results.kl.attrs
    export_results(results, tmp_path / "kl.nc", ["kl"])
    with xr.open_dataset(tmp_path / "kl.nc") as back:
        assert list(back.data_vars) == ["kl"]


def test_counts_beyond_netcdf_3_are_one_sentence_or_held(tmp_path: Path) -> None:
    write(tmp_path / "s.zarr", [0, 1, 2, 3])
    results = open_results(tmp_path / "s.zarr", "e")
    results["n_eval"] = results.n_eval + 2**40
    try:
        export_results(results, tmp_path / "t.nc")
    except pn.UsageError as error:
        assert "pip install 'persona-nns[export]'" in str(error)  # noqa: PT017
        assert not list(tmp_path.glob("*.nc"))
    else:
        with xr.open_dataset(tmp_path / "t.nc") as back:
            xr.testing.assert_equal(back.load(), results)


def test_a_file_that_cannot_be_written_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "s.zarr", [0])
    results = open_results(tmp_path / "s.zarr", "e")
    export_results(results, tmp_path / "t.csv", ["kl"])
    before = (tmp_path / "t.csv").read_bytes()

    def full(_: pd.DataFrame, path: Path, **__: Any) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(pn.UsageError, match=r"cannot be written: .*No space left"):
        export_results(results, tmp_path / "t.csv", ["kl"])
    assert (tmp_path / "t.csv").read_bytes() == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["s.zarr", "t-columns.csv", "t.csv"]


def test_parquet_without_pyarrow_is_one_sentence(tmp_path: Path) -> None:
    write(tmp_path / "s.zarr", [0])
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from pathlib import Path\n"
        "from persona_nns.results import export_results, open_results\n"
        "export_results(open_results(sys.argv[1], 'e'), Path(sys.argv[1]) / 't.parquet')"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "s.zarr")]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    assert said.endswith("is not installed: pip install 'persona-nns[export]'.\n")
