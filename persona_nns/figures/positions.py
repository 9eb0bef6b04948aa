"""Figures of many positions: a map of all of them, and a choice for figures with room for few."""

import numpy as np
import xarray as xr
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from persona_nns.figures.style import (
    axis_label,
    colour_range,
    frame_of,
    grid_title,
    heat,
    left_out,
    medians,
    panel_title,
    panels,
)

#: Positions that a figure with a line or a panel for each has room for.
MOST_POSITIONS = 4


def position_map(results: xr.Dataset, name: str, *, note: str = "") -> Figure | None:
    """Medians of a variable over cells, by layer and position; a row of the figure a model.

    Args:
        results: with dimensions model, cell, layer and position.
        name: the variable.
        note: sentences to add to the caption.

    Returns:
        The figure, the last layer on top; None where there are as few positions as other figures
        have room for.
    """
    positions = results.position.values.tolist()
    if len(positions) <= MOST_POSITIONS:
        return None
    models = results.model.values.tolist()
    shown = medians(results[name], "cell")
    low, high = colour_range(shown)
    n_layers = int(shown.notnull().any(["model", "position"]).sum())
    size = (3.6 + 0.24 * len(positions), 1.9 + (0.6 + 0.22 * max(n_layers, 6)) * len(models))
    with panels(size, rows=models, look="white", sharex=True) as drawn:
        for model, _, axis in drawn:
            panel = shown.sel(model=model).dropna("layer", how="all").clip(min=low)
            table = frame_of(panel.transpose("layer", "position")).iloc[::-1]
            heat(axis, table, cmap="viridis", norm=LogNorm(low, high), xticklabels=1)
            axis.tick_params(axis="x", rotation=90)
            axis.set(title=panel_title(results, model), xlabel="position", ylabel="layer")
        drawn.label_outer()
        drawn.colorbar(axis_label(results[name]), extend="min")
        what = "Median over cells at each layer and position."
        drawn.title(grid_title(results), what, left_out(results, [name]), note)
    return drawn.figure


def few_positions(results: xr.Dataset) -> xr.Dataset:
    """The results at as many positions as a figure has room for: first, last and p_last, say."""
    return results.sel(position=_chosen(results.position.values.tolist()))


def said_of_positions(results: xr.Dataset) -> str:
    """Which positions `few_positions` leaves out, as a caption says it; or nothing."""
    n_positions = results.sizes["position"]
    if n_positions <= MOST_POSITIONS:
        return ""
    return f"{MOST_POSITIONS} of {n_positions} positions are drawn; a map has them all."


def _chosen(positions: list[str]) -> list[str]:
    if len(positions) <= MOST_POSITIONS:
        return positions
    places = np.linspace(0, len(positions) - 1, MOST_POSITIONS).round().astype(int).tolist()
    if "p_last" in positions and (place := positions.index("p_last")) not in places:
        nearest = min(places[1:-1], key=lambda inner: abs(inner - place))
        places[places.index(nearest)] = place
    return [positions[place] for place in sorted(places)]
