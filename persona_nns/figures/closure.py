"""Figures of closure: which share of the host gap an intervention removes, by what and where.

Closure is 1 where the host becomes the clean run, 0 where it stays the host, and below 0 where it
moves further away. A dotted line marks the 0.9 that the protocol asks about.
"""

from typing import Any

import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from persona_nns.figures.bands import FAMILIES, by_band
from persona_nns.figures.style import (
    DOTTED,
    axis_label,
    draw_medians,
    grid_title,
    long_form,
    medians,
    panels,
)

ENOUGH = 0.9
_SHARES: dict[str, Any] = {"cmap": "viridis", "vmin": 0, "vmax": 1, "annot": True, "fmt": ".2f"}


def closure_heatmap(results: xr.Dataset) -> Figure:
    """Median closure over cells: each graft in all layers, and the persona's in each layer band.

    Args:
        results: with ``closure`` over model, cell, graft and layer_band.

    Returns:
        The figure: a row a model; at the left a graft a row, at the right the bands by their
        layer. Colours run from 0 to 1.
    """
    closure = medians(results.closure, "cell")
    models, n_layers = results.model.values.tolist(), int(results.n_layers.max())
    size = (4.6 + 0.55 * n_layers, 0.9 + (0.8 + 0.3 * closure.sizes["graft"]) * len(models))
    ratios = {"width_ratios": [1, max(1, 0.8 * n_layers)]}
    with panels(size, models, ["whole", "bands"], look="white", gridspec_kw=ratios) as drawn:
        for model, what, axis in drawn:
            of_model = closure.sel(model=model)
            if what == "whole":
                whole = of_model.sel(layer_band="all", drop=True)
                _heat(axis, whole.to_series().to_frame("all layers"))
                axis.set_title(model)
            else:
                bands = _persona_bands(of_model).pivot(
                    index="layers", columns="layer k", values="value"
                )
                _heat(axis, bands.reindex(FAMILIES, columns=range(n_layers)))
                axis.set(title=f"{model}: persona in a band of layers", xlabel="layer k")
        drawn.label_outer()
        drawn.colorbar("median closure", extend="min", aspect=40)
        drawn.title(grid_title(results, "median over cells"))
    return drawn.figure


def closure_by_graft(results: xr.Dataset) -> Figure:
    """Closure of each cell under each graft in all layers, a panel a model."""
    models = results.model.values.tolist()
    size = (1.6 + 3.4 * len(models), 1.2 + 0.3 * results.sizes["graft"])
    with panels(size, columns=models, sharey=True) as drawn:
        for _, model, axis in drawn:
            frame = long_form(results.closure.sel(model=model, layer_band="all"))
            sns.boxplot(
                frame, x="value", y="graft", ax=axis, color="0.9", fliersize=0, linewidth=0.9
            )
            sns.stripplot(frame, x="value", y="graft", ax=axis, size=3, alpha=0.6, jitter=0.2)
            axis.axvline(ENOUGH, **DOTTED)
            axis.set(title=model, xlabel=axis_label(results.closure), ylabel="graft")
            axis.set_xlim(left=max(-1.0, axis.get_xlim()[0]))
        drawn.label_outer()
        drawn.title(grid_title(results, "all layers; a dot a cell"))
    return drawn.figure


def closure_by_band(results: xr.Dataset) -> Figure:
    """Closure of the persona graft against the layers that carry it: median, band 25–75 %."""
    models = results.model.values.tolist()
    with panels((1.8 + 3.6 * len(models), 3.4), columns=models, sharey=True) as drawn:
        for _, model, axis in drawn:
            frame = _persona_bands(results.closure.sel(model=model))
            draw_medians(axis, frame, "layer k", "layers")
            axis.axhline(ENOUGH, **DOTTED)
            axis.set(title=model, ylabel="closure")
        drawn.title(grid_title(results, "persona span, band 25–75 %"))
    return drawn.figure


def _persona_bands(closure: xr.DataArray) -> pd.DataFrame:
    """The persona graft by band; in all layers it stands beside the bands, not among them."""
    return by_band(closure.sel(graft="persona")).query("layer_band != 'all'")


def _heat(axis: Axes, values: pd.DataFrame) -> None:
    sns.heatmap(values, ax=axis, annot_kws={"size": "x-small"}, cbar=False, **_SHARES)
    axis.tick_params(axis="y", rotation=0)
    axis.set(xlabel="", ylabel="")
