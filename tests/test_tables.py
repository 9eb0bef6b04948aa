"""Tables of results: what a dimension is called does not matter."""

import numpy as np
import pytest
import xarray as xr
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
    assert "3.000 [3.000,3.000]" in printed(whole)


def test_nothing_is_cut_off_in_a_narrow_terminal() -> None:
    text = printed(results_over("column", size=3), width=30)
    assert "…" not in text
    assert sum(character.isdigit() for character in text) >= 3 * 12
