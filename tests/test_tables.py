"""Tables of results: what a dimension is called does not matter."""

import numpy as np
import pytest
import xarray as xr
from rich.console import Console

from persona_nns.tables import measured, result_table


def results_over(*dims: str, size: int = 4) -> xr.Dataset:
    """One model, two cells, and a variable over some more dimensions: 0, 1, 2, …"""
    every = ("model", "cell", *dims)
    shape = (1, 2, *[size] * len(dims))
    coords = {"model": ["m"], "cell": ["a/b", "c/d"], "n_layers": ("model", [8])}
    coords |= {dim: list(range(size)) for dim in dims}
    values = np.arange(np.prod(shape), dtype=float).reshape(shape)
    completed = (("model", "cell"), np.ones((1, 2), dtype=bool))
    return xr.Dataset({"x": (every, values), "completed": completed}, coords=coords)


def printed(results: xr.Dataset) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        for name in measured(results):
            console.print(result_table(results, name))
    return capture.get()


@pytest.mark.parametrize(
    "dims",
    [
        ("question", "sample"),  # both are summarised over
        ("layer", "question", "sample"),
        ("column",),
        ("row", "column", "sample"),
        ("layer_band", "row", "column"),
    ],
)
def test_any_dimension_can_be_summarised_over_or_be_a_column(dims: tuple[str, ...]) -> None:
    text = printed(results_over(*dims))
    assert "x: x" in text
    n_layers = 4 if dims[0] in ("layer", "layer_band") else 1
    if dims == ("question", "sample"):  # 32 numbers, 0 to 31, in one
        assert "over every cell, question, sample" in " ".join(text.split())
        assert "15.500 [7.750,23.2]" in text
    if dims == ("column",):  # the two cells of each column: 0 and 4, 1 and 5, …
        assert all(f"{2 + k}.000 [" in text for k in range(4))
    assert text.count("m ") >= 1
    assert len([line for line in text.splitlines() if "[" in line and "median" not in line]) >= (
        n_layers
    )
