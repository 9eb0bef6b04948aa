"""Figures of attention knockout: how far from the clean run, how near to the host."""

import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure

from persona_nns.figures.bands import by_band
from persona_nns.figures.style import (
    DOTTED,
    MEDIANS,
    axis_label,
    draw_medians,
    grid_title,
    long_form,
    panels,
)

#: The title of each family of bands, and what its axis says.
_FAMILIES = {
    "only k": ("single layer", "layer"),
    "0:k": ("layers before k (0:k)", "k"),
    "k:n": ("layers from k on (k:n)", "k"),
}


def kl_by_band(results: xr.Dataset) -> Figure:
    """Median KL from the clean run and from the host against the band of layers.

    Args:
        results: of `attention_knockout`.

    Returns:
        The figure: two rows a model (KL from clean, KL from host), a column a kind of band, a
        colour a choice of blocked queries; dotted, the distance between the two prompts.
    """
    gaps = {"kl": "kl_clean_host", "kl_host": "kl_host_clean"}
    rows = [(model, name) for model in results.model.values.tolist() for name in gaps]
    with panels((11, 0.9 + 2.4 * len(rows)), rows, list(_FAMILIES), sharey="row") as drawn:
        for (model, name), family, axis in drawn:
            of_model = results.sel(model=model)
            frame = by_band(of_model[name])
            of_family = frame.loc[frame["layers"] == family]
            draw_medians(axis, of_family, "layer k", "blocked")
            gap = float(of_model[gaps[name]].median("cell"))
            axis.axhline(gap, **DOTTED, label="clean against host")
            title, layer = _FAMILIES[family]
            if name == "kl":
                title = f"{model}: {title}" if family == "only k" else title
                axis.set_title(title, fontsize="medium")
            axis.set(xlabel=layer if name == "kl_host" else "", ylabel=axis_label(results[name]))
        for axis in drawn.axes[:, 0]:
            axis.set_ylim(bottom=0)  # once all columns that share the axis are drawn
        for axis in drawn.axes[:, 1:].flat:
            axis.set_ylabel("")
        drawn.legend("blocked queries")
        drawn.title(grid_title(results, MEDIANS))
    return drawn.figure


def markers_by_blocked(results: xr.Dataset) -> Figure:
    """Share of continuations with a persona marker under the knockout in all layers.

    Args:
        results: of `attention_knockout`.

    Returns:
        The figure: a bar a choice of blocked queries, a colour a model, with 95 % bootstrap
        intervals over cells.
    """
    frame = long_form(results["any_marker"].astype(float))
    with panels((5.6, 3.2)) as drawn:
        axis = drawn.axes[0, 0]
        sns.barplot(
            frame,
            x="blocked",
            y="value",
            hue="model",
            errorbar=("ci", 95),
            seed=0,
            palette="colorblind",
            ax=axis,
        )
        axis.set(
            ylim=(0, 1),
            xlabel="queries that are kept from the persona",
            ylabel="share with a persona marker",
        )
        axis.legend(title="model")
        drawn.title(grid_title(results, "all layers, interval 95 %"))
    return drawn.figure
