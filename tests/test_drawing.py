"""Figures and variables of an experiment's results, by name."""

import numpy as np
import pytest
import xarray as xr

from persona_nns.errors import UsageError
from persona_nns.figures import describe, draw, draw_one

SETS = ["16", "4"]


@pytest.fixture
def results() -> xr.Dataset:
    """Of injection_controls: one model of two, so that the other's layer set holds no number."""
    closure = np.random.default_rng(0).random((1, 5, 2, 2, 1))
    closure[:, :, 1] = np.nan
    dims = ("model", "cell", "layer_set", "control", "source")
    attrs = {"units": "1", "long_name": "closure", "description": "The share that is gone."}
    return xr.Dataset(
        {
            "closure": (dims, closure, attrs),
            "kl": (dims, 1 - closure, {"units": "nat", "long_name": "KL", "description": "Gap."}),
            "completed": (("model", "cell"), np.ones((1, 5), bool)),
        },
        {
            "model": ["m"],
            "n_layers": ("model", [30]),
            "layer_set": SETS,
            "control": ["norm", "kv"],
            "source": ["oracle"],
            "cell": list("abcde"),
        },
        {"experiment": "injection_controls", "grid": "review", "run": "m.review.1"},
    )


def test_one_figure_is_that_of_all(results: xr.Dataset) -> None:
    one = draw_one(results, "injection_controls", "kl")
    same = draw(results, "injection_controls")["kl"]
    assert [axis.get_title() for axis in one.axes] == [axis.get_title() for axis in same.axes]
    with pytest.raises(UsageError, match="has no figure 'norm'; it has: closure, kl"):
        draw_one(results, "injection_controls", "norm")


def test_a_layer_set_that_no_model_has_gets_no_panel(results: xr.Dataset) -> None:
    figure = draw_one(results, "injection_controls", "closure")
    assert [axis.get_title() for axis in figure.axes] == ["m, layer 16 of 30"]


def test_variables_are_described(results: xr.Dataset) -> None:
    table = describe(results)
    assert table.loc["kl"].tolist() == ["model, cell, layer_set, control, source", "nat", "Gap."]
    assert table.loc["closure", "unit"] == ""
