"""Figures of injection controls: the median over cells, with quartiles and range."""

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from persona_nns.figures.style import axis_label


def by_control(results: xr.Dataset, name: str) -> Figure:
    """A variable for each control: point the median, thick line 25–75 %, thin line the range.

    Args:
        results: of `injection_controls`.
        name: ``kl`` or ``closure``.

    Returns:
        The figure: a row a set of layers, a column a model, a colour a source.
    """
    models, layer_sets = results.model.values.tolist(), results.layer_set.values.tolist()
    controls = results.control.values.tolist()
    sources = results.source.values.tolist()
    with sns.axes_style("whitegrid"), sns.plotting_context("paper", font_scale=1.1):
        size = (2.6 + 3.6 * len(models), 1.2 + (0.6 + 0.36 * len(controls)) * len(layer_sets))
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        axes = figure.subplots(
            len(layer_sets), len(models), squeeze=False, sharey=True, sharex="col"
        )
        for row, layer_set in enumerate(layer_sets):
            for column, model in enumerate(models):
                axis = axes[row, column]
                panel = results[name].sel(model=model, layer_set=layer_set)
                for k, source in enumerate(sources):
                    _points(axis, panel.sel(source=source), source, k, len(sources))
                if name == "closure":
                    axis.axvline(0, color="0.4", linewidth=0.8)
                    axis.axvline(1, color="0.4", linestyle=":", linewidth=1.2)
                n_layers = int(results.n_layers.sel(model=model))
                axis.set_title(f"{model}, layer {layer_set} of {n_layers}")
                axis.set_xlabel(axis_label(results[name]) if row == len(layer_sets) - 1 else "")
        axes[0, 0].set_yticks(range(len(controls)), controls)
        axes[0, 0].set_ylim(len(controls) - 0.5, -0.5)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, title="source", loc="outside right center")
        grid, n_cells = results.attrs["grid"], results.sizes["cell"]
        figure.suptitle(
            f"injection_controls · {grid} grid, {n_cells} cells · median, 25–75 %, range",
            fontsize="medium",
        )
    return figure


def _points(axis: Axes, values: xr.DataArray, source: str, index: int, n_sources: int) -> None:
    """The cells of one source, a line for each control."""
    colour = sns.color_palette("colorblind", n_sources)[index]
    shift = 0.5 * ((index + 0.5) / n_sources - 0.5)
    for place, control in enumerate(values.control.values.tolist()):
        cells = values.sel(control=control).values
        cells = cells[~np.isnan(cells)]
        if not cells.size:
            continue
        low, first, median, third, high = np.percentile(cells, [0, 25, 50, 75, 100])
        y = place + shift
        axis.plot([low, high], [y, y], color=colour, linewidth=0.9)
        axis.plot([first, third], [y, y], color=colour, linewidth=3.2)
        label = source if place == 0 else None
        axis.plot(median, y, "oDs^"[index % 4], color=colour, markeredgecolor="white", label=label)
