"""Figures of closure: which share of the host gap an intervention removes, by what and where.

Closure is 1 where the host becomes the clean run, 0 where it stays the host, and below 0 where it
moves further away. A dotted line marks the 0.9 that the protocol asks about.
"""

from typing import Any

import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from persona_nns.figures import seaborn as sns
from persona_nns.figures.bands import FAMILIES, by_band
from persona_nns.figures.style import (
    DOTTED,
    FEW,
    axis_label,
    draw_medians,
    grid_title,
    heat,
    long_form,
    measured_cells,
    medians,
    panels,
    spread_of,
)

ENOUGH = 0.9
_ENOUGH: dict[str, Any] = {**DOTTED, "label": f"{ENOUGH}: nearly all of the gap"}
_CLOSURE = (
    "Closure: share of the host's KL to the clean run that the graft removes; 1 as the clean run, "
    "0 as the host."
)
_SHARES: dict[str, Any] = {"cmap": "viridis", "vmin": 0, "vmax": 1, "fmt": ".2f"}
_MOST_ANNOTATED = 12  # layers whose numbers have room in their cells
_WIDEST, _NARROWEST = 7.5, 2.5  # inches of all layers


def closure_heatmap(results: xr.Dataset) -> Figure:
    """Median closure over cells: each graft in all layers, and the persona's in each layer band.

    Args:
        results: with ``closure`` over model, cell, graft and layer_band.

    Returns:
        The figure: a row a model; at the left a graft a row, at the right the bands by their
        layer. Colours run from 0 to 1; numbers stand in them where there is room.
    """
    closure = medians(results.closure, "cell")
    models = results.model.values.tolist()
    asked = sorted({k for m in models for k in _persona_bands(closure.sel(model=m))["layer k"]})
    wide = max(min(0.55 * len(asked), _WIDEST), _NARROWEST)
    size = (6.4 + wide, 1.2 + (0.8 + 0.3 * closure.sizes["graft"]) * len(models))
    ratios = {"width_ratios": [0.7, wide]}
    with panels(size, models, ["whole", "bands"], look="white", gridspec_kw=ratios) as drawn:
        for model, what, axis in drawn:
            of_model = closure.sel(model=model)
            if what == "whole":
                whole = of_model.sel(layer_band="all", drop=True)
                frame, title = whole.to_series().to_frame("all layers"), f"{model}\nspans grafted"
            else:
                bands = _persona_bands(of_model).pivot(
                    index="layers", columns="layer k", values="value"
                )
                frame = bands.reindex(FAMILIES, columns=asked)
                title = f"{model}\npersona span in a band of layers"
            annotated = frame.shape[1] <= _MOST_ANNOTATED
            heat(axis, frame, annot=annotated, annot_kws={"size": "x-small"}, **_SHARES)
            axis.set(title=title, xlabel="" if what == "whole" else "layer k", ylabel="")
        drawn.label_outer()
        drawn.colorbar("median closure", extend="min", aspect=40)
        below = "What is below 0 has the colour of 0." if bool((closure < 0).any()) else ""
        drawn.title(grid_title(results), "Median over cells.", _CLOSURE, below)
    return drawn.figure


def closure_by_graft(results: xr.Dataset) -> Figure:
    """Closure of each cell under each graft in all layers, a panel a model."""
    models = results.model.values.tolist()
    size = (3.2 + 3.4 * len(models), 1.7 + 0.3 * results.sizes["graft"])
    boxed, hidden = False, 0
    with panels(size, columns=models, sharey=True) as drawn:
        for _, model, axis in drawn:
            frame = long_form(results.closure.sel(model=model, layer_band="all"))
            if measured_cells(results)[model] >= FEW:
                boxed = True
                look: dict[str, Any] = {"color": "0.9", "fliersize": 0, "linewidth": 0.9}
                sns.boxplot(frame, x="value", y="graft", ax=axis, **look)
            sns.stripplot(frame, x="value", y="graft", ax=axis, size=3, alpha=0.6, jitter=0.2)
            axis.axvline(ENOUGH, **_ENOUGH)
            axis.set(title=model, xlabel=axis_label(results.closure), ylabel="graft")
            left = max(-1.0, axis.get_xlim()[0])
            axis.set_xlim(left=left)
            hidden += sum(frame["value"] < left)
        drawn.label_outer()
        drawn.legend()
        box = "a box: quartiles and median; " if boxed else ""
        outside = f"Not shown: {hidden} cells below −1." if hidden else ""
        said = f"Grafted in all layers; {box}a dot: a cell."
        drawn.title(grid_title(results), said, _CLOSURE, outside)
    return drawn.figure


def closure_by_band(results: xr.Dataset) -> Figure:
    """Closure of the persona graft against the layers that carry it: median and quartiles."""
    models = results.model.values.tolist()
    with panels((3.8 + 3.6 * len(models), 3.8), columns=models, sharey=True) as drawn:
        for _, model, axis in drawn:
            frame = _persona_bands(results.closure.sel(model=model))
            draw_medians(axis, frame, "layer k", "layers")
            axis.axhline(ENOUGH, **_ENOUGH)
            axis.set(title=model, ylabel="closure")
        drawn.label_outer()
        drawn.legend("persona span in")
        drawn.title(grid_title(results), spread_of(results, len(FAMILIES)), _CLOSURE)
    return drawn.figure


def _persona_bands(closure: xr.DataArray) -> pd.DataFrame:
    """The persona graft by band; in all layers it stands beside the bands, not among them."""
    return by_band(closure.sel(graft="persona")).query("layer_band != 'all'")
