"""Figures of what is estimated over cells, with 95 % intervals: rates, means and medians.

Everything is read off the labels of the Dataset; every series has a marker of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from persona_nns.figures import seaborn as sns
from persona_nns.figures.intervals import Statistic, interval, share_interval
from persona_nns.figures.style import (
    DOTTED,
    MARKERS,
    ZERO,
    axis_label,
    dodge,
    frame_of,
    grid_title,
    groups,
    heat,
    left_out,
    panel_title,
    panels,
)
from persona_nns.results.measured import clean_marker_note, is_truth, measured_values

Summary = Literal["mean", "median"]
#: A row of panels: what its axis says, and what is drawn.
Row = tuple[str, pd.DataFrame]

_STATISTICS: dict[Summary, Statistic] = {"mean": np.mean, "median": np.median}
_MOST_LAYERS = 4  # panels of heatmaps, one a layer
_LONG_LABEL = 14  # labels of more characters stand at a slant
#: What the intervals are, as a caption says it.
_BOOTSTRAP = "Bars: 95 % interval over cells (bootstrap)."
_WILSON = "Bars: 95 % interval over cells (of rates Wilson's, of others bootstrap)."


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
    values = measured_values(results, name)
    if is_truth(results[name]) and summary == "mean":
        return _estimate(_rate, 100 * values, bounds=_rate_interval)
    return _estimate(_STATISTICS[summary], values)


def closures_of_medians(results: xr.Dataset) -> pd.DataFrame:
    """1 − median KL / median KL(none) over cells, for each model, layer set and source.

    The columns are those of `estimate_table`; cells are resampled with both of their KLs.
    """
    kl = measured_values(results, "kl")
    return _estimate(_closure_of_medians, kl, kl.sel(source="none", drop=True))


def _closure_of_medians(kl: NDArray[Any], none: NDArray[Any], axis: int = -1) -> Any:
    return 1 - np.median(kl, axis=axis) / np.median(none, axis=axis)


def _rate(percent: NDArray[Any]) -> float:
    return float(np.mean(percent))


def _rate_interval(percent: NDArray[Any], *, statistic: Statistic) -> tuple[float, float]:
    low, high = share_interval(statistic(percent) / 100 * len(percent), len(percent))
    return 100 * low, 100 * high


def _estimate(
    statistic: Statistic, *samples: xr.DataArray, bounds: Callable[..., Any] = interval
) -> pd.DataFrame:
    """A statistic of samples of the same cells, at each combination of the first one's labels."""
    over = [str(dim) for dim in samples[0].dims if dim != "cell"]
    together = xr.Dataset(dict(enumerate(samples))).reset_coords(drop=True)
    cells = together.to_dataframe(dim_order=[*over, "cell"]).dropna()
    rows: list[dict[str, Any]] = []
    for labels, of_site in groups(cells, *over):
        columns = of_site.to_numpy().T
        low, high = bounds(*columns, statistic=statistic)
        estimate = {"value": float(statistic(*columns)), "low": low, "high": high}
        rows.append({**dict(zip(over, labels, strict=True)), **estimate})
    return pd.DataFrame(rows, columns=[*over, "value", "low", "high"])


def estimates(
    results: xr.Dataset,
    summaries: Mapping[str, Summary],
    *,
    x: str,
    hue: str | None = None,
    note: str = "",
) -> Figure:
    """Statistics with their intervals: a row a variable, a column a model.

    Args:
        results: of one experiment.
        summaries: the statistic of each variable to draw.
        x: the dimension along the horizontal axis.
        hue: the dimension that colours and markers stand for; None for one series.
        note: sentences to add to the caption.
    """
    rows: list[Row] = []
    for name, how in summaries.items():
        shared = f"cells with {results[name].attrs.get('long_name', name)} (%)"
        label = shared if is_truth(results[name]) else f"{how} {axis_label(results[name])}"
        rows.append((label, estimate_table(results, name, how)))
    rates = any(is_truth(results[name]) for name in summaries)
    unmarked = clean_marker_note(results) if "any_marker" in summaries else ""
    out = left_out(results, list(summaries))
    caption = (_WILSON if rates else _BOOTSTRAP, out, note, unmarked)
    return _draw_tables(results, rows, caption, x=x, hue=hue)


