"""Figures of patching: where what a persona does to the answer is restored, and who looks at it."""

from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure

from persona_nns.figures.style import axis_label, long_form, medians, panels

# Pairs that a heatmap shows; of more, those whose answers differ most.
_MOST_PAIRS = 40
_MOST_HEADS = 12
_SHOWN_HEADS = 4
_PAIR = ("clean_persona", "corrupt_persona")
_RECOVERY: dict[str, Any] = {"cmap": "vlag", "vmin": -1.0, "vmax": 1.0, "center": 0.0}
_WHERE = {"all": "all positions", "identity": "the identity only"}


def recovery_by_pair(results: xr.Dataset, position_set: str) -> Figure:
    """Median recovery over questions: a row a pair, a column a layer, a panel a component.

    Args:
        results: of persona_patching.
        position_set: ``all`` or ``identity``.

    Returns:
        The figure: a row of panels a model.
    """
    recovery = medians(results.recovery.sel(position_set=position_set), "question")
    pairs = recovery.stack(pair=_PAIR).dropna("pair", how="all")
    chosen = _clearest(results, pairs.pair.values.tolist())
    pairs = pairs.sel(pair=chosen)
    models, components = results.model.values.tolist(), results.component.values.tolist()
    size = (2.6 + 3.0 * len(components), 1.2 + 0.17 * len(chosen) * len(models))
    with panels(size, models, components, look="white", font_scale=0.9) as drawn:
        for model, component, axis in drawn:
            panel = pairs.sel(model=model, component=component).dropna("layer", how="all")
            frame = pd.DataFrame(
                panel.transpose("pair", "layer").values,
                index=[f"{clean} → {corrupt}" for clean, corrupt in chosen],
                columns=panel.layer.values,
            )
            first = component == components[0]
            sns.heatmap(frame, ax=axis, cbar=False, yticklabels=first, **_RECOVERY)
            axis.set(title=f"{model} · {component}", xlabel="layer")
        drawn.label_outer()
        drawn.colorbar("median recovery over questions", extend="both")
        n = results.sizes["persona"]
        shown = "" if len(chosen) == n * (n - 1) else " (clearest)"
        where = _WHERE[position_set]
        drawn.title(f"Clean persona → corrupt persona{shown}, patched at {where}")
    return drawn.figure


def recovery_by_head(results: xr.Dataset, position_set: str) -> Figure:
    """Median recovery over pairs and questions: a row a layer, a column a head, a panel a model."""
    recovery = results.head_recovery.sel(position_set=position_set)
    values = medians(recovery, [*_PAIR, "question"])
    models, limit = results.model.values.tolist(), max(float(np.abs(values).max()), 1e-6)
    scale = {**_RECOVERY, "vmin": -limit, "vmax": limit}
    with panels((1.4 + 3.2 * len(models), 3.6), columns=models, look="white") as drawn:
        for _, model, axis in drawn:
            panel = values.sel(model=model).dropna("layer", how="all").dropna("head", how="all")
            frame = panel.transpose("layer", "head").to_pandas()
            sns.heatmap(frame, ax=axis, cbar=False, **scale)
            axis.set_title(model)
        drawn.colorbar("median recovery", extend="both")
        drawn.title(f"Heads patched at {_WHERE[position_set]}, over all pairs and questions")
    return drawn.figure


def accuracy_by_persona(results: xr.Dataset) -> Figure:
    """Accuracy of every persona with its 95 % bootstrap interval over questions."""
    models, personas = results.model.values.tolist(), results.persona.values.tolist()
    size = (1.2 + 3.4 * len(models), 1.2 + 0.26 * len(personas))
    errors = np.abs(results.accuracy_interval - results.accuracy).transpose("bound", "persona", ...)
    look: dict[str, Any] = {"color": sns.color_palette("colorblind")[0], "capsize": 2}
    with panels(size, columns=models, sharey=True) as drawn:
        for _, model, axis in drawn:
            accuracy, error = results.accuracy.sel(model=model), errors.sel(model=model)
            axis.errorbar(accuracy, range(len(personas)), xerr=error, fmt="o", **look)
            axis.set_yticks(range(len(personas)), personas)
            axis.set(title=model, xlabel=axis_label(results.accuracy), xlim=(-0.02, 1.02))
        drawn.axes[0, 0].invert_yaxis()
        drawn.title(f"{results.sizes['question']} questions, 95 % interval")
    return drawn.figure


