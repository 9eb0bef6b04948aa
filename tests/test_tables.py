"""Tables of results: what a dimension is called does not matter."""

import re
from io import StringIO

import numpy as np
import pytest
import xarray as xr
from rich.console import Console
from rich.table import Table
from shared import printed

from persona_nns.figures.tables import result_table


def results_over(*dims: str, size: int = 4) -> xr.Dataset:
    """One model, two cells, and a variable over some more dimensions: 0, 1, 2, …"""
    every = ("model", "cell", *dims)
    shape = (1, 2, *[size] * len(dims))
    coords = {"model": ["m"], "cell": ["a/b", "c/d"], "n_layers": ("model", [8])}
    coords |= {dim: list(range(size)) for dim in dims}
    values = np.arange(np.prod(shape), dtype=float).reshape(shape)
    completed = (("model", "cell"), np.ones((1, 2), dtype=bool))
    return xr.Dataset({"x": (every, values), "completed": completed}, coords=coords)


@pytest.mark.parametrize(
    ("dims", "size", "n_rows", "shown"),
    [
        # What makes up more than twelve values is summarised over, where its labels are numbers.
        (("question", "sample"), 4, 1, "15.500 [7.750,23.2]"),
        (("layer", "question", "sample"), 4, 4, "71.500"),
        (("row", "column", "sample"), 4, 1, "63.500"),
        # Columns, the two cells of each: 0 and 3, 1 and 4, 2 and 5.
        (("column",), 3, 1, "3.500 [2.750,4.250]"),
        (("condition", "column"), 2, 2, "3.000 [2.000,4.000]"),
        # More than three columns are rows; a label that is alone is not shown.
        (("column",), 4, 4, "4.000 [3.000,5.000]"),
        (("layer_band", "row"), 7, 49, "50.500"),
        (("layer", "sample"), 1, 1, "0.500 [.250,.750]"),
    ],
)
def test_any_dimension_can_be_summarised_over_be_a_column_or_a_row(
    dims: tuple[str, ...], size: int, n_rows: int, shown: str
) -> None:
    results = results_over(*dims, size=size)
    assert result_table(results, "x").row_count == n_rows
    assert shown in printed(results)


def test_a_dimension_without_units_is_not_summarised_over() -> None:
    """Four values, each of every cell, or of none."""
    results = results_over("column", size=4)
    whole = results.assign(x=results.x.isel(cell=0, drop=True))
    assert result_table(whole, "x").row_count == 4
    assert "3.000" in printed(whole)
    assert "[" not in printed(whole)


def test_nothing_is_cut_off_in_a_narrow_terminal() -> None:
    text = printed(results_over("column", size=3), width=30)
    assert "…" not in text
    assert sum(character.isdigit() for character in text) >= 3 * 12


def rendered(table: Table, width: int) -> list[str]:
    console = Console(width=width, file=StringIO())
    console.print(table)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("model", ["organism-gemma2", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_labels_and_numbers_are_whole_at_any_width(model: str, width: int) -> None:
    results = results_over("control", "source", size=3)
    controls = ["persona_length", "total_length", "together_own_size"]
    results = results.assign_coords(
        model=[model], control=controls, source=["none", "cached", "oracle"]
    )
    results["x"] = results.x - 1234.5
    lines = rendered(result_table(results, "x"), width)
    assert all(len(line) <= width for line in lines)
    words = {word for line in lines for word in line.split()}
    assert not any("…" in word for word in words)
    if width >= 80:
        assert "-1230.000" in words
        assert {"[-1232.2,", "-1227.8]"} <= words or "[-1232.2,-1227.8]" in words
        for name in (model, *controls):  # what is broken is broken at a hyphen or the like
            parts = re.findall(r"[^-_/.]+[-_/.]?", name)
            ends = ["".join(parts[:k]) for k in range(1, len(parts) + 1)]
            assert any(end in words for end in ends)


def test_nothing_is_cut_off_where_there_is_no_room_for_words() -> None:
    results = results_over("control", size=1).assign_coords(control=["x" * 50])
    shown = "".join(rendered(result_table(results, "x"), 40))
    assert shown.count("x") >= 51
