"""Figures of a comparison: published and measured numbers on the same axes.

Layers are drawn at their depth (layer / n_layers), so that models of different size line up.
Published and measured also differ in line and marker.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from persona_nns.figures import seaborn as sns
from persona_nns.figures.style import dodge, groups, panels
from persona_nns.published.compare import Matched, label, summarise
from persona_nns.published.tables import POSITIONS

REFERENCE = 0.1  # nat, "essentially clean" in the paper
_FLOOR = 1e-5
_DOTTED: dict[str, Any] = {"color": "0.35", "linestyle": ":", "linewidth": 1.2}
_LOOKS: dict[str, dict[str, Any]] = {
    "published": {"linestyle": "--", "marker": "o", "markerfacecolor": "white"},
    "measured": {"linestyle": "-", "marker": "s"},
}
_BELOW: dict[str, Any] = {"loc": "outside lower center", "frameon": False}


def compare_figures(matched: Sequence[Matched], frame: pd.DataFrame) -> dict[str, Figure]:
    """The figures of an experiment's comparison by name.

    Args:
        matched: results on every grid that both stores have.
        frame: from `side_by_side`, of all of them.

    Returns:
        Figures, not shown; none for numbers that are neither over layers, conditions nor sources.
    """
    if {"kl", "position"} <= {*frame["variable"], *frame.columns}:
        return {"kl_by_depth": _kl_by_depth(matched)}
    if "condition" in frame:
        return {"markers": _bars(frame)}
    if "source" in frame:
        return {"host": _host(frame)}
    return {}


def _kl_by_depth(matched: Sequence[Matched]) -> Figure:
    """Figure 1: median KL with quartile bands, a row a grid, a column a model."""
    models = list(dict.fromkeys(label(r) for m in matched for r in (*m.published, *m.measured)))
    size = (1.3 + 2.7 * len(models), 1.1 + 2.4 * len(matched))
    colours: dict[str, Any] = dict(zip(POSITIONS, sns.color_palette("colorblind"), strict=False))
    with panels(size, matched, models, sharex=True, sharey=True) as drawn:
        for results, model, axis in drawn:
            sides = {"published": results.published, "measured": results.measured}
            for side, of_side in sides.items():
                for of_model in of_side:
                    if label(of_model) == model:
                        _draw_kl(axis, of_model, colours, side)
            if not axis.lines:
                axis.text(
                    0.5, 0.5, "no results", transform=axis.transAxes, ha="center", color="0.4"
                )
            axis.axhline(REFERENCE, **_DOTTED)
            n_cells = max(r.sizes["cell"] for r in results.published)
            axis.set(
                yscale="log",
                xlim=(0, 1),
                title=_brief_model(model),
                xlabel="depth (layer / layers)",
                ylabel=f"{results.grid} grid, {n_cells} cells\ncausal KL (nat)",
            )
        drawn.label_outer()
        handles = [Line2D([], [], color=colours[p], linewidth=2, label=p) for p in POSITIONS]
        handles += [Line2D([], [], color="0.25", label=side, **_LOOKS[side]) for side in _LOOKS]
        handles.append(Line2D([], [], **_DOTTED, label=f"{REFERENCE:g} nat"))
        drawn.figure.legend(handles=handles, ncols=len(handles), **_BELOW)
        drawn.title("KL after additive substitution: median over cells, band 25–75 %")
    return drawn.figure


def _draw_kl(axis: Axes, results: xr.Dataset, colours: dict[str, Any], side: str) -> None:
    # A median of exactly 0 (an intervention that changes nothing) has no place on a log axis.
    frame = summarise(results, "kl").query("value > 0")
    n_layers = int(results.n_layers.item())
    for position, colour in colours.items():
        rows = frame.loc[frame["position"] == position].sort_values("layer")
        depth = rows["layer"] / n_layers
        look = {"zorder": 4 if side == "published" else 2, **_LOOKS[side]}
        axis.plot(depth, rows["value"], color=colour, markersize=4, linewidth=1.4, **look)
        low, high = rows["q25"].clip(lower=_FLOOR), rows["q75"]
        axis.fill_between(depth, low, high, color=colour, alpha=0.15, linewidth=0)


def _sides(frame: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """(legend, side, rows) of each published and each measured model."""
    sides: list[tuple[str, str, pd.DataFrame]] = []
    published = ""
    for (model, partner), rows in groups(frame, "model", "measured_model"):
        if model != published:
            sides.append((f"{_brief_model(model)}, published", "published", rows))
        sides.append((f"{_brief_model(partner)}, measured", "measured", rows))
        published = model
    return sides


def _brief_model(model: str) -> str:
    return model.rpartition("/")[2]


def _bars(frame: pd.DataFrame) -> Figure:
    """Table 3: share of cells with a marker, and distinct markers, under each condition."""
    titles = {
        "any_marker": "cells with a persona marker (%)",
        "distinct_markers": "distinct markers in a text (mean)",
    }
    conditions = frame["condition"].unique().tolist()
    sides = _sides(frame)
    palette = sns.color_palette("colorblind", len(sides))
    with panels((8.2, 3.6), columns=list(titles)) as drawn:
        for _, name, axis in drawn:
            scale, fmt = (100, "%.1f") if name == "any_marker" else (1, "%.2f")
            for k, (legend, side, rows) in enumerate(sides):
                values = rows.loc[rows["variable"] == name].groupby("condition")[side].last()
                bars = axis.bar(
                    np.arange(len(conditions)) + dodge(k, len(sides), 0.8),
                    scale * values.reindex(conditions),
                    0.8 / len(sides),
                    color=palette[k],
                    hatch="///" if side == "published" else None,
                    edgecolor="white",
                    label=legend,
                )
                axis.bar_label(bars, fmt=fmt, fontsize=7, padding=1)
            axis.set_xticks(range(len(conditions)), [c.replace("_", "\n") for c in conditions])
            axis.set(xlabel="condition", ylabel=titles[name])
            axis.grid(visible=False, axis="x")
        drawn.axes[0, 0].set_ylim(0, 105)
        drawn.axes[0, 1].margins(y=0.12)
        drawn.legend(ncols=2, **_BELOW)
        drawn.title(_over(frame))
    return drawn.figure


def _host(frame: pd.DataFrame) -> Figure:
    """Table 4: KL and closure for every source and layer set, medians and quartiles."""
    titles = {
        "kl": "KL to the long-persona prompt (nat)",
        "closure": "closure (share of the gap removed)",
    }
    frame = frame.loc[frame["variable"].isin(titles)]
    first = frame["layer_set"].iloc[0]
    frame = frame.loc[(frame["source"] != "none") | (frame["layer_set"] == first)]
    sites = frame.drop_duplicates(["source", "layer_set"])[["source", "layer_set"]]
    sites = sites.assign(place=range(len(sites)))
    sides = _sides(frame)
    palette = sns.color_palette("colorblind", len(sides))
    with panels((9.5, 2.0 + 0.42 * len(sites)), columns=list(titles), sharey=True) as drawn:
        for _, name, axis in drawn:
            for k, (legend, side, rows) in enumerate(sides):
                points = sites.merge(rows.loc[rows["variable"] == name])
                low, value, high = points[[f"{side}_q25", side, f"{side}_q75"]].to_numpy().T
                axis.errorbar(
                    value,
                    points["place"] + dodge(k, len(sides), 0.6),
                    xerr=[value - low, high - value],
                    fmt="o",
                    markersize=5,
                    markerfacecolor="white" if side == "published" else palette[k],
                    capsize=2.5,
                    color=palette[k],
                    label=legend,
                )
            axis.set_xlabel(f"{titles[name]}\nmedian over cells, bar 25–75 %")
            axis.grid(visible=False, axis="y")
        left, right = drawn.axes[0]
        labels = [_source(*site) for site in zip(sites["source"], sites["layer_set"], strict=True)]
        left.set_yticks(range(len(sites)), labels)
        left.set_ylabel("what is injected into the host, where")
        left.invert_yaxis()
        left.set_xlim(left=0)
        right.axvline(0, **_DOTTED)
        drawn.legend(ncols=2, **_BELOW)
        drawn.title(_over(frame))
    return drawn.figure


def _over(frame: pd.DataFrame) -> str:
    row = frame.iloc[0]
    return f"{row['experiment']} · {row['grid']} grid, {row['published_n']} cells"


def _source(source: str, layers: str) -> str:
    """A source and its layer set, as the paper writes it."""
    if source == "none":
        return source
    return f"{source} " + (f"L{layers}" if "," not in layers else "{" + layers + "}")