def estimates_by(
    results: xr.Dataset,
    name: str,
    over: Sequence[str],
    *,
    x: str | None,
    hue: str | None,
    facet: str | None,
) -> Figure:
    """The median of a variable, or the rate of truth values, over any dimensions.

    Args:
        results: of one experiment.
        name: the variable.
        over: the dimensions that are summarised over.
        x: the dimension along the horizontal axis; None for a point a model.
        hue: the dimension that colours and markers stand for.
        facet: the dimension of the rows of panels.
    """
    values, rate = measured_values(results, name), is_truth(results[name])
    values = values.reset_coords(drop=True).rename({dim: f"over_{dim}" for dim in over})
    samples = values.expand_dims("cell", axis=-1)
    if over:
        samples = values.stack(cell=[f"over_{dim}" for dim in over], create_index=False)
    table = _estimate(np.median, samples)
    if rate:
        table = _estimate(_rate, 100 * samples, bounds=_rate_interval)
    label = f"{results[name].attrs.get('long_name', name)} (%)" if rate else ""
    label = label or ("median " if over else "") + axis_label(results[name])
    rows: list[Row] = [(label, table)]
    if facet is not None:
        rows = [(f"{facet} {at}\n{label}", of_facet) for (at,), of_facet in groups(table, facet)]
    several = [dim for dim in over if results.sizes[dim] > 1]
    caption = ""
    if several:
        said = _WILSON if rate else _BOOTSTRAP
        caption = said.replace("over cells", f"over {', '.join(several)}")
    return _draw_tables(results, rows, (caption,), x=x or "model", hue=hue)


def closure_figure(results: xr.Dataset) -> Figure:
    """Closure of host injection: the median over cells, and that of the median KLs."""
    tables = {
        "closure, median over cells": estimate_table(results, "closure", "median"),
        "closure, of the medians": closures_of_medians(results),
    }
    rows = [(label, table.query("source != 'none'")) for label, table in tables.items()]
    lines = {0.0: "0: as the host", 1.0: "1: as the long persona"}
    note = (
        "Closure: share of the host's KL to the long persona that the injection removes; of the "
        "medians: 1 − median KL / median KL(none). cached: h_BB + ΔX + ΔY, oracle: h_XY."
    )
    return _draw_tables(results, rows, (_BOOTSTRAP, note), x="layer_set", hue="source", lines=lines)


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
    caption = (_WILSON, clean_marker_note(results))
    return _draw_tables(results, rows, caption, x="source", hue="site")


def shares_heatmap(results: xr.Dataset, name: str, by: str, across: str) -> Figure:
    """Share of a persona's or a task's cells in which something is true.

    Args:
        results: of one experiment.
        name: a variable of truth values.
        by: ``persona`` or ``task``.
        across: the dimension of the columns.

    Returns:
        The figure: a panel a model, or each of its layers, where the variable has layers. Personas
        (or tasks) of which no cell was measured are left out.
    """
    array = measured_values(results, name)
    shares = 100 * array.groupby(by).mean("cell")
    others = [dim for dim in shares.dims if dim != by]
    there = shares.notnull().any(others)
    order = [k for k in dict.fromkeys(results[by].values.tolist()) if bool(there.sel({by: k}))]
    models = results.model.values.tolist()
    # A panel a layer; of many layers, a panel a label with the layers side by side.
    facet, x = ("layer" if "layer" in shares.dims else None), across
    if facet and shares.layer.size > _MOST_LAYERS:
        facet, x = across, "layer"
    sites: list[tuple[str, Any]] = [
        (model, label)
        for model in models
        for label in (shares[facet].values.tolist() if facet else [None])
        if bool(_at(shares, model, facet, label).notnull().any())
    ] or [(model, None) for model in models]
    labels = list(dict.fromkeys(label for _, label in sites))
    rows, columns = (models, labels) if len(sites) > len(models) else ([None], sites)
    size = (2.2 + 3.1 * len(columns), 2.3 + (0.9 + 0.34 * len(order)) * len(rows))
    look: dict[str, Any] = {"cmap": "viridis", "vmin": 0, "vmax": 100, "fmt": ".0f"}
    with panels(size, rows, columns, look="white", sharey=True) as drawn:
        for row, column, axis in drawn:
            model, label = column if row is None else (row, column)
            panel = _at(shares, model, facet, label).sel({by: order}).dropna(x, how="all")
            frame = frame_of(panel.transpose(by, x))
            slant = x == across
            heat(axis, frame, annot=slant, **({"xticklabels": 1} if slant else {}), **look)
            title = f"layer {label}" if facet == "layer" else label
            axis.set(title=model if label is None else f"{model} · {title}", xlabel=x, ylabel=by)
            if slant:
                axis.tick_params(axis="x", rotation=30)
                for tick in axis.get_xticklabels():
                    tick.set_horizontalalignment("right")
        drawn.label_outer()
        drawn.colorbar("cells (%)")
        said = f"Share of the cells of each {by} with {results[name].attrs.get('long_name', name)}."
        drawn.title(grid_title(results), said)
    return drawn.figure


