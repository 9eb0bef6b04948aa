"""Figures of an experiment that brings none: each of its numbers, by the labels that it has.

What is numbered (layers, heads, strengths) stands along the axis; a second dimension is told apart
by colour, a third by rows of panels. Medians are over the units and over what else there is.
"""

from collections.abc import Sequence

import xarray as xr
from matplotlib.figure import Figure

from persona_nns.figures.by_layer import lines_by_layer
from persona_nns.figures.estimates import estimates_by
from persona_nns.figures.style import (
    axis_label,
    draw_medians,
    grid_title,
    left_out,
    long_form,
    panels,
)
from persona_nns.figures.tables import measured
from persona_nns.results.measured import is_truth, measured_values

_MOST_COLOURS = 10
_MOST_ROWS = 6


def default_figures(results: xr.Dataset) -> dict[str, Figure]:
    """What is drawn for an experiment that brings no figures: a figure for each of its numbers.

    Args:
        results: of any dimensions; vectors as wide as the model are left out, and what is not
            measured anywhere.
    """
    figures: dict[str, Figure] = {}
    for name in measured(results):
        array = results[name]
        if "d_model" in array.dims or not bool(array.notnull().any()):
            continue
        plain = {"cell", "layer"} <= set(array.dims) <= {"model", "cell", "layer", "position"}
        if plain and not is_truth(array) and array.sizes["layer"] > 1:
            figures[f"{name}_by_layer"] = lines_by_layer(results, [name])
            continue
        along = _along(results, array)
        figures[f"{name}_by_{along}" if along else name] = _draw(results, name, along)
    return figures


def _own(results: xr.Dataset, array: xr.DataArray) -> list[str]:
    """The dimensions beside model and units that have several labels."""
    units = set(results["completed"].dims) if "completed" in results else {"cell"}
    return [str(dim) for dim in array.dims if dim not in {"model", *units} and array.sizes[dim] > 1]


def _along(results: xr.Dataset, array: xr.DataArray) -> str | None:
    """The dimension that stands along the axis: a layer, else a numbered one, else the longest."""
    own = _own(results, array)
    numbered = [dim for dim in own if array[dim].dtype.kind in "iuf"]
    if "layer" in own:
        return "layer"
    ranked = sorted(numbered or own, key=lambda dim: -array.sizes[dim])
    return ranked[0] if ranked else None


def _draw(results: xr.Dataset, name: str, along: str | None) -> Figure:
    array = results[name]
    others = [dim for dim in _own(results, array) if dim != along]
    hue = next((dim for dim in others if array.sizes[dim] <= _MOST_COLOURS), None)
    rest = [dim for dim in others if dim != hue]
    facet = next((dim for dim in rest if array.sizes[dim] <= _MOST_ROWS), None)
    over = [str(dim) for dim in array.dims if dim not in ("model", along, hue, facet)]
    numbered = along is not None and array[along].dtype.kind in "iuf"
    shown = [dim for dim in over if array.sizes[dim] > 1]
    if numbered and not is_truth(array):
        return _lines(results, measured_values(results, name), str(along), hue, facet, shown)
    return estimates_by(results, name, over, x=along, hue=hue, facet=facet)


def _lines(
    results: xr.Dataset,
    values: xr.DataArray,
    along: str,
    hue: str | None,
    facet: str | None,
    over: Sequence[str],
) -> Figure:
    """Medians and quartiles against numbers: a column a model, a row a label of `facet`."""
    models = values.model.values.tolist()
    rows = values[facet].values.tolist() if facet else [None]
    size = (2.6 + 3.6 * len(models), 1.2 + 2.6 * len(rows))
    with panels(size, rows, models, sharey="row") as drawn:
        for row, model, axis in drawn:
            panel = values.sel(model=model)
            panel = panel if row is None else panel.sel({facet: row})
            draw_medians(axis, long_form(panel, *([hue] if hue else [])), along, hue)
            title = model if row is None else f"{model} · {facet} {row}"
            axis.set(title=title, ylabel=axis_label(values), xlabel=along.replace("_", " "))
        drawn.label_outer()
        drawn.legend((hue or "").replace("_", " "))
        spread = "beside them 25 and 75 %, of fewer than four the values"
        said = f"Lines: median over {', '.join(over)}; {spread}." if over else ""
        drawn.title(grid_title(results), said, left_out(results, [str(values.name)]))
    return drawn.figure
