"""Figures of injection controls: the median over cells, with quartiles and range."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from persona_nns.figures import seaborn as sns
from persona_nns.figures.style import (
    DOTTED,
    FEW,
    MARKERS,
    ZERO,
    axis_label,
    dodge,
    grid_title,
    measured_cells,
    panels,
)

_CLOSURE = "Closure is measured from each control's own host."


def by_control(results: xr.Dataset, name: str) -> Figure:
    """A variable for each control: point the median, thick line 25–75 %, thin line the range.

    Fewer than four cells are dots in place of the quartiles.

    Args:
        results: of `injection_controls`.
        name: ``kl`` or ``closure``.

    Returns:
        The figure: a row a set of layers, a column a model, a colour a source.
    """
    models, layer_sets = results.model.values.tolist(), _measured_sets(results[name])
    controls = results.control.values.tolist()
    size = (3.4 + 3.6 * len(models), 1.6 + (0.6 + 0.36 * len(controls)) * len(layer_sets))
    with panels(size, layer_sets, models, sharey=True, sharex="col") as drawn:
        for layer_set, model, axis in drawn:
            _points(axis, results[name].sel(model=model, layer_set=layer_set))
            if name == "closure":
                axis.axvline(0, **ZERO, label="0: as the host")
                axis.axvline(1, **DOTTED, label="1: as the long persona")
            n_layers = int(results.n_layers.sel(model=model))
            title = f"{model}, layer {layer_set} of {n_layers}"
            axis.set(title=title, xlabel=axis_label(results[name]))
        drawn.axes[0, 0].set_yticks(range(len(controls)), controls)
        drawn.axes[0, 0].set_ylim(len(controls) - 0.5, -0.5)
        drawn.label_outer()
        drawn.legend("source")
        if name != "closure":
            for axis in drawn.axes[:, 0]:
                axis.set_xlim(left=min(0.0, axis.get_xlim()[0]))
        few = max(measured_cells(results).values(), default=0) < FEW
        spread = "small dots: the cells" if few else "thick line: 25–75 %; thin line: the range"
        said = f"Large marker: median over cells; {spread}."
        drawn.title(grid_title(results), said, _CLOSURE if name == "closure" else "")
    return drawn.figure


def _measured_sets(values: xr.DataArray) -> list[str]:
    # Where one model is chosen of several, the sets of the others hold no number.
    sets = values.layer_set.values.tolist()
    return [each for each in sets if values.sel(layer_set=each).notnull().any()] or sets


def _points(axis: Axes, values: xr.DataArray) -> None:
    """The cells of each control, a colour a source."""
    sources = values.source.values.tolist()
    for k, source in enumerate(sources):
        colour = sns.color_palette("colorblind", len(sources))[k]
        label: str | None = source
        for place, control in enumerate(values.control.values.tolist()):
            cells = values.sel(source=source, control=control).dropna("cell")
            if not cells.size:
                continue
            low, first, median, third, high = np.percentile(cells, [0, 25, 50, 75, 100])
            y = place + dodge(k, len(sources))
            if cells.size < FEW:
                axis.scatter(cells, [y] * cells.size, s=7, color=colour, alpha=0.6)
            else:
                axis.plot([low, high], [y, y], color=colour, linewidth=0.9)
                axis.plot([first, third], [y, y], color=colour, linewidth=3.2)
            look = {"color": colour, "markeredgecolor": "white", "markersize": 6}
            axis.plot(median, y, MARKERS[k % len(MARKERS)], **look, label=label)
            label = None  # once in the legend
