"""Figures of a comparison: published and measured numbers on the same axes.

Layers are drawn at their depth (layer / n_layers), so that models of different size line up.
Colours are seaborn's colour-blind palette; published and measured also differ in line and marker.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from persona_nns.published.compare import Matched, Row, distinct, label, records, summarise, where
from persona_nns.published.tables import POSITIONS

REFERENCE = 0.1  # nat, "essentially clean" in the paper
_FLOOR = 1e-5
_PUBLISHED: dict[str, Any] = {"linestyle": "--", "marker": "o", "markerfacecolor": "white"}
_MEASURED: dict[str, Any] = {"linestyle": "-", "marker": "s"}


def compare_figures(matched: Sequence[Matched], frame: pd.DataFrame) -> dict[str, Figure]:
    """The figures of an experiment's comparison by name.

    Args:
        matched: results on every grid that both stores have.
        frame: from `side_by_side`, of all of them.

    Returns:
        Figures, not shown; none for numbers that are neither over layers, conditions nor sources.
    """
    with sns.axes_style("whitegrid"), sns.plotting_context("paper", font_scale=1.1):
        if {"kl", "position"} <= {*frame["variable"], *frame.columns}:
            return {"kl_by_depth": _kl_by_depth(matched)}
        if "condition" in frame:
            return {"markers": _bars(records(frame))}
        if "source" in frame:
            return {"host": _host(records(frame))}
    return {}


def _kl_by_depth(matched: Sequence[Matched]) -> Figure:
    """Figure 1: median KL with quartile bands, a row a grid, a column a model."""
    columns = list(dict.fromkeys(label(r) for m in matched for r in (*m.published, *m.measured)))
    size = (1.3 + 2.7 * len(columns), 1.1 + 2.4 * len(matched))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots(len(matched), len(columns), squeeze=False, sharex=True, sharey=True)
    colours: dict[str, Any] = dict(zip(POSITIONS, sns.color_palette("colorblind"), strict=False))
    for row, results in enumerate(matched):
        n_cells = max(r.sizes["cell"] for r in results.published)
        for column, model in enumerate(columns):
            axis = axes[row, column]
            drawn = [
                _kl_lines(axis, r, colours, published=published)
                for published, group in ((True, results.published), (False, results.measured))
                for r in group
                if label(r) == model
            ]
            axis.axhline(REFERENCE, color="0.35", linestyle=":", linewidth=1.2)
            axis.set_yscale("log")
            if not drawn:
                axis.text(
                    0.5, 0.5, "no results", transform=axis.transAxes, ha="center", color="0.4"
                )
            if row == 0:
                axis.set_title(_brief_model(model))
            if row == len(matched) - 1:
                axis.set_xlabel("depth (layer / layers)")
            if column == 0:
                axis.set_ylabel(f"{results.grid} grid, {n_cells} cells\ncausal KL (nat)")
            axis.set_xlim(0, 1)
    handles = [Line2D([], [], color=colours[p], linewidth=2, label=p) for p in POSITIONS]
    handles += _key()
    handles.append(
        Line2D([], [], color="0.35", linestyle=":", linewidth=1.2, label=f"{REFERENCE:g} nat")
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(
        "KL after additive substitution: median over cells, band 25–75 %", fontsize="medium"
    )
    return figure


def _key() -> list[Line2D]:
    return [
        Line2D([], [], color="0.25", label="published", **_PUBLISHED),
        Line2D([], [], color="0.25", label="measured", **_MEASURED),
    ]


def _kl_lines(axis: Axes, results: xr.Dataset, colours: dict[str, Any], *, published: bool) -> None:
    frame = summarise(results, "kl")
    n_layers = int(results.n_layers.item())
    for position, colour in colours.items():
        rows = frame.loc[frame["position"] == position].sort_values("layer")
        # A median of exactly 0 (an intervention that changes nothing) has no place on a log axis.
        rows = rows.loc[rows["value"] > 0]
        depth = rows["layer"] / n_layers
        look = {**_PUBLISHED, "zorder": 4} if published else _MEASURED
        axis.plot(depth, rows["value"], color=colour, markersize=4, linewidth=1.4, **look)
        low, high = rows["q25"].clip(lower=_FLOOR), rows["q75"]
        axis.fill_between(depth, low, high, color=colour, alpha=0.15, linewidth=0)


def _sides(rows: list[Row]) -> list[tuple[str, str, list[Row]]]:
    """(legend, side, rows) of each published and each measured model."""
    sides: list[tuple[str, str, list[Row]]] = []
    for model in distinct(rows, "model"):
        of_model = where(rows, model=model)
        partners = distinct(of_model, "measured_model")
        alone = where(of_model, measured_model=partners[0])
        sides.append((f"{_brief_model(model)}, published", "published", alone))
        for partner in partners:
            beside = where(of_model, measured_model=partner)
            sides.append((f"{_brief_model(partner)}, measured", "measured", beside))
    return sides


def _brief_model(model: str) -> str:
    return model.rpartition("/")[2]


def _bars(rows: list[Row]) -> Figure:
    """Table 3: share of cells with a marker, and distinct markers, under each condition."""
    panels = [
        ("any_marker", "cells with a persona marker (%)", 100.0),
        ("distinct_markers", "distinct markers in a text (mean)", 1.0),
    ]
    conditions = distinct(rows, "condition")
    sides = _sides(rows)
    palette = sns.color_palette("colorblind", len(sides))
    figure = Figure(figsize=(8.2, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    width = 0.8 / len(sides)
    for axis, (name, title, scale) in zip(axes, panels, strict=True):
        for k, (legend, side, of_side) in enumerate(sides):
            value = {row["condition"]: row[side] for row in where(of_side, variable=name)}
            heights = [scale * value.get(condition, np.nan) for condition in conditions]
            places = np.arange(len(conditions)) + (k - (len(sides) - 1) / 2) * width
            bars = axis.bar(
                places,
                heights,
                width,
                color=palette[k],
                hatch="///" if side == "published" else None,
                edgecolor="white",
                label=legend,
            )
            axis.bar_label(bars, fmt="%.1f" if scale > 1 else "%.2f", fontsize=7, padding=1)
        axis.set_xticks(range(len(conditions)), [c.replace("_", "\n") for c in conditions])
        axis.set_xlabel("condition")
        axis.set_ylabel(title)
        axis.grid(visible=False, axis="x")
    axes[0].set_ylim(0, 105)
    axes[1].margins(y=0.12)
    _legend(figure, axes[0])
    figure.suptitle(_over(rows), fontsize="medium")
    return figure


def _host(rows: list[Row]) -> Figure:
    """Table 4: KL and closure for every source and layer set, medians and quartiles."""
    panels = [
        ("kl", "KL to the long-persona prompt (nat)"),
        ("closure", "closure (share of the gap removed)"),
    ]
    first = rows[0]["layer_set"]
    rows = [row for row in rows if row["source"] != "none" or row["layer_set"] == first]
    order = list(dict.fromkeys((row["source"], row["layer_set"]) for row in rows))
    sides = _sides(rows)
    palette = sns.color_palette("colorblind", len(sides))
    figure = Figure(figsize=(9.5, 2.0 + 0.42 * len(order)), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (name, title) in zip(axes, panels, strict=True):
        for k, (legend, side, of_side) in enumerate(sides):
            known = {(r["source"], r["layer_set"]): r for r in where(of_side, variable=name)}
            there = [(place, known[site]) for place, site in enumerate(order) if site in known]
            values = np.array([row[side] for _, row in there])
            low = values - [row[f"{side}_q25"] for _, row in there]
            high = np.array([row[f"{side}_q75"] for _, row in there]) - values
            shift = (k - (len(sides) - 1) / 2) * 0.6 / len(sides)
            axis.errorbar(
                values,
                [place + shift for place, _ in there],
                xerr=[low, high],
                fmt="o",
                markersize=5,
                markerfacecolor="white" if side == "published" else palette[k],
                capsize=2.5,
                color=palette[k],
                label=legend,
            )
        axis.set_xlabel(f"{title}\nmedian over cells, bar 25–75 %")
        axis.grid(visible=False, axis="y")
    axes[0].set_yticks(range(len(order)), [_source(*site) for site in order])
    axes[0].set_ylabel("what is injected into the host, where")
    axes[0].invert_yaxis()
    axes[0].set_xlim(left=0)
    axes[1].axvline(0, color="0.35", linestyle=":", linewidth=1.2)
    _legend(figure, axes[0])
    figure.suptitle(_over(rows), fontsize="medium")
    return figure


def _legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)


def _over(rows: list[Row]) -> str:
    return f"{rows[0]['experiment']} · {rows[0]['grid']} grid, {rows[0]['published_n']} cells"


def _source(source: str, layers: str) -> str:
    """A source and its layer set, as the paper writes it."""
    if source == "none":
        return source
    return f"{source} " + (f"L{layers}" if "," not in layers else "{" + layers + "}")
