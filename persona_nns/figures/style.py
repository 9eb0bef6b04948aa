"""What all figures share."""

from typing import Any

import xarray as xr
from matplotlib.figure import Figure

QUARTILES = ("pi", 50)  # 25–75 % of the cells


def axis_label(array: xr.DataArray) -> str:
    """A variable's name with its unit, as it stands on an axis."""
    units = array.attrs.get("units", "1")
    name = array.attrs.get("long_name", array.name)
    return f"{name} ({units})" if units != "1" else str(name)


def one_legend(figure: Figure, axes: Any, title: str) -> None:
    """One legend for all panels, at the right of the figure."""
    handles, labels = axes[0, 0].get_legend_handles_labels()
    for axis in axes.flat:
        if axis.get_legend() is not None:
            axis.get_legend().remove()
    if handles:
        figure.legend(handles, labels, title=title, loc="outside right center")


def panel_title(results: xr.Dataset, model: str) -> str:
    """The title of one model's panel."""
    n_layers = int(results.n_layers.sel(model=model))
    return f"{model} ({n_layers} layers)"


def grid_title(results: xr.Dataset, what: str, separator: str = " · ") -> str:
    """A figure's title: the experiment, its grid and cells, and what is drawn of them."""
    experiment, grid = results.attrs["experiment"], results.attrs["grid"]
    return f"{experiment} · {grid} grid, {results.sizes['cell']} cells{separator}{what}"
