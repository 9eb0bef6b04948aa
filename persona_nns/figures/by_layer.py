"""Figures of results: medians over cells with quartiles, and heatmaps by persona and task.

Everything is read off the labels of the Dataset; units come from the variables' attributes.
"""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from persona_nns.figures.style import (
    DOTTED,
    axis_label,
    colour_range,
    draw_medians,
    frame_of,
    grid_title,
    heat,
    left_out,
    long_form,
    panel_title,
    panels,
    spread_of,
)


def lines_by_layer(
    results: xr.Dataset,
    names: Sequence[str],
    *,
    log: bool = False,
    reference: float | None = None,
    note: str = "",
) -> Figure:
    """Median over cells against layer with quartiles; a row a variable, a column a model.

    Args:
        results: with dimensions model, cell, layer and, if it has one, position.
        names: the variables to draw.
        log: a logarithmic vertical axis; a median of 0 runs out of it at the bottom.
        reference: draw a dotted line at this value.
        note: sentences to add to the caption, such as what symbols stand for.

    Returns:
        The figure, not shown. Fewer than four cells are drawn each, in place of quartiles.
    """
    models = results.model.values.tolist()
    size = (2.4 + 3.6 * len(models), 1.1 + 2.7 * len(names))
    with panels(size, names, models, sharey="row") as drawn:
        for name, model, axis in drawn:
            _draw_lines(axis, results[name].sel(model=model), "position")
            if reference is not None:
                units = results[name].attrs.get("units", "1")
                unit = "" if units == "1" else f" {units}"
                axis.axhline(reference, **DOTTED, label=f"{reference:g}{unit}")
            axis.set(title=panel_title(results, model), ylabel=axis_label(results[name]))
        if log:
            for name, axis in zip(names, drawn.axes[:, 0], strict=True):
                _log_scale(axis, results[name])
        drawn.label_outer()
        drawn.legend("position" if "position" in results[names[0]].dims else "")
        series = max(results[name].sizes.get("position", 1) for name in names)
        spread = spread_of(results, series)
        drawn.title(grid_title(results), spread, left_out(results, names), note)
    return drawn.figure


def compare_by_layer(
    results: xr.Dataset,
    groups: Mapping[str, Sequence[str]],
    *,
    position: str,
    log: Sequence[str] = (),
    note: str = "",
) -> Figure:
    """Several variables in one panel against layer, at one position; a column a model.

    Args:
        results: with dimensions model, cell, layer and position.
        groups: the variables of each row of panels, by what stands on its vertical axis.
        position: the position that is drawn.
        log: the rows with a logarithmic axis.
        note: sentences to add to the caption.

    Returns:
        The figure: medians over cells with their quartiles, a legend a row.
    """
    models = results.model.values.tolist()
    at = results.sel(position=position, drop=True)
    together = {
        label: xr.concat(
            [at[name].drop_attrs() for name in names],
            pd.Index([at[name].attrs.get("long_name", name) for name in names], name="variable"),
        )
        for label, names in groups.items()
    }
    size = (4.6 + 3.6 * len(models), 1.3 + 2.7 * len(groups))
    with panels(size, list(groups), models, sharey="row") as drawn:
        for label, model, axis in drawn:
            _draw_lines(axis, together[label].sel(model=model), "variable")
            axis.set(title=panel_title(results, model), ylabel=label)
        for label, axes in zip(groups, drawn.axes, strict=True):
            axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
            if label in log:
                _log_scale(axes[0], together[label])
        drawn.label_outer()
        names = [name for of_group in groups.values() for name in of_group]
        series = max(map(len, groups.values()))
        where = f"At {position}."
        spread = spread_of(results, series)
        drawn.title(grid_title(results), where, spread, left_out(at, names), note)
    return drawn.figure


def cells_heatmap(results: xr.Dataset, name: str, by: str, *, note: str = "") -> Figure:
    """Medians of a variable for each persona or each task against layer.

    Args:
        results: with dimensions model, cell, layer and, if it has one, position.
        name: the variable.
        by: ``persona`` or ``task``; the median is over the cells that share it.
        note: sentences to add to the caption.

    Returns:
        The figure: a row a model, a column a position, with a colour scale of its own. Personas
        (or tasks) of which no cell was measured are left out, and layers without numbers.
    """
    values = results[name]
    if "position" not in values.dims:
        values = values.expand_dims(position=[""])
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # layers of NaN only
        of_each = values.groupby(by).median("cell", skipna=True)
    there = of_each.notnull().any([dim for dim in of_each.dims if dim != by])
    every = dict.fromkeys(results[by].values.tolist())
    order = [label for label in every if bool(there.sel({by: label}))]
    positions, models = of_each.position.values.tolist(), of_each.model.values.tolist()
    norms = {position: colour_range(of_each.sel(position=position)) for position in positions}
    size = (1.6 + 3.1 * len(positions), 1.8 + (0.9 + 0.28 * len(order)) * len(models))
    with panels(size, models, positions, look="white", sharey=True) as drawn:
        for model, position, axis in drawn:
            panel = of_each.sel(model=model, position=position).dropna("layer", how="all")
            low, high = norms[position]
            panel = panel.sel({by: order}).transpose(by, "layer").clip(min=low)
            heat(axis, frame_of(panel), cmap="viridis", norm=LogNorm(low, high))
            title = f"{model} · {position}" if position else model
            axis.set(title=title, xlabel="layer", ylabel=by)
        drawn.label_outer()
        for position, axes in zip(positions, drawn.axes.T, strict=True):
            if shown := [axis.collections[0] for axis in axes if axis.collections]:
                label = f"{axis_label(values)}, {position}" if position else axis_label(values)
                ticks = np.geomspace(*norms[position], 3)
                look = {"location": "bottom", "extend": "min", "aspect": 30, "pad": 0.03}
                bar = drawn.figure.colorbar(shown[0], ax=axes.tolist(), ticks=ticks, **look)
                bar.ax.minorticks_off()
                bar.ax.set_xticklabels([f"{tick:.2g}" for tick in ticks])
                # Inside the bar's ends, so that they do not run into the next column's.
                lowest, _, highest = bar.ax.get_xticklabels()
                lowest.set_horizontalalignment("left")
                highest.set_horizontalalignment("right")
                bar.set_label(label, size="small")
        missing = [label for label in every if label not in order]
        unmeasured = f"Not measured: {by} {', '.join(missing)}." if missing else ""
        what = f"Median over the cells of each {by}; each column has a colour scale of its own."
        out = left_out(results, [name])
        drawn.title(grid_title(results), what, unmeasured, out, note)
    return drawn.figure


def _draw_lines(axis: Axes, values: xr.DataArray, hue: str) -> None:
    """One model's panel: a line for each label of a dimension, if there is such a dimension."""
    told_apart = [hue] if hue in values.dims else []
    draw_medians(axis, long_form(values, *told_apart), "layer", *told_apart)


def _log_scale(axis: Axes, values: xr.DataArray) -> None:
    """Make an axis logarithmic, from the lowest quartile that is not a zero."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # layers of NaN only
        drawn = values.quantile([0.25, 0.5], "cell")
    visible = drawn.where(drawn > 1e-7)
    axis.set_yscale("log")
    if bool(visible.notnull().any()):
        axis.set_ylim(bottom=float(visible.min()) / 1.5)
