"""Figures of `persona_space`: where roles lie, and whether they differ by more than chance.

What is drawn at one layer is drawn at half of the model's depth.
"""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from persona_nns.figures import seaborn as sns
from persona_nns.figures.labels import name_points
from persona_nns.figures.style import DOTTED, ZERO, dodge, panels

_DEFAULT = "default"
_MOST_RANKED = 50
_SHOWN = 4  # components whose cosines are drawn
_CHANCE = "Chance: 95th percentile of 200 draws in which answers to a question exchange roles."
_BOOTSTRAP = "95 % bootstrap interval over questions"


def role_map(results: xr.Dataset) -> Figure:
    """Roles on the first two components, a panel a model."""
    models = results.model.values.tolist()
    colours = sns.color_palette("colorblind")
    with panels((1.2 + 5.2 * len(models), 5.2), columns=models) as drawn:
        for _, model, axis in drawn:
            at = _middle(results, model)
            if at.sizes["component"] < 2:
                continue
            points = at.loading.isel(component=[0, 1]).dropna("role")
            roles = points.role.values.tolist()
            own = [colours[1] if role == _DEFAULT else colours[0] for role in roles]
            axis.scatter(*points.values.T, s=18, c=own, zorder=3)
            axis.axhline(0, **ZERO)
            axis.axvline(0, **ZERO)
            axis.margins(0.18)
            shares = at.explained.values
            axis.set(
                title=_title(results, model, at),
                xlabel=f"PC1 ({shares[0]:.0%} of the variance between roles)",
                ylabel=f"PC2 ({shares[1]:.0%})",
            )
        drawn.title(
            _named(results),
            "Role means, centred on their mean; the default enters no component, and both "
            "components point towards it.",
        )
        for _, model, axis in drawn:
            at = _middle(results, model)
            if at.sizes["component"] < 2:
                continue
            points = at.loading.isel(component=[0, 1]).dropna("role")
            names = [str(role).replace("_", " ") for role in points.role.values]
            name_points(axis, points.values, names, fontsize=7)
    return drawn.figure


def scree(results: xr.Dataset) -> Figure:
    """Variance and shares of components against chance; a row a model."""
    models = results.model.values.tolist()
    what = ("variance", "components")
    with panels((9.6, 0.9 + 3.0 * len(models)), models, what) as drawn:
        for model, name, axis in drawn:
            of = results.sel(model=model)
            if name == "variance":
                ratio = of.variance / of.variance_null
                axis.plot(of.layer, ratio, marker="o", markersize=3, label="roles")
                axis.axhline(1, **DOTTED, label="by chance (95 %)")
                axis.set(xlabel="layer", ylabel="variance between roles ÷ chance", title=model)
                axis.set_ylim(0, 1.1 * max(1, float(ratio.max())))
                axis.xaxis.set_major_locator(MaxNLocator(integer=True))
                continue
            at = _middle(results, model)
            rank = np.arange(1, at.sizes["component"] + 1)
            axis.plot(rank, at.explained, marker="o", markersize=4, label="roles")
            axis.plot(rank, at.explained_null, **DOTTED, label="by chance (95 %)")
            axis.set(
                xlabel="component",
                ylabel="share of variance",
                title=_title(results, model, at),
            )
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.set_ylim(bottom=0)
        drawn.legend()
        drawn.title(_named(results), _CHANCE)
    return drawn.figure


def role_ranking(results: xr.Dataset) -> Figure:
    """Roles ranked along the axis with their intervals, a panel a model."""
    models = results.model.values.tolist()
    tall = min(results.sizes["role"], _MOST_RANKED)
    with panels((1.0 + 4.4 * len(models), 1.5 + 0.19 * tall), columns=models) as drawn:
        for _, model, axis in drawn:
            at = _middle(results, model)
            at = at.dropna("role", subset=["projection"]).sortby("projection")
            if at.sizes["role"] > _MOST_RANKED:  # the ends
                half = _MOST_RANKED // 2
                ends = np.r_[0:half, at.sizes["role"] - half : at.sizes["role"]]
                at = at.isel(role=ends)
            if not at.sizes["role"]:
                continue
            place = np.arange(at.sizes["role"])
            low, high = (at.projection_interval.sel(bound=bound) for bound in ("low", "high"))
            axis.hlines(place, low, high, color="0.6", linewidth=1.2)
            colours = sns.color_palette("colorblind")
            own = [colours[1] if role == _DEFAULT else colours[0] for role in at.role.values]
            axis.scatter(at.projection, place, s=16, c=own, zorder=3)
            axis.axvline(0, **ZERO)
            names = [str(role).replace("_", " ") for role in at.role.values]
            axis.set_yticks(place, names, fontsize=7)
            axis.set(xlabel="projection on the axis", title=_title(results, model, at))
            axis.grid(visible=False, axis="y")
        left = results.sizes["role"] > _MOST_RANKED
        drawn.title(
            _named(results),
            f"Distance from the mean of the roles towards the default; lines: {_BOOTSTRAP}.",
            f"Of {results.sizes['role']} roles, the {_MOST_RANKED} at the ends." if left else "",
        )
    return drawn.figure


def axis_cosines(results: xr.Dataset) -> Figure:
    """Cosine of the axis with the first components by layer, with intervals; a panel a model."""
    models = results.model.values.tolist()
    n = min(_SHOWN, results.sizes["component"])
    colours = sns.color_palette("colorblind")
    with panels((2.2 + 4.2 * len(models), 3.6), columns=models, sharey=True) as drawn:
        for _, model, axis in drawn:
            of = results.sel(model=model)
            for k in range(n):
                found = of.cos_axis.isel(component=k)
                bounds = of.cos_axis_interval.isel(component=k)
                layer = of.layer.values + dodge(k, n, 0.4)
                low, high = (bounds.sel(bound=bound).values for bound in ("low", "high"))
                look: dict[str, Any] = {"color": colours[k], "zorder": 3 - k / n}
                axis.plot(layer, found, marker="o", markersize=3, label=f"PC{k + 1}", **look)
                axis.vlines(layer, low, high, linewidth=0.9, alpha=0.7, **look)
            axis.axhline(0, **ZERO)
            axis.set(xlabel="layer", ylabel="cosine with the axis", title=model, ylim=(-1.05, 1.05))
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        drawn.label_outer()
        drawn.legend("component")
        said = "Components point towards the default, so that no cosine is below 0"
        drawn.title(_named(results), f"{said}; lines: {_BOOTSTRAP}, which may be.")
    return drawn.figure


def _middle(results: xr.Dataset, model: str) -> xr.Dataset:
    """A model's results at half of its depth."""
    of = results.sel(model=model)
    return of.sel(layer=int(of.n_layers) // 2)


def _title(results: xr.Dataset, model: str, at: xr.Dataset) -> str:
    return f"{model}, layer {int(at.layer)} of {int(results.n_layers.sel(model=model))}"


def _named(results: xr.Dataset) -> str:
    """The experiment, and what the roles are called."""
    return f"{results.attrs['experiment']} · {results.attrs['grid']}"