def _at(shares: xr.DataArray, model: str, facet: str | None, label: Any) -> xr.DataArray:
    panel = shares.sel(model=model)
    return panel.sel({facet: label}) if facet and label is not None else panel


def _draw_tables(
    results: xr.Dataset,
    rows: list[Row],
    caption: Sequence[str],
    *,
    x: str,
    hue: str | None,
    lines: Mapping[float, str] = {},
) -> Figure:
    """A row of panels for each table, a column for each model.

    Args:
        results: of one experiment.
        rows: the tables.
        caption: sentences.
        x: the column along the horizontal axis.
        hue: the column of the series.
        lines: what stands at a height that a line marks, as the legend says it.
    """
    models = results.model.values.tolist()
    series = list(dict.fromkeys(label for _, table in rows for label in table[hue or "model"]))
    size = (2.6 + 3.6 * len(models), 1.2 + 2.6 * len(rows))
    with panels(size, rows, models, sharey="row") as drawn:
        for (label, table), model, axis in drawn:
            of_model = table.loc[table["model"] == model]
            _draw_points(axis, of_model, x, hue, series if hue else [None])
            for height, said in lines.items():
                axis.axhline(height, **(DOTTED if height else ZERO), label=said)
            axis.set(title=panel_title(results, model), xlabel=x.replace("_", " "), ylabel=label)
        for (label, table), axis in zip(rows, drawn.axes[:, 0], strict=True):
            _set_range(axis, table, rate="(%)" in label)
        drawn.label_outer()
        drawn.legend((hue or "").replace("_", " "))
        drawn.title(grid_title(results), *caption)
    return drawn.figure


def _set_range(axis: Axes, table: pd.DataFrame, *, rate: bool) -> None:
    """From zero, where nothing is below it: a cut axis makes small differences look large."""
    if rate:
        axis.set_ylim(-4, 104)
    elif len(table) and min([*table["value"], *table["low"].dropna()]) >= 0:
        top = axis.get_ylim()[1] if max(table["value"]) > 0 else 1.0
        axis.set_ylim(-0.04 * top, top)


def _draw_points(
    axis: Axes, table: pd.DataFrame, x: str, hue: str | None, series: Sequence[Any]
) -> None:
    """Points with their intervals, the series of one label side by side."""
    ticks = list(dict.fromkeys(table[x]))
    colours = sns.color_palette("colorblind", len(series))
    for k, label in enumerate(series):
        points = table.loc[table[hue] == label] if hue else table
        if points.empty:
            continue
        value = points["value"].to_numpy()
        axis.errorbar(
            [ticks.index(tick) + dodge(k, len(series)) for tick in points[x]],
            value,
            yerr=np.abs(points[["low", "high"]].to_numpy().T - value),
            fmt=MARKERS[k % len(MARKERS)],
            color=colours[k],
            capsize=3,
            label=None if label is None else str(label),
        )
    names = [str(tick) for tick in ticks]
    longest = max(map(len, names), default=0)
    slanted = longest > _LONG_LABEL or sum(map(len, names)) > 3 * _LONG_LABEL
    axis.set_xticks(
        range(len(ticks)), names, rotation=30 if slanted else 0, ha="right" if slanted else "center"
    )
    axis.set_xlim(-0.5, len(ticks) - 0.5)
    axis.grid(visible=False, axis="x")
