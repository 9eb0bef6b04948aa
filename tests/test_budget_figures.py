"""Figures of budgets show the medians and the fewest parts, whatever the parts are."""

from typing import Any

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from persona_nns.figures import closure_by_budget, head_maps, needed_by_persona

BUDGETS = ["0", "1", "2", "4", "all"]
#: Of each cell; the second falls below a half once more.
CURVES = {
    "chef/arch": [0.0, 0.2, 0.6, 0.7, 1.0],
    "chef/plan": [0.0, 0.6, 0.4, 0.95, 1.0],
    "yoda/arch": [0.0, 0.1, 0.2, 0.3, 1.0],
    "yoda/plan": [0.0, 0.1, 0.2, 0.92, 1.0],
}


def results(**units: float) -> xr.Dataset:
    """Closure of two rankings, the second of which has no scores in one cell."""
    closure = np.stack([list(CURVES.values())] * 2, axis=1)
    closure[0, 1] = np.nan
    dims: tuple[str, ...] = ("model", "cell", "ranking", "budget")
    values: Any = np.array([0, 8, 16, 32, 56])
    held: tuple[str, ...] = ("model", "cell", "budget")
    if units:
        closure = np.stack([closure * factor for factor in units.values()], axis=1)
        dims = ("model", "cell", "unit", "ranking", "budget")
        held = ("model", "cell", "unit", "budget")
        values = np.broadcast_to(values, (4, len(units), 5))
    else:
        values = np.broadcast_to(values, (4, 5))
    coords: dict[str, Any] = {
        "model": ["m"],
        "cell": list(CURVES),
        "persona": ("cell", [label.split("/")[0] for label in CURVES]),
        "ranking": ["best", "other"],
        "budget": BUDGETS,
        "n_layers": ("model", [3]),
    }
    if units:
        coords["unit"] = list(units)
    return xr.Dataset(
        {
            "closure": (dims, closure[None], {"long_name": "closure"}),
            "values" if not units else "cache_bytes": (held, values[None]),
            "completed": (("model", "cell"), np.ones((1, 4), dtype=bool)),
        },
        coords=coords,
        attrs={"experiment": "head_budget", "grid": "small"},
    )


def titled(figure: Figure) -> list[str]:
    return [axis.get_title() for axis in figure.axes]


def test_a_line_a_ranking_over_labelled_budgets() -> None:
    mixed = results().isel(budget=[4, 2, 0, 1, 3])  # as models of several sizes come
    (axis,) = closure_by_budget(mixed).axes
    assert [label.get_text() for label in axis.get_xticklabels()] == BUDGETS
    best = next(line for line in axis.get_lines() if line.get_label() == "best")
    drawn = np.asarray(best.get_ydata(), dtype=float)
    np.testing.assert_allclose(drawn, np.median(list(CURVES.values()), axis=0))
    assert axis.get_xlabel() == "parts, best first"


def test_a_row_a_unit() -> None:
    figure = closure_by_budget(results(layer_head=1.0, token=0.5))
    assert titled(figure) == ["m (3 layers)\nlayer head", "m (3 layers)\ntoken"]
    assert [axis.get_xlabel() for axis in figure.axes][1] == "parts, best first"


def test_the_fewest_parts_by_persona() -> None:
    figure = needed_by_persona(results())
    found: list[dict[str, list[float]]] = []
    for axis in figure.axes:
        points = {"best": [], "other": []}
        containers: list[Any] = list(axis.containers)
        for container in containers:
            line = container.lines[0]
            x, y = float(line.get_xdata()[0]), float(line.get_ydata()[0])
            points["best" if x - round(x) < 0 else "other"].append(y)
        found.append(points)
    # Of chef: 2 and 4 parts for a half (the fall counts), and 7 and 4 for nine tenths.
    assert found[0] == {"best": [3.0, 5.5], "other": [4.0, 5.5]}
    assert found[1] == {"best": [5.5, 5.5], "other": [4.0, 5.5]}
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["best", "other"]


def test_no_point_where_all_parts_are_not_enough() -> None:
    figure = needed_by_persona(results(token=0.8))
    assert [len(axis.containers) > 0 for axis in figure.axes] == [True, False]


@pytest.mark.parametrize("names", [("effect", "attribution"), ("attribution",)])
def test_heads_by_layer(names: tuple[str, ...]) -> None:
    of_heads = np.arange(24.0).reshape(1, 4, 3, 2)
    ds = results().assign(
        dict.fromkeys(names, (("model", "cell", "layer", "head"), of_heads - 9)),
    )
    figure = head_maps(ds.assign_coords(layer=range(3), head=range(2)))
    assert titled(figure)[: len(names)] == [f"m\n{name}" for name in names]
    drawn: Any = figure.axes[0].collections[0].get_array()
    np.testing.assert_allclose(np.ravel(drawn), np.median(of_heads[0] - 9, axis=0).ravel())
    closed = closure_by_budget(ds.assign_coords(layer=range(3), head=range(2)))
    assert closed.axes[0].get_xlabel() == "heads, best first"
