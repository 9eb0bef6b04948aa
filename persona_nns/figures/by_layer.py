"""Figures of results: medians over cells with quartile bands, and heatmaps by persona and task.

Everything is read off the labels of the Dataset. Colours are seaborn's colour-blind palette;
units come from the variables' attributes.
"""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from persona_nns.figures.style import QUARTILES, axis_label, grid_title, one_legend, panel_title

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
    with sns.axes_style("whitegrid"), sns.plotting_context("paper", font_scale=1.1):
        models = results.model.values.tolist()
        size = (1.4 + 3.6 * len(models), 0.7 + 2.7 * len(names))
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        axes = figure.subplots(len(names), len(models), squeeze=False, sharey="row")
        for row, name in enumerate(names):
            for column, model in enumerate(models):
                axis = axes[row, column]
                _line_panel(axis, results[name].sel(model=model))
                if reference is not None:
                    axis.axhline(
                        reference, color="0.4", linestyle=":", linewidth=1.2, label=f"{reference:g}"
                    )
                axis.set_title(panel_title(results, model) if row == 0 else "")
                axis.set_xlabel("layer" if row == len(names) - 1 else "")
                axis.set_ylabel(axis_label(results[name]) if column == 0 else "")
            if log:
                _log_scale(axes[row, 0], results[name])
        one_legend(figure, axes, "position")
        figure.suptitle(grid_title(results, "median over cells, band 25–75 %"), fontsize="medium")
    return figure


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
    with sns.axes_style("whitegrid"), sns.plotting_context("paper", font_scale=1.1):
        models = results.model.values.tolist()
        size = (3.4 + 3.6 * len(models), 0.7 + 2.7 * len(groups))
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        axes = figure.subplots(len(groups), len(models), squeeze=False, sharey="row")
        for row, (label, names) in enumerate(groups.items()):
            long_names = [results[name].attrs.get("long_name", name) for name in names]
            together = xr.concat(
                [results[name].drop_attrs() for name in names],
                dim=pd.Index(long_names, name="variable"),
            ).sel(position=position, drop=True)
            for column, model in enumerate(models):
                axis = axes[row, column]
                _line_panel(axis, together.sel(model=model), hue="variable")
                axis.set_title(panel_title(results, model) if row == 0 else "")
                axis.set_xlabel("layer" if row == len(groups) - 1 else "")
                axis.set_ylabel(label if column == 0 else "")
                if column < len(models) - 1:
                    axis.get_legend().remove()
            sns.move_legend(axes[row, -1], "center left", bbox_to_anchor=(1, 0.5), title=None)
            if label in log:
                _log_scale(axes[row, 0], together)
        figure.suptitle(
            grid_title(results, f"{position}, median over cells, band 25–75 %"), fontsize="medium"
        )
    return figure


def cells_heatmap(results: xr.Dataset, name: str, by: str) -> Figure:
    """Medians of a variable for each persona or each task against layer.

    Args:
        results: with dimensions model, cell, layer and, if it has one, position.
        name: the variable.
        by: ``persona`` or ``task``; the median is over the cells that share it.

    Returns:
        The figure: a row a model, a column a position, one colour scale for all.
    """
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # layers of NaN only
        medians = results[name].groupby(by).median("cell", skipna=True)
    medians = medians.dropna("layer", how="all")
    order = list(dict.fromkeys(results[by].values.tolist()))
    positions = medians.position.values.tolist() if "position" in medians.dims else [None]
    models = medians.model.values.tolist()
    norm = LogNorm(vmin=_FAINT, vmax=max(float(medians.max()), 10 * _FAINT))
    with sns.axes_style("white"), sns.plotting_context("paper", font_scale=1.1):
        size = (2.2 + 2.6 * len(positions), 0.9 + (0.9 + 0.28 * len(order)) * len(models))
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        axes = figure.subplots(len(models), len(positions), squeeze=False, sharey=True)
        for row, model in enumerate(models):
            for column, position in enumerate(positions):
                panel = medians.sel(model=model)
                panel = panel if position is None else panel.sel(position=position)
                panel = panel.dropna("layer", how="all").sel({by: order})
                sns.heatmap(
                    panel.transpose(by, "layer").clip(min=_FAINT).to_pandas(),
                    ax=axes[row, column],
                    cmap="viridis",
                    norm=norm,
                    cbar=False,
                )
                title = model if position is None else f"{model} · {position}"
                axes[row, column].set_title(title)
                axes[row, column].set_xlabel("layer" if row == len(models) - 1 else "")
                axes[row, column].set_ylabel(by if column == 0 else "")
        label = f"median {axis_label(results[name])}"
        figure.colorbar(axes[0, 0].collections[0], ax=axes, label=label, extend="min")
        figure.suptitle(
            grid_title(results, f"median over the cells of each {by}"), fontsize="medium"
        )
    return figure


def _line_panel(axis: Axes, values: xr.DataArray, hue: str = "position") -> None:
    frame = _frame(values, hue)
    told_apart = hue if hue in values.dims else None
    sns.lineplot(
        frame,
        x="layer",
        y="value",
        hue=told_apart,
        style=told_apart,
        markers=True if told_apart else None,
        marker=None if told_apart else "o",
        dashes=False,
        estimator=np.median,
        errorbar=QUARTILES,
        palette="colorblind" if told_apart else None,
        ax=axis,
    )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _log_scale(axis: Axes, values: xr.DataArray) -> None:
    """Make an axis logarithmic, after drawing: on one that is, seaborn averages logarithms."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # layers of NaN only
        drawn = values.quantile([0.25, 0.5], "cell")
    visible = drawn.where(drawn > 1e-7)
    axis.set_yscale("log")
    if bool(visible.notnull().any()):
        axis.set_ylim(bottom=float(visible.min()) / 1.5)


def _frame(values: xr.DataArray, hue: str) -> pd.DataFrame:
    """A long table of the measured numbers; what is told apart by colour keeps its order."""
    frame = values.rename("value").to_dataframe().reset_index().dropna(subset="value")
    if hue in values.dims:
        order = values[hue].values.tolist()
        frame[hue] = pd.Categorical(frame[hue], categories=order, ordered=True)
    return frame
