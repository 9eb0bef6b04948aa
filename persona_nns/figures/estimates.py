"""Figures of what is estimated over cells, with bootstrap intervals: rates, means and medians.

Everything is read off the labels of the Dataset; colours are seaborn's colour-blind palette, and
every series has a marker of its own.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from persona_nns.figures.intervals import Statistic, interval
from persona_nns.figures.style import axis_label, grid_title
from persona_nns.results.measured import measured_values

Summary = Literal["mean", "median"]

_STATISTICS: dict[Summary, Statistic] = {"mean": np.mean, "median": np.median}
_MARKERS = "osD^vPX*<>"
_LONG_LABEL = 14  # labels of more characters stand at a slant
_SPREAD = 0.5  # width that the series of one label take, of the distance between labels
WITH_INTERVAL = "95 % bootstrap interval over cells"


def estimate_table(results: xr.Dataset, name: str, summary: Summary) -> pd.DataFrame:
    """A statistic of a variable over the complete cells, for each combination of its labels.

    Args:
        results: of one experiment.
        name: the variable; of truth values, the mean is a rate in %.
        summary: which statistic.

    Returns:
        A column for each dimension but ``cell``, then ``value``, ``low`` and ``high``; without
        rows where nothing was measured.
    """
    array = measured_values(results, name)
    if results[name].dtype.kind == "b":
        array = 100 * array
    over = [str(dim) for dim in array.dims if dim != "cell"]
    rows: list[dict[str, Any]] = []
    for place in np.ndindex(*(array.sizes[dim] for dim in over)):
        at = dict(zip(over, place, strict=True))
        cells = _present(array.isel(at))
        if cells.size:
            statistic = _STATISTICS[summary]
            low, high = interval(cells, statistic=statistic)
            labels = {dim: array[dim].values[index] for dim, index in at.items()}
            rows.append({**labels, "value": float(statistic(cells)), "low": low, "high": high})
    return pd.DataFrame(rows, columns=[*over, "value", "low", "high"])


def closures_of_medians(results: xr.Dataset) -> pd.DataFrame:
    """1 − median KL / median KL(none) over cells, for each model, layer set and source.

    The columns are those of `estimate_table`; cells are resampled with both of their KLs.
    """
    rows: list[dict[str, Any]] = []
    kl = measured_values(results, "kl")
    for model in kl.model.values.tolist():
        for layer_set in kl.layer_set.values.tolist():
            of_set = kl.sel(model=model, layer_set=layer_set).dropna("cell")
            if not of_set.sizes["cell"]:
                continue
            none = of_set.sel(source="none").values
            for source in of_set.source.values.tolist():
                cells = of_set.sel(source=source).values
                low, high = interval(cells, none, statistic=_closure_of_medians)
                labels = {"model": model, "layer_set": layer_set, "source": source}
                value = float(_closure_of_medians(cells, none))
                rows.append({**labels, "value": value, "low": low, "high": high})
    return pd.DataFrame(rows)


def _closure_of_medians(kl: NDArray[Any], none: NDArray[Any], axis: int = -1) -> Any:
    return 1 - np.median(kl, axis=axis) / np.median(none, axis=axis)


def estimates(results: xr.Dataset, summaries: Mapping[str, Summary], *, x: str, hue: str) -> Figure:
    """Statistics with their intervals: a row a variable, a column a model.

    Args:
        results: of one experiment.
        summaries: the statistic of each variable to draw.
        x: the dimension along the horizontal axis.
        hue: the dimension that colours and markers stand for.
    """
    tables = {name: estimate_table(results, name, how) for name, how in summaries.items()}
    labels = {
        name: f"{how} {axis_label(results[name])}"
        if results[name].dtype.kind != "b"
        else f"cells with {results[name].attrs.get('long_name', name)} (%)"
        for name, how in summaries.items()
    }
    return _panels(results, tables, labels, x=x, hue=hue)


def closure_figure(results: xr.Dataset) -> Figure:
    """Closure of host injection: the median over cells, and the closure of the medians."""
    tables = {
        "median over cells": estimate_table(results, "closure", "median"),
        "of the medians": closures_of_medians(results),
    }
    tables = {name: table.query("source != 'none'") for name, table in tables.items()}
    labels = {name: f"closure, {name}" for name in tables}
    figure = _panels(results, tables, labels, x="layer_set", hue="source")
    for axis in figure.axes:
        axis.axhline(0, color="0.4", linewidth=0.8)
        axis.axhline(1, color="0.4", linestyle=":", linewidth=1.2)
    return figure


def host_markers(results: xr.Dataset) -> Figure:
    """Markers in what the host says under each source, beside what the long persona says."""
    labels = {
        "any_marker": "cells with any persona marker (%)",
        "distinct_markers": "mean distinct persona markers",
    }
    tables: dict[str, pd.DataFrame] = {}
    for name in labels:
        host = estimate_table(results, name, "mean")
        clean = estimate_table(results, f"clean_{name}", "mean")
        tables[name] = pd.concat([host, clean.assign(site="no injection", source="long persona")])
    return _panels(results, tables, labels, x="source", hue="site")


def shares_heatmap(results: xr.Dataset, name: str, by: str, across: str) -> Figure:
    """Share of a persona's or a task's cells in which something is true: a panel a model.

    Args:
        results: of one experiment; where it has layers, its first one is drawn.
        name: a variable of truth values.
        by: ``persona`` or ``task``.
        across: the dimension of the columns.
    """
    array = measured_values(results, name)
    models = results.model.values.tolist()
    order = list(dict.fromkeys(results[by].values.tolist()))
    with sns.axes_style("white"), sns.plotting_context("paper", font_scale=1.1):
        size = (1.9 + 3.1 * len(models), 2.1 + 0.34 * len(order))
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        axes = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
        for axis, model in zip(axes, models, strict=True):
            panel, title = array.sel(model=model), str(model)
            if "layer" in panel.dims:
                panel = panel.dropna("layer", how="all").isel(layer=0)
                title = f"{model} · layer {int(panel.layer)}"
            shares = 100 * panel.groupby(by).mean("cell").sel({by: order})
            sns.heatmap(
                shares.transpose(by, across).to_pandas(),
                ax=axis,
                cmap="viridis",
                vmin=0,
                vmax=100,
                annot=True,
                fmt=".0f",
                cbar=False,
            )
            axis.set_title(title)
            axis.set_xlabel(across)
            axis.set_ylabel(by if axis is axes[0] else "")
            axis.tick_params(axis="x", rotation=30)
            axis.tick_params(axis="y", rotation=0)
        figure.colorbar(axes[0].collections[0], ax=axes, label="cells (%)")
        said = f"{results[name].attrs.get('long_name', name)}: share of the cells of each {by}"
        figure.suptitle(grid_title(results, said, "\n"), fontsize="medium")
    return figure


def _panels(
    results: xr.Dataset,
    tables: Mapping[str, pd.DataFrame],
    labels: Mapping[str, str],
    *,
    x: str,
    hue: str,
) -> Figure:
    """A row of panels for each table, a column for each model, one legend."""
    models = results.model.values.tolist()
    series = list(dict.fromkeys(label for table in tables.values() for label in table[hue]))
    with sns.axes_style("whitegrid"), sns.plotting_context("paper", font_scale=1.1):
        size = (1.8 + 3.6 * len(models), 0.8 + 2.6 * len(tables))
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        axes = figure.subplots(len(tables), len(models), squeeze=False, sharey="row")
        for row, (name, table) in enumerate(tables.items()):
            for column, model in enumerate(models):
                axis = axes[row, column]
                _panel(axis, table.query("model == @model"), x, hue, series)
                n_layers = int(results.n_layers.sel(model=model))
                axis.set_title(f"{model} ({n_layers} layers)" if row == 0 else "")
                axis.set_xlabel(x.replace("_", " ") if row == len(tables) - 1 else "")
                axis.set_ylabel(labels[name] if column == 0 else "")
        shown = {
            label: handle
            for axis in axes.flat
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            [shown[str(label)] for label in series],
            [str(label) for label in series],
            title=hue.replace("_", " "),
            loc="outside right center",
        )
        figure.suptitle(grid_title(results, WITH_INTERVAL, "\n"), fontsize="medium")
    return figure


def _panel(axis: Axes, table: pd.DataFrame, x: str, hue: str, series: list[Any]) -> None:
    """Points with their intervals, the series of one label side by side."""
    ticks = list(dict.fromkeys(table[x]))
    colours = sns.color_palette("colorblind", len(series))
    for k, label in enumerate(series):
        points = table.query(f"{hue} == @label")
        if points.empty:
            continue
        shift = _SPREAD * ((k + 0.5) / len(series) - 0.5)
        value = points["value"].to_numpy()
        axis.errorbar(
            [ticks.index(tick) + shift for tick in points[x]],
            value,
            yerr=np.abs(points[["low", "high"]].to_numpy().T - value),
            fmt=_MARKERS[k % len(_MARKERS)],
            color=colours[k],
            capsize=3,
            label=str(label),
        )
    names = [str(tick) for tick in ticks]
    slanted = max(map(len, names), default=0) > _LONG_LABEL
    axis.set_xticks(
        range(len(ticks)), names, rotation=30 if slanted else 0, ha="right" if slanted else "center"
    )
    axis.set_xlim(-0.5, len(ticks) - 0.5)
    axis.grid(visible=False, axis="x")


def _present(array: xr.DataArray) -> NDArray[Any]:
    values = np.asarray(array.values, dtype=float)
    return values[~np.isnan(values)]
