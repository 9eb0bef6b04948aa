"""Figures of closure: which share of the host gap an intervention removes, by what and where.

Closure is 1 where the host becomes the clean run, 0 where it stays the host, and below 0 where it
moves further away. A dotted line marks the 0.9 that the protocol asks about.
"""

import re

import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from persona_nns.figures.style import QUARTILES, axis_label, grid_title

ENOUGH = 0.9
_SPAN = re.compile(r"(?P<first>\d+)(?::(?P<stop>\d+))?")


def closure_heatmap(results: xr.Dataset) -> Figure:
    """Median closure over cells: each graft in all layers, and the persona's in each layer band.

    Args:
        results: with ``closure`` over model, cell, graft and layer_band.

    Returns:
        The figure: a row a model; at the left a graft a row, at the right the bands by their
        layer. Colours run from 0 to 1.
    """
    medians = _medians(results)
    models = medians.model.values.tolist()
    n_layers = int(results.n_layers.max())
    with sns.axes_style("white"), sns.plotting_context("paper", font_scale=1.1):
        height = 0.9 + (0.8 + 0.3 * medians.sizes["graft"]) * len(models)
        figure = Figure(figsize=(4.6 + 0.55 * n_layers, height), dpi=150, layout="constrained")
        ratios = {"width_ratios": [1, max(1, 0.8 * n_layers)]}
        axes = figure.subplots(len(models), 2, squeeze=False, gridspec_kw=ratios)
        for row, model in enumerate(models):
            panel = medians.sel(model=model)
            whole = panel.sel(layer_band="all", drop=True).to_series().to_frame("all layers")
            _heat(axes[row, 0], whole)
            axes[row, 0].set_title(model)
            _heat(axes[row, 1], _by_layer(panel))
            axes[row, 1].set_title(f"{model}: persona in a band of layers")
            axes[row, 1].set_xlabel("layer k" if row == len(models) - 1 else "")
        figure.colorbar(
            axes[0, 0].collections[0], ax=axes, label="median closure", extend="min", aspect=40
        )
        figure.suptitle(grid_title(results, "median over cells"), fontsize="medium")
    return figure


def closure_by_graft(results: xr.Dataset) -> Figure:
    """Closure of each cell under each graft in all layers, a panel a model."""
    models = results.model.values.tolist()
    with sns.axes_style("whitegrid"), sns.plotting_context("paper", font_scale=1.1):
        size = (1.6 + 3.4 * len(models), 1.2 + 0.3 * results.sizes["graft"])
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        axes = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
        for axis, model in zip(axes, models, strict=True):
            closure = results.closure.sel(model=model, layer_band="all", drop=True)
            frame = closure.rename("closure").to_dataframe().reset_index()
            sns.boxplot(
                frame, x="closure", y="graft", ax=axis, color="0.9", fliersize=0, linewidth=0.9
            )
            sns.stripplot(frame, x="closure", y="graft", ax=axis, size=3, alpha=0.6, jitter=0.2)
            axis.axvline(ENOUGH, color="0.4", linestyle=":", linewidth=1.2)
            axis.set_title(model)
            axis.set_xlabel(axis_label(results.closure))
            axis.set_ylabel("graft" if axis is axes[0] else "")
            axis.set_xlim(left=max(-1.0, axis.get_xlim()[0]))
        figure.suptitle(grid_title(results, "all layers; a dot a cell"), fontsize="medium")
    return figure


def closure_by_band(results: xr.Dataset) -> Figure:
    """Closure of the persona graft against the layers that carry it: median, band 25–75 %."""
    models = results.model.values.tolist()
    with sns.axes_style("whitegrid"), sns.plotting_context("paper", font_scale=1.1):
        size = (1.8 + 3.6 * len(models), 3.4)
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        axes = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
        for axis, model in zip(axes, models, strict=True):
            frame = _band_frame(results.sel(model=model))
            sns.lineplot(
                frame,
                x="layer k",
                y="closure",
                hue="layers",
                style="layers",
                markers=True,
                dashes=False,
                estimator=np.median,
                errorbar=QUARTILES,
                palette="colorblind",
                ax=axis,
            )
            axis.axhline(ENOUGH, color="0.4", linestyle=":", linewidth=1.2)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.set_title(model)
        figure.suptitle(grid_title(results, "persona span, band 25–75 %"), fontsize="medium")
    return figure


FAMILIES = ("only k", "0:k", "k:n")


def place_band(label: str, n_layers: int) -> list[tuple[str, int]]:
    """Where a band stands in a figure: its family and its layer k, for each family it belongs to.

    Args:
        label: of a layer band (`declarations.bands`); ``all`` is ``0:n`` and ``n:n`` minus
            nothing, and stands at no layer.
        n_layers: of the model.
    """
    match = _SPAN.fullmatch(label)
    if match is None:
        return []
    first = int(match["first"])
    if match["stop"] is None:
        both_ends = [("0:k", 1)] if first == 0 else []
        both_ends += [("k:n", first)] if first == n_layers - 1 else []
        return [("only k", first), *both_ends]
    return [("0:k", int(match["stop"]))] if first == 0 else [("k:n", first)]


def _by_layer(panel: xr.DataArray) -> pd.DataFrame:
    """Medians of the persona graft, a row a family of bands, a column a layer."""
    n_layers = int(panel.n_layers)
    rows = {family: {} for family in FAMILIES}
    persona = panel.sel(graft="persona")
    for label in panel.layer_band.values.tolist():
        for family, layer in place_band(label, n_layers):
            rows[family][layer] = float(persona.sel(layer_band=label))
    return pd.DataFrame(rows).T.sort_index(axis=1)


def _band_frame(results: xr.Dataset) -> pd.DataFrame:
    """Closure of the persona graft in each cell, a row a cell and band."""
    persona = results.closure.sel(graft="persona").dropna("layer_band", how="all")
    rows = [
        {"layers": family, "layer k": layer, "closure": closure}
        for label in persona.layer_band.values.tolist()
        for family, layer in place_band(label, int(results.n_layers))
        for closure in persona.sel(layer_band=label).values.tolist()
    ]
    frame = pd.DataFrame(rows, columns=["layers", "layer k", "closure"])
    frame["layers"] = pd.Categorical(frame["layers"], categories=FAMILIES, ordered=True)
    return frame.dropna(subset="closure")


def _medians(results: xr.Dataset) -> xr.DataArray:
    """Median over cells; NaN where nothing was measured."""
    present = results.closure.notnull().any("cell")
    return results.closure.fillna(0).where(results.closure.notnull()).median("cell").where(present)


def _heat(axis: Axes, values: pd.DataFrame) -> None:
    sns.heatmap(
        values,
        ax=axis,
        cmap="viridis",
        vmin=0,
        vmax=1,
        annot=True,
        fmt=".2f",
        annot_kws={"size": "x-small"},
        cbar=False,
    )
    axis.tick_params(axis="y", rotation=0)
    axis.set_xlabel("")
    axis.set_ylabel("")
