"""Figures of attention knockout: how far from the clean run, how near to the host."""

import xarray as xr
from matplotlib.figure import Figure

from persona_nns.figures.bands import FAMILIES, by_band
from persona_nns.figures.estimates import estimates
from persona_nns.figures.style import (
    DOTTED,
    axis_label,
    draw_medians,
    grid_title,
    medians,
    panels,
    spread_of,
)

_BLOCKED = (
    "Kept from the persona's tokens: last = p_last and what is generated; task = the task's "
    "tokens; later = every position after the persona."
)


def kl_by_band(results: xr.Dataset) -> Figure:
    """Median KL from the clean run and from the host against the band of layers.

    Args:
        results: of `attention_knockout`.

    Returns:
        The figure: two rows a model (KL from clean, KL from host), a column a kind of band, a
        colour a choice of blocked queries; dotted, the distance between the two prompts.
    """
    gaps = {"kl": "kl_clean_host", "kl_host": "kl_host_clean"}
    said = {"kl": "KL(clean ‖ host)", "kl_host": "KL(host ‖ clean)"}
    looks = {"kl": DOTTED, "kl_host": {**DOTTED, "linestyle": "-."}}
    models = results.model.values.tolist()
    rows = [(model, name) for model in models for name in gaps]
    asked = {each for model in models for each in by_band(results.kl.sel(model=model)).layers}
    families = [family for family in FAMILIES if family in asked]
    size = (2.8 + 3.2 * len(families), 1.5 + 2.5 * len(rows))
    with panels(size, rows, families, sharey="row") as drawn:
        for (model, name), family, axis in drawn:
            of_model = results.sel(model=model)
            frame = by_band(of_model[name])
            of_family = frame.loc[frame["layers"] == family]
            draw_medians(axis, of_family.dropna(subset="value"), "layer k", "blocked")
            gap = float(medians(of_model[gaps[name]], "cell"))
            axis.axhline(gap, **looks[name], label=said[name])
            # The same layers in each panel, however few bands there are.
            axis.set_xlim(-0.5, int(of_model.n_layers) + 0.5)
            if name == "kl":
                axis.set_title(f"{model}\n{family}", fontsize="medium")
            axis.set(xlabel="k" if name == "kl_host" else "", ylabel=axis_label(results[name]))
        for axis in drawn.axes[:, 0]:
            axis.set_ylim(bottom=0)  # once all columns that share the axis are drawn
        for axis in drawn.axes[:, 1:].flat:
            axis.set_ylabel("")
        drawn.legend("blocked queries")
        spread = spread_of(results, results.sizes["blocked"])
        gaps_said = (
            "KL(clean ‖ host), the median: nothing of the persona is left; KL(host ‖ clean): "
            "nothing is knocked out."
        )
        drawn.title(grid_title(results), spread, gaps_said, _BLOCKED)
    return drawn.figure


def markers_by_blocked(results: xr.Dataset) -> Figure:
    """Share of continuations with a persona marker under the knockout in all layers.

    Args:
        results: of `attention_knockout`.

    Returns:
        The figure: a column a model, a point a choice of blocked queries, with 95 % intervals.
    """
    note = f"Knocked out in all layers. {_BLOCKED}"
    return estimates(results, {"any_marker": "mean"}, x="blocked", note=note)
