"""Figures of cartridges: what trained cache slots close of the host gap, by how many there are."""

from typing import Any

import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from persona_nns.figures import seaborn as sns
from persona_nns.figures.style import (
    DOTTED,
    ZERO,
    axis_label,
    draw_medians,
    grid_title,
    long_form,
    medians,
    panels,
)

# What is drawn, by name: the variable and the split of its tasks.
_LINES = {
    "held-out tasks": ("closure", "held_out"),
    "trained tasks": ("closure", "train"),
    "untrained, held-out tasks": ("closure_untrained", "held_out"),
    "another persona's, held-out tasks": ("closure_control", "held_out"),
}
_CLOSURE = "Closure: share of the host's KL to the clean run that is removed."
_FORMS = (
    "graft: the host's cached task and tail stand behind the slots; prefix: both are run again."
)
_PANEL = 3.4  # inches


def cartridge_closure(results: xr.Dataset) -> Figure:
    """Closure against the number of slots, a column of panels a form.

    Args:
        results: of persona_cartridge.

    Returns:
        The figure: a row a model. Lines across are what the whole persona and a residual close.
    """
    models, forms = results.model.values.tolist(), results.form.values.tolist()
    size = 3.4 + _PANEL * len(forms), 1.4 + 2.8 * len(models)
    with panels(size, models, forms, sharey=True) as drawn:
        for model, form, axis in drawn:
            of_model = results.sel(model=model)
            frame = _lines(of_model.sel(form=form))
            draw_medians(axis, frame, "slots", "what")
            _draw_others(axis, of_model)
            _label_slots(axis, of_model)
            axis.axhline(0, **ZERO)
            axis.set(title=f"{model}\n{form}", ylabel="closure")
        drawn.label_outer()
        drawn.legend()
        drawn.title(
            grid_title(results),
            "Lines: medians over personas and tasks; dashed lines: 25 and 75 %, or, of few, dots: "
            "each of them.",
            _CLOSURE,
            _FORMS,
        )
    return drawn.figure


def cartridge_losses(results: xr.Dataset) -> Figure:
    """The training loss against the step, a line a number of slots: medians over personas."""
    models, forms = results.model.values.tolist(), results.form.values.tolist()
    size = 2.6 + _PANEL * len(forms), 1.4 + 2.4 * len(models)
    with panels(size, models, forms, sharey="row") as drawn:
        for model, form, axis in drawn:
            loss = medians(results.loss.sel(model=model, form=form), "persona")
            colours = sns.color_palette("colorblind", loss.sizes["slots"])
            for colour, slots in zip(colours, loss.slots.values.tolist(), strict=True):
                values = loss.sel(slots=slots).values
                axis.plot(loss.step.values, values, label=str(slots), color=colour, linewidth=1.2)
            axis.set(title=f"{model}\n{form}", xlabel="step", ylabel=axis_label(results.loss))
            axis.set_ylim(bottom=0)
        drawn.label_outer()
        drawn.legend("slots")
        drawn.title(grid_title(results), "Medians over personas.", _FORMS)
    return drawn.figure


def _lines(results: xr.Dataset) -> pd.DataFrame:
    """Closures of one model and form by what is drawn, in the order of the legend."""
    frame = pd.concat(
        long_form(results[name].sel(split=split)).assign(what=what)
        for what, (name, split) in _LINES.items()
        if name in results
    )
    frame["what"] = pd.Categorical(frame["what"], list(_LINES), ordered=True)
    return frame


def _draw_others(axis: Axes, results: xr.Dataset) -> None:
    """What the whole persona and a residual close of the held-out tasks."""
    held_out = results.closure.sel(split="held_out").notnull().any(("persona", "form", "slots"))
    whole = results.closure_full_graft.where(held_out)
    oracle = results.closure_oracle.isel(layer_set=0).where(held_out)
    size = float(results.cache_bytes_full_graft.median())
    where = results.layer_set.values[0]
    styles: dict[str, tuple[xr.DataArray, dict[str, Any]]] = {
        f"the whole persona, {_said(size)}": (whole, DOTTED),
        f"residual of p_last, layer {where}": (oracle, {**DOTTED, "linestyle": "-."}),
    }
    for label, (closures, style) in styles.items():
        median = float(medians(closures, ("persona", "task")))
        if median == median:  # there is one
            axis.axhline(median, **style, label=label)


def _label_slots(axis: Axes, results: xr.Dataset) -> None:
    """Numbers of slots with their size, as far apart as their logarithms."""
    slots = results.slots.values.tolist()
    sizes = medians(results.cache_bytes, "persona").values.tolist()
    axis.set_xscale("log", base=2)
    labels = [f"{k}\n{size / 1e3:.3g}" for k, size in zip(slots, sizes, strict=True)]
    axis.set_xticks(slots, labels)
    axis.minorticks_off()
    axis.set_xlabel("slots, and kB of their keys and values")


def _said(n_bytes: float) -> str:
    """A size as it is said."""
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:.3g} kB"
