"""Figures of kv_budget: which tokens and heads carry a persona, and how far so many bytes go."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from persona_nns.figures.style import (
    ZERO,
    draw_medians,
    frame_of,
    grid_title,
    heat,
    long_form,
    medians,
    panels,
    spread_of,
)

UNITS = {"layer_head": "key-value heads of layers", "token": "tokens of the persona"}
# Characters in a line of a persona's text, and what one takes, in inches.
_LINE, _CHARACTER, _HEIGHT = 84, 0.078, 0.21
_NO_GAP = 1e-6  # nats
# A share of the gap within which colours are proportional; beyond, a token that does almost all
# would leave the others pale.
_SMALL = 0.01
_INVISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥"})
_CLOSURE = "Closure: share of the host's KL to the clean run that is removed."
_MAPS = {"effect": ("effect (nat)", "vlag"), "attention": ("attention", "viridis")}


def persona_tokens(results: xr.Dataset) -> Figure | None:
    """The text of each persona, its tokens coloured by their effect.

    Args:
        results: of kv_budget.

    Returns:
        The figure; None where no effect of a token was measured.
    """
    if "token_effect" not in results:
        return None
    share = results.token_effect / results.kl_none.where(results.kl_none > _NO_GAP)
    texts = {model: list(_personas(results, share, model)) for model in results.model.values}
    shares = [value for each in texts.values() for _, _, of in each for value in of]
    limit = float(np.nanmax(np.abs(shares), initial=1e-6))
    scale = ScalarMappable(SymLogNorm(_SMALL, vmin=-limit, vmax=limit), "vlag")
    lines = [sum(_n_lines(of) + 1.6 for _, of, _ in each) or 1 for each in texts.values()]
    size = (1.6 + _LINE * _CHARACTER, 1.6 + _HEIGHT * (sum(lines) + 1.5 * len(lines)))
    settings: dict[str, Any] = {"height_ratios": lines}
    with panels(size, list(texts), look="white", gridspec_kw=settings) as drawn:
        for model, _, axis in drawn:
            _write(axis, texts[model], scale)
            axis.set_title(model)
        label = "share of the gap that comes back without it"
        drawn.figure.colorbar(scale, ax=drawn.axes, label=label, aspect=30, format="%g")
        drawn.title(
            grid_title(results),
            "A token's colour: (KL with the persona without it − KL with all of it) / KL of the "
            "host, the persona's keys and values grafted into the host; median over tasks. Red "
            "tokens carry the persona, blue ones are better left out. Beyond "
            f"±{_SMALL}, colours are logarithmic.",
        )
    return drawn.figure


def closure_by_bytes(results: xr.Dataset) -> Figure:
    """Closure against the bytes that are kept: a row a unit, a column a model, a line a ranking."""
    models, units = results.model.values.tolist(), results.unit.values.tolist()
    size = (4.2 + 3.4 * len(models), 1.8 + 2.5 * len(units))
    with panels(size, units, models, sharey=True, sharex=True) as drawn:
        for unit, model, axis in drawn:
            frame = by_bytes(results.sel(model=model, unit=unit))
            draw_medians(axis, frame, "bytes", "ranking")
            axis.axhline(0, **ZERO)
            axis.set_xscale("log")
            axis.set(title=f"{model} · {UNITS[unit]}", ylabel="closure", xlabel="bytes kept")
            axis.set_ylim(bottom=max(axis.get_ylim()[0], -1))
        drawn.label_outer()
        drawn.legend("best parts by")
        drawn.title(
            grid_title(results),
            spread_of(results, results.sizes["ranking"]),
            _CLOSURE,
            "Bytes: of the persona's keys and values in the host, median over cells; a budget of "
            "none is not drawn.",
        )
    return drawn.figure


def by_bytes(results: xr.Dataset) -> pd.DataFrame:
    """A row a closure of one model and unit, with the ``bytes`` of its budget, median over cells.

    A budget that no cell has parts for, beyond the one that is all of them, is left out.
    """
    kept = medians(results.cache_bytes.astype(float).where(results.completed), "cell")
    sizes = dict(zip(kept.budget.values.tolist(), kept.values.tolist(), strict=True))
    last = {size: budget for budget, size in sizes.items() if size > 0}
    shown = results.closure.sel(budget=[budget for budget in sizes if budget in last.values()])
    frame = long_form(shown, "ranking")
    frame["bytes"] = [sizes[budget] for budget in frame["budget"]]
    return frame


def kv_head_maps(results: xr.Dataset) -> Figure | None:
    """Layers × key-value heads: what each does alone, and how much looks at the persona through it.

    Args:
        results: of kv_budget.

    Returns:
        The figure, medians over cells; None where heads were not measured.
    """
    names = [name for name in _MAPS if name in results]
    if not names:
        return None
    models = results.model.values.tolist()
    n_heads, n_layers = results.sizes["kv_head"], results.sizes["layer"]
    size = (1.4 + max(1.9, 0.34 * n_heads + 1.2) * len(names), 1.7 + 0.17 * max(n_layers, 10))
    with panels((size[0], size[1] * len(models)), models, names, look="white") as drawn:
        for model, name, axis in drawn:
            values = medians(results[name].sel(model=model), "cell")
            values = values.dropna("layer", how="all").dropna("kv_head", how="all")
            label, colours = _MAPS[name]
            limit = float(np.nanmax(np.abs(values), initial=1e-6))
            low = -limit if colours == "vlag" else 0
            look: dict[str, Any] = {"vmin": low, "vmax": limit, "cmap": colours}
            heat(axis, frame_of(values.transpose("layer", "kv_head")), **look)
            axis.set(title=f"{model}\n{label}", xlabel="key-value head", ylabel="layer")
            if axis.collections:
                drawn.figure.colorbar(axis.collections[0], ax=axis, shrink=0.6, aspect=25)
        drawn.label_outer()
        said = "Effect: KL of the host − KL with the persona in that head alone. Median over cells."
        drawn.title(grid_title(results), said)
    return drawn.figure


def _personas(
    results: xr.Dataset, share: xr.DataArray, model: str
) -> Iterator[tuple[str, list[str], list[float]]]:
    """Each measured persona: its name, its tokens, and their median share over tasks."""
    personas = dict.fromkeys(results.persona.values.tolist())
    for persona in personas:
        own = (results.persona == persona) & results.completed.sel(model=model)
        if not bool(own.any()):
            continue
        cells = results.cell[own.values]
        texts = results.token_text.sel(model=model, cell=cells).values
        tokens = [text for text in texts[0].tolist() if text]
        same = cells[[row.tolist() == texts[0].tolist() for row in texts]]
        values = medians(share.sel(model=model, cell=same), "cell").values[: len(tokens)]
        yield persona, tokens, values.tolist()


def _n_lines(tokens: Sequence[str]) -> int:
    return 1 + max(line for line, *_ in _places(tokens))


def _places(tokens: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """Line and column of each token, and what is shown of it."""
    line = column = 0
    for token in tokens:
        shown = token.translate(_INVISIBLE) if token.strip(" ") else "␣" * len(token)
        if column and column + len(shown) > _LINE:
            line, column = line + 1, 0
        yield line, column, shown
        column += len(shown)


def _write(
    axis: Axes, personas: Sequence[tuple[str, list[str], list[float]]], scale: ScalarMappable
) -> None:
    """Write personas below each other, each token on its colour."""
    top = 0.0
    for persona, tokens, values in personas:
        axis.text(0, top + 0.5, persona, va="center", fontsize="small", fontweight="bold")
        for (line, column, shown), value in zip(_places(tokens), values, strict=True):
            y, width = top + 1 + line, len(shown)
            colour = scale.to_rgba(np.array([value]))[0]
            box: dict[str, Any] = {"facecolor": colour, "edgecolor": "white", "lw": 0.8}
            axis.add_patch(Rectangle((column, y + 0.06), width, 0.88, **box))
            dark = np.dot(colour[:3], (0.3, 0.59, 0.11)) < 0.5
            axis.text(
                column + width / 2,
                y + 0.5,
                shown.strip(" ") or shown,
                ha="center",
                va="center",
                family="monospace",
                fontsize=7.5,
                color="white" if dark else "black",
            )
        top += _n_lines(tokens) + 1.6
    axis.set(xlim=(0, _LINE), ylim=(max(top, 1), 0), xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_visible(False)
