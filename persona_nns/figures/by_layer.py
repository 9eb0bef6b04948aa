"""Figures of results: medians over cells with quartile bands, and heatmaps by persona and task.

Everything is read off the labels of the Dataset; units come from the variables' attributes.
"""

import warnings
from collections.abc import Mapping, Sequence

import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from persona_nns.figures.style import (
    DOTTED,
    MEDIANS,
    axis_label,
    draw_medians,
    grid_title,
    long_form,
    panel_title,
    panels,
)

_FAINT = 1e-3  # lowest colour of a heatmap; everything below looks alike


def lines_by_layer(
    results: xr.Dataset,
    names: Sequence[str],
    *,
    log: bool = False,
    reference: float | None = None,
) -> Figure:
    """Median over cells against layer with 25–75 % bands; a row a variable, a column a model.

    Args:
        results: with dimensions model, cell, layer and, if it has one, position.
        names: the variables to draw.
        log: a logarithmic vertical axis; a median of 0 runs out of it at the bottom.
        reference: draw a dotted line at this value.

    Returns:
        The figure, not shown.
    """
    models = results.model.values.tolist()
    size = (1.4 + 3.6 * len(models), 0.7 + 2.7 * len(names))
    with panels(size, names, models, sharey="row") as drawn:
        for name, model, axis in drawn:
            _draw_lines(axis, results[name].sel(model=model), "position")
            if reference is not None:
                axis.axhline(reference, **DOTTED, label=f"{reference:g}")
            axis.set(title=panel_title(results, model), ylabel=axis_label(results[name]))
        if log:
            for name, axis in zip(names, drawn.axes[:, 0], strict=True):
                _log_scale(axis, results[name])
        drawn.label_outer()
        drawn.legend("position")
        drawn.title(grid_title(results, MEDIANS))
    return drawn.figure


def compare_by_layer(
    results: xr.Dataset,
    groups: Mapping[str, Sequence[str]],
    *,
    position: str,
    log: Sequence[str] = (),
) -> Figure:
    """Several variables in one panel against layer, at one position; a column a model.

    Args:
        results: with dimensions model, cell, layer and position.
        groups: the variables of each row of panels, by what stands on its vertical axis.
        position: the position that is drawn.
        log: the rows with a logarithmic axis.

    Returns:
        The figure: medians over cells with 25–75 % bands, a legend a row.
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
    size = (3.4 + 3.6 * len(models), 0.7 + 2.7 * len(groups))
    with panels(size, list(groups), models, sharey="row") as drawn:
        for label, model, axis in drawn:
            _draw_lines(axis, together[label].sel(model=model), "variable")
            axis.set(title=panel_title(results, model), ylabel=label)
        for label, axes in zip(groups, drawn.axes, strict=True):
            for axis in axes[:-1]:
                axis.get_legend().remove()
            sns.move_legend(axes[-1], "center left", bbox_to_anchor=(1, 0.5), title=None)
            if label in log:
                _log_scale(axes[0], together[label])
        drawn.label_outer()
        drawn.title(grid_title(results, f"{position}, {MEDIANS}"))
    return drawn.figure


def cells_heatmap(results: xr.Dataset, name: str, by: str) -> Figure:
    """Medians of a variable for each persona or each task against layer.

    Args:
        results: with dimensions model, cell, layer and, if it has one, position.
        name: the variable.
        by: ``persona`` or ``task``; the median is over the cells that share it.

    Returns:
        The figure: a row a model, a column a position, one colour scale for all.
    """
    values = results[name]
    if "position" not in values.dims:
        values = values.expand_dims(position=[""])
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # layers of NaN only
        medians = values.groupby(by).median("cell", skipna=True)
    order = list(dict.fromkeys(results[by].values.tolist()))
    positions, models = medians.position.values.tolist(), medians.model.values.tolist()
    norm = LogNorm(vmin=_FAINT, vmax=max(float(medians.max()), 10 * _FAINT))
    size = (2.2 + 2.6 * len(positions), 0.9 + (0.9 + 0.28 * len(order)) * len(models))
    with panels(size, models, positions, look="white", sharey=True) as drawn:
        for model, position, axis in drawn:
            panel = medians.sel(model=model, position=position).dropna("layer", how="all")
            frame = panel.sel({by: order}).transpose(by, "layer").clip(min=_FAINT).to_pandas()
            sns.heatmap(frame, ax=axis, cmap="viridis", norm=norm, cbar=False)
            axis.set_title(f"{model} · {position}" if position else model)
        drawn.label_outer()
        drawn.colorbar(f"median {axis_label(results[name])}", extend="min")
        drawn.title(grid_title(results, f"median over the cells of each {by}"))
    return drawn.figure


def _draw_lines(axis: Axes, values: xr.DataArray, hue: str) -> None:
    """One model's panel: a line for each label of a dimension, if there is such a dimension."""
    told_apart = [hue] if hue in values.dims else []
    draw_medians(axis, long_form(values, *told_apart), "layer", *told_apart)


def _log_scale(axis: Axes, values: xr.DataArray) -> None:
    """Make an axis logarithmic, after drawing: on one that is, seaborn averages logarithms."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # layers of NaN only
        drawn = values.quantile([0.25, 0.5], "cell")
    visible = drawn.where(drawn > 1e-7)
    axis.set_yscale("log")
    if bool(visible.notnull().any()):
        axis.set_ylim(bottom=float(visible.min()) / 1.5)
