"""Every way to bring a persona to a host on one axis: closure against the bytes that are put in."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from persona_nns.figures import seaborn as sns
from persona_nns.figures.kv_budgets import by_bytes
from persona_nns.figures.style import MARKERS, ZERO, panels
from persona_nns.results.attributes import read_attribute

# Bytes of a number by the name of a precision.
_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
_UNITS = {"layer_head": "key-value heads", "token": "tokens"}
_GRAFTS = {"persona": "whole persona grafted", "additive": "additive keys and values"}
#: A method: what it is called, and closures with their bytes.
Method = tuple[str, pd.DataFrame]


def methods_by_bytes(experiments: Mapping[str, xr.Dataset]) -> Figure:
    """Closure of every method against what it puts into the host, a panel a model.

    Budgets of `kv_budget`, the grafts of the whole persona and of additive keys and values of
    `kv_graft`, the residual itself at the layers of a set (``oracle`` of `host_injection`), and the
    trained slots of `persona_cartridge` on tasks that they were not trained on.

    Args:
        experiments: results by the name of their experiment, those that there are; the models are
            those of `kv_budget`, and so are the cells, where the others have them.

    Returns:
        The figure: medians, and bars from 25 to 75 %, over cells.
    """
    budgets = experiments["kv_budget"]
    models = budgets.model.values.tolist()
    with panels((4.6 + 4.0 * len(models), 4.6), columns=models, sharey=True) as drawn:
        for _, model, axis in drawn:
            methods = [
                method
                for name, read in _READ.items()
                if name in experiments and model in experiments[name].model
                for method in read(_shared(experiments[name], budgets, model))
            ]
            colours = sns.color_palette("colorblind", max(len(methods), 1))
            for k, (label, frame) in enumerate(methods):
                _draw(axis, label, frame, MARKERS[k % len(MARKERS)], colours[k])
            axis.axhline(0, **ZERO)
            axis.set_xscale("log")
            axis.set(title=model, xlabel="bytes put into the host", ylabel="closure")
            axis.set_ylim(bottom=max(axis.get_ylim()[0], -1))
        drawn.label_outer()
        drawn.legend()
        drawn.title(
            f"What carries a persona · {budgets.attrs['grid']} grid",
            "Closure: share of the host's KL to the clean run that is removed. Points: median over "
            "cells; bars: 25 and 75 %. Bytes: median over cells, in the model's precision; a "
            "residual's are those of one token at each layer of a set.",
        )
    return drawn.figure


def _shared(results: xr.Dataset, budgets: xr.Dataset, model: str) -> xr.Dataset:
    """One model's results, in the cells (or of the personas) that kv_budget has measured too."""
    done = budgets.completed.sel(model=model)
    own, width = results.sel(model=model), read_attribute(results, "d_model")
    if isinstance(width, list):  # of several models
        own = own.assign_attrs(d_model=width[results.model.values.tolist().index(model)])
    if "cell" in own.dims:
        cells = budgets.cell[done.values].values
        shared = [cell for cell in own.cell.values if cell in cells]
        return own.sel(cell=shared) if shared else own
    personas = set(budgets.persona[done.values].values)
    shared = [persona for persona in own.persona.values if persona in personas]
    return own.sel(persona=shared) if shared else own


def _of_budgets(results: xr.Dataset) -> Iterator[Method]:
    """Each unit, the parts in the order of their effect, or of the first ranking that there is."""
    for unit in results.unit.values.tolist():
        rankings = results.ranking.values.tolist()
        ranking = "effect" if "effect" in rankings else rankings[0]
        frame = by_bytes(results.sel(unit=unit, ranking=[ranking]))
        yield f"{_UNITS[unit]}, best by {ranking.replace('_', ' ')}", frame


def _of_grafts(results: xr.Dataset) -> Iterator[Method]:
    whole = results.sel(layer_band="all")
    for graft, label in _GRAFTS.items():
        if graft in whole.graft:
            of = whole.sel(graft=graft)
            kept = float(np.nanmedian(of.cache_bytes.astype(float)))
            yield label, _frame(of.closure, kept)


def _of_injection(results: xr.Dataset) -> Iterator[Method]:
    size = int(results.attrs["d_model"]) * _ITEMSIZE[str(results.precision.values)]
    oracle = results.closure.sel(source="oracle")
    sets = oracle.layer_set.values.tolist()
    frames = [_frame(oracle.sel(layer_set=s), size * len(str(s).split(","))) for s in sets]
    yield "residual itself (oracle)", pd.concat(frames)


def _of_cartridges(results: xr.Dataset) -> Iterator[Method]:
    for form in results.form.values.tolist():
        held_out = results.closure.sel(form=form, split="held_out")
        kept = results.cache_bytes.astype(float).median("persona")
        slots = results.slots.values.tolist()
        frames = [_frame(held_out.sel(slots=k), float(kept.sel(slots=k))) for k in slots]
        yield f"cartridge ({form}), tasks held out", pd.concat(frames)


_READ: dict[str, Callable[[xr.Dataset], Iterator[Method]]] = {
    "kv_budget": _of_budgets,
    "kv_graft": _of_grafts,
    "host_injection": _of_injection,
    "persona_cartridge": _of_cartridges,
}


def _frame(closure: xr.DataArray, size: float) -> pd.DataFrame:
    """Closures that so many bytes give."""
    values = closure.values.ravel()
    return pd.DataFrame({"bytes": size, "value": values}).dropna()


def _draw(axis: Axes, label: str, frame: pd.DataFrame, marker: str, colour: Any) -> None:
    """Medians with bars from 25 to 75 %, joined by a line."""
    if frame.empty:
        return
    by_size = frame.groupby("bytes")["value"]
    low, middle, high = (by_size.quantile(share) for share in (0.25, 0.5, 0.75))
    axis.errorbar(
        middle.index.to_numpy(dtype=float),
        middle.to_numpy(),
        yerr=[(middle - low).to_numpy(), (high - middle).to_numpy()],
        label=label,
        marker=marker,
        color=colour,
        elinewidth=0.8,
        capsize=2,
        markersize=5,
    )