def rank_heads(results: xr.Dataset) -> pd.DataFrame:
    """Heads by how much more they attend to identities than to the control word in that slot.

    Returns:
        A row a head of each model, the clearest first: model, layer, head, attention to the
        identity, attention to the control word, their difference; means over personas and
        questions.
    """
    means = results[["attention", "attention_control"]].mean(["persona", "question"])
    means["difference"] = means.attention - means.attention_control
    heads = means.reset_coords(drop=True).to_dataframe(dim_order=["model", "layer", "head"])
    ranked = heads.dropna(subset="difference").sort_values("difference", ascending=False)
    return ranked.reset_index()


def head_ranking(results: xr.Dataset) -> Figure:
    """The heads that attend to identities most beyond the control word, with both."""
    ranking, models = rank_heads(results), results.model.values.tolist()
    colors = sns.color_palette("colorblind")
    size = (1.4 + 3.4 * len(models), 1.2 + 0.26 * _MOST_HEADS)
    with panels(size, columns=models) as drawn:
        for _, model, axis in drawn:
            top = ranking.loc[ranking["model"] == model].head(_MOST_HEADS)
            place = np.arange(len(top))
            axis.barh(place, top.attention, height=0.4, color=colors[0], label="identity")
            axis.barh(
                place + 0.4, top.attention_control, height=0.4, color=colors[1], label="control"
            )
            labels = [f"L{row['layer']} H{row['head']}" for _, row in top.iterrows()]
            axis.set_yticks(place + 0.2, labels)
            axis.invert_yaxis()
            axis.set(title=model, xlabel="attention from the last prompt token")
        drawn.axes[0, -1].legend(title="word in the slot", loc="lower right")
        drawn.title("Heads by attention to identities beyond the control word")
    return drawn.figure


def attention_before_and_after(results: xr.Dataset, variable: str = "attention") -> Figure:
    """Attention to the identity in the heads that look at it most, by the patched layer.

    Args:
        results: of `persona_patching`.
        variable: ``attention``, or ``attention_value``.
    """
    ranking, models = rank_heads(results), results.model.values.tolist()
    patched = results[f"{variable}_patched"]
    others = patched.clean_persona != patched.corrupt_persona
    size = (1.2 + 2.3 * _SHOWN_HEADS, 1.0 + 2.2 * len(models))
    with panels(size, models, range(_SHOWN_HEADS), font_scale=1.0, sharey="row") as drawn:
        for model, place, axis in drawn:
            ranked = ranking.loc[ranking["model"] == model]
            if place >= len(ranked):
                continue
            layer, head = ranked["layer"].iloc[place], ranked["head"].iloc[place]
            before = results[variable].sel(model=model, layer=layer, head=head)
            after = patched.sel(model=model, attention_layer=layer, attention_head=head)
            sns.lineplot(
                long_form(after.where(others).mean([*_PAIR, "question"])),
                x="layer",
                y="value",
                hue="component",
                style="position_set",
                palette="colorblind",
                markers=True,
                ax=axis,
            )
            axis.axhline(float(before.mean()), color="0.3", linestyle=":", label="unpatched")
            axis.set(title=f"{model}\nL{layer} H{head}", xlabel="patched layer")
            axis.set_ylabel(results[variable].attrs["long_name"])
        drawn.legend()
        drawn.title("Before (dotted) and after patching, mean over pairs and questions")
    return drawn.figure


def _clearest(results: xr.Dataset, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs to show, in their order: all, or those whose logit differences differ most."""
    if len(pairs) <= _MOST_PAIRS:
        return pairs

    def gap(pair: tuple[str, str]) -> float:
        clean, corrupt = (results.ld.sel(persona=persona) for persona in pair)
        return float(np.abs(clean - corrupt).median())

    shown = sorted(pairs, key=gap, reverse=True)[:_MOST_PAIRS]
    return [pair for pair in pairs if pair in shown]
