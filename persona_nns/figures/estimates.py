"""Figures of what is estimated over cells, with bootstrap intervals: rates, means and medians.

Everything is read off the labels of the Dataset; every series has a marker of its own.
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
from persona_nns.figures.style import (
    DOTTED,
    axis_label,
    dodge,
    grid_title,
    groups,
    panel_title,
    panels,
)
from persona_nns.results.measured import is_truth, measured_values

Summary = Literal["mean", "median"]
#: A row of panels: what its axis says, and what is drawn.
Row = tuple[str, pd.DataFrame]

_STATISTICS: dict[Summary, Statistic] = {"mean": np.mean, "median": np.median}
_MARKERS = "osD^vPX*<>"
_LONG_LABEL = 14  # labels of more characters stand at a slant


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
    values = measured_values(results, name).astype(float)
    if is_truth(results[name]):
        values = 100 * values
    return _estimate(_STATISTICS[summary], values)


def closures_of_medians(results: xr.Dataset) -> pd.DataFrame:
    """1 − median KL / median KL(none) over cells, for each model, layer set and source.

    The columns are those of `estimate_table`; cells are resampled with both of their KLs.
    """
    kl = measured_values(results, "kl").astype(float)
    return _estimate(_closure_of_medians, kl, kl.sel(source="none", drop=True))


def _closure_of_medians(kl: NDArray[Any], none: NDArray[Any], axis: int = -1) -> Any:
    return 1 - np.median(kl, axis=axis) / np.median(none, axis=axis)


def _estimate(statistic: Statistic, *samples: xr.DataArray) -> pd.DataFrame:
    """A statistic of samples of the same cells, at each combination of the first one's labels."""
    over = [str(dim) for dim in samples[0].dims if dim != "cell"]
    together = xr.Dataset(dict(enumerate(samples))).reset_coords(drop=True)
    cells = together.to_dataframe(dim_order=[*over, "cell"]).dropna()
    rows: list[dict[str, Any]] = []
    for labels, of_site in groups(cells, *over):
        columns = of_site.to_numpy().T
        low, high = interval(*columns, statistic=statistic)
        estimate = {"value": float(statistic(*columns)), "low": low, "high": high}
        rows.append({**dict(zip(over, labels, strict=True)), **estimate})
    return pd.DataFrame(rows, columns=[*over, "value", "low", "high"])


def estimates(results: xr.Dataset, summaries: Mapping[str, Summary], *, x: str, hue: str) -> Figure:
    """Statistics with their intervals: a row a variable, a column a model.

    Args:
        results: of one experiment.
        summaries: the statistic of each variable to draw.
        x: the dimension along the horizontal axis.
        hue: the dimension that colours and markers stand for.
    """
    rows: list[Row] = []
    for name, how in summaries.items():
        is_share = is_truth(results[name])
        shared = f"cells with {results[name].attrs.get('long_name', name)} (%)"
        label = shared if is_share else f"{how} {axis_label(results[name])}"
        rows.append((label, estimate_table(results, name, how)))
    return _draw_tables(results, rows, x=x, hue=hue)


def closure_figure(results: xr.Dataset) -> Figure:
    """Closure of host injection: the median over cells, and the closure of the medians."""
    tables = {
        "closure, median over cells": estimate_table(results, "closure", "median"),
        "closure, of the medians": closures_of_medians(results),
    }
    rows = [(label, table.query("source != 'none'")) for label, table in tables.items()]
    figure = _draw_tables(results, rows, x="layer_set", hue="source")
    for axis in figure.axes:
        axis.axhline(0, color="0.4", linewidth=0.8)
        axis.axhline(1, **DOTTED)
    return figure


def host_markers(results: xr.Dataset) -> Figure:
    """Markers in what the host says under each source, beside what the long persona says."""
    labels = {
        "any_marker": "cells with any persona marker (%)",
        "distinct_markers": "mean distinct persona markers",
    }
    rows: list[Row] = []
    for name, label in labels.items():
        host = estimate_table(results, name, "mean")
        clean = estimate_table(results, f"clean_{name}", "mean")
        clean = clean.assign(site="no injection", source="long persona")
        rows.append((label, pd.concat([host, clean])))
    return _draw_tables(results, rows, x="source", hue="site")


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
    size = (1.9 + 3.1 * len(models), 2.1 + 0.34 * len(order))
    look: dict[str, Any] = {"cmap": "viridis", "vmin": 0, "vmax": 100, "annot": True, "fmt": ".0f"}
    with panels(size, columns=models, look="white", sharey=True) as drawn:
        for _, model, axis in drawn:
            panel, title = array.sel(model=model), str(model)
            if "layer" in panel.dims:
                panel = panel.dropna("layer", how="all").isel(layer=0)
                title = f"{model} · layer {int(panel.layer)}"
            shares = 100 * panel.groupby(by).mean("cell").sel({by: order})
            sns.heatmap(shares.transpose(by, across).to_pandas(), ax=axis, cbar=False, **look)
            axis.set(title=title, xlabel=across, ylabel=by)
            axis.tick_params(axis="x", rotation=30)
            axis.tick_params(axis="y", rotation=0)
        drawn.label_outer()
        drawn.colorbar("cells (%)")
        said = f"{results[name].attrs.get('long_name', name)}: share of the cells of each {by}"
        drawn.title(grid_title(results, said, "\n"))
    return drawn.figure


def _draw_tables(results: xr.Dataset, rows: list[Row], *, x: str, hue: str) -> Figure:
    """A row of panels for each table, a column for each model."""
    models = results.model.values.tolist()
    series = list(dict.fromkeys(label for _, table in rows for label in table[hue]))
    size = (1.8 + 3.6 * len(models), 0.8 + 2.6 * len(rows))
    with panels(size, rows, models, sharey="row") as drawn:
        for (label, table), model, axis in drawn:
            _draw_points(axis, table.loc[table["model"] == model], x, hue, series)
            axis.set(title=panel_title(results, model), xlabel=x.replace("_", " "), ylabel=label)
        drawn.label_outer()
        drawn.legend(hue.replace("_", " "))
        drawn.title(grid_title(results, "95 % bootstrap interval over cells", "\n"))
    return drawn.figure


def _draw_points(axis: Axes, table: pd.DataFrame, x: str, hue: str, series: list[Any]) -> None:
    """Points with their intervals, the series of one label side by side."""
    ticks = list(dict.fromkeys(table[x]))
    colours = sns.color_palette("colorblind", len(series))
    for k, label in enumerate(series):
        points = table.loc[table[hue] == label]
        if points.empty:
            continue
        value = points["value"].to_numpy()
        axis.errorbar(
            [ticks.index(tick) + dodge(k, len(series)) for tick in points[x]],
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
