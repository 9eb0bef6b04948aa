"""Figures of budgets: how much of the host gap the best parts of a ranking close, and how few do.

Any results with ``closure`` over model, cell, ranking and budget can be drawn, and over ``unit``,
what the parts are, if they have that dimension.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from persona_nns.declarations.budgets import ALL
from persona_nns.figures import seaborn as sns
from persona_nns.figures.intervals import interval
from persona_nns.figures.style import (
    DOTTED,
    MARKERS,
    ZERO,
    axis_label,
    dodge,
    draw_medians,
    frame_of,
    grid_title,
    groups,
    heat,
    long_form,
    medians,
    panel_title,
    panels,
    spread_of,
)
from persona_nns.results.budgets import needed_for

SHARES = (0.5, 0.9)
_CLOSURE = (
    "Closure: share of the host's KL to the clean run that is gone; 1 as the clean run, 0 as the "
    "host."
)
_MAPS: dict[str, Any] = {"cmap": "vlag", "center": 0.0}


def closure_by_budget(results: xr.Dataset) -> Figure:
    """Closure against the budget: a line a ranking, a panel a model and unit.

    Args:
        results: with ``closure`` over model, cell, ranking, budget and, as a rule not, ``unit``.
    """
    closure, models = _ordered(results.closure), results.model.values.tolist()
    units = _units(closure)
    size = (2.4 + 4.2 * len(models), 1.5 + 3.0 * len(units))
    with panels(size, units, models, sharey=True) as drawn:
        for unit, model, axis in drawn:
            panel = _at(closure, unit).sel(model=model).dropna("budget", how="all")
            frame = long_form(panel, "ranking")
            labels = panel.budget.values.tolist()
            frame["place"] = [labels.index(label) for label in frame["budget"]]
            draw_medians(axis, frame, "place", "ranking")
            for share in SHARES:
                axis.axhline(share, **DOTTED)
            axis.axhline(0, **ZERO)
            axis.set(title=_titled(results, model, unit), ylabel=axis_label(closure))
            axis.set_xlabel(f"{_noun(results, units)}, best first")
            axis.xaxis.set_major_locator(FixedLocator(range(len(labels))))
            axis.set_xticks(range(len(labels)), labels)
            axis.set_ylim(max(axis.get_ylim()[0], -1.0), 1.05)
        drawn.label_outer()
        drawn.legend("ranking")
        dots = f"Dotted: closure {' and '.join(map(str, SHARES))}."
        spread = spread_of(results, closure.sizes["ranking"])
        below = "Cut off below −1." if bool((closure < -1).any()) else ""
        drawn.title(grid_title(results), spread, dots, _CLOSURE, below)
    return drawn.figure


def needed_by_persona(results: xr.Dataset) -> Figure:
    """How many parts each persona needs for a closure, by ranking; a row a closure.

    Args:
        results: as for `closure_by_budget`.

    Returns:
        The figure: medians over the tasks of a persona, with 95 % intervals. A curve that falls
        below the closure again counts from where it stays above.
    """
    closure, models = _ordered(results.closure), results.model.values.tolist()
    units, rankings = _units(closure), closure.ranking.values.tolist()
    columns = [(model, unit) for model in models for unit in units]
    measured = closure.dropna("cell", how="all")
    personas = list(dict.fromkeys(measured.persona.values.tolist()))
    colours = sns.color_palette("colorblind", len(rankings))
    size = (2.4 + (1.4 + 0.45 * len(personas)) * len(columns), 1.6 + 2.5 * len(SHARES))
    named: set[str] = set()  # in the legend, once
    with panels(size, SHARES, columns, sharey="col") as drawn:
        for share, (model, unit), axis in drawn:
            panel = _at(closure, unit).sel(model=model).dropna("budget", how="all")
            if not panel.sizes["budget"]:
                continue
            needed = needed_for(panel, share, _sizes(results, panel, unit))
            for k, ranking in enumerate(rankings):
                of_persona = long_form(needed.sel(ranking=ranking))
                for persona, rows in groups(of_persona, "persona"):
                    at = personas.index(persona[0]) + dodge(k, len(rankings), 0.7)
                    look = {"color": colours[k], "marker": MARKERS[k]}
                    look |= {"label": ranking} if ranking not in named else {}
                    named.add(ranking)
                    _draw_needed(axis, at, rows["value"].to_numpy(), **look)
            axis.set_xticks(range(len(personas)), personas, rotation=30, ha="right")
            axis.set(title=_titled(results, model, unit), xlim=(-0.5, len(personas) - 0.5))
            axis.set_ylabel(f"{_noun(results, units)} for closure {share}")
            axis.set_yscale("symlog", base=2, linthresh=1)
            labels = [label for label in panel.budget.values.tolist() if label != ALL]
            axis.yaxis.set_major_locator(FixedLocator([float(label) for label in labels][::2]))
            axis.yaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter("{x:.0f}")
            axis.grid(visible=False, axis="x")
        drawn.label_outer()
        drawn.legend("ranking")
        drawn.title(
            grid_title(results),
            "Median over tasks; bars: 95 % bootstrap interval over them.",
            "Counted is the smallest budget from which the closure stays; no point where all is "
            "not enough.",
        )
    return drawn.figure


def head_maps(results: xr.Dataset) -> Figure:
    """What each head brings: effect beside attribution, a row a layer, a column a head."""
    names = [name for name in ("effect", "attribution") if name in results]
    models = results.model.values.tolist()
    size = (1.8 + 3.0 * len(names), 1.6 + (0.8 + 0.17 * results.sizes["layer"]) * len(models))
    with panels(size, models, names, look="white", font_scale=0.9, sharey=True) as drawn:
        for model, name, axis in drawn:
            values = medians(results[names].sel(model=model).to_array(), "cell")
            limit = float(np.nanmax(np.abs(values), initial=1e-6))
            panel = values.sel(variable=name, drop=True)
            panel = panel.dropna("layer", how="all").dropna("head", how="all")
            frame = frame_of(panel.transpose("layer", "head"))
            heat(axis, frame, vmin=-limit, vmax=limit, **_MAPS)
            axis.set(title=f"{model}\n{name}", xlabel="head", ylabel="layer")
        drawn.label_outer()
        drawn.colorbar("median over cells (nat)")
        said = "KL(none) − KL with the head alone patched, and to first order."
        drawn.title(grid_title(results), said if len(names) > 1 else "")
    return drawn.figure


def _ordered(closure: xr.DataArray) -> xr.DataArray:
    """Budgets from the smallest to the largest; those of several models come mixed."""
    labels = closure.budget.values.tolist()
    return closure.sel(budget=sorted(labels, key=lambda k: (k == ALL, int(k) if k != ALL else 0)))


def _units(closure: xr.DataArray) -> Sequence[str | None]:
    return closure.unit.values.tolist() if "unit" in closure.dims else [None]


def _at(values: xr.DataArray, unit: str | None) -> xr.DataArray:
    return values if unit is None else values.sel(unit=unit)


def _noun(results: xr.Dataset, units: Sequence[str | None]) -> str:
    """What parts are called at an axis that stands for all units."""
    unit = units[0] if len(units) == 1 else "part"
    return f"{unit or ('head' if 'head' in results.dims else 'part')}s".replace("_", " ")


def _titled(results: xr.Dataset, model: str, unit: str | None) -> str:
    return panel_title(results, model) + (f"\n{unit}".replace("_", " ") if unit else "")


def _sizes(results: xr.Dataset, closure: xr.DataArray, unit: str | None) -> xr.DataArray:
    """Parts of each budget, over ``budget`` and, where all are not as many in each, cells.

    All of them are as many as the numbers or bytes that they hold are those of the first.
    """
    names = [name for name in ("values", "cache_bytes") if name in results]
    held = _at(results[names[0]], unit).sel(model=closure.model, budget=closure.budget)
    return held / held.sel(budget="1", drop=True)


def _draw_needed(axis: Axes, at: float, needed: np.ndarray[Any, Any], **look: Any) -> None:
    """The median of some numbers with its interval."""
    middle, (low, high) = float(np.median(needed)), interval(needed)
    error = None if np.isnan(low) else [[middle - low], [high - middle]]
    axis.errorbar([at], [middle], yerr=error, linestyle="", capsize=2, markersize=4, **look)
