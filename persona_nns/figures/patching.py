"""Figures of patching: where what a persona does to the answer is restored, and who looks at it."""

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from persona_nns.figures import seaborn as sns
from persona_nns.figures.intervals import share_interval
from persona_nns.figures.style import (
    DOTTED,
    Panels,
    axis_label,
    frame_of,
    heat,
    long_form,
    medians,
    panels,
    say_in,
)

# Pairs that a heatmap shows; of more, those whose answers differ most.
_MOST_PAIRS = 40
_MOST_HEADS = 12
_SHOWN_HEADS = 4
_PAIR = ("clean_persona", "corrupt_persona")
_RECOVERY: dict[str, Any] = {"cmap": "vlag", "vmin": -1.0, "vmax": 1.0, "center": 0.0}
_WHERE = {"all": "all positions", "identity": "the identity only"}
_MEANT = (
    "Recovery: share of the way from the corrupt persona's to the clean persona's answer that "
    "patching goes; 1 is all of it."
)


def recovery_by_pair(results: xr.Dataset, position_set: str) -> Figure:
    """Median recovery over questions: a row a pair, a column a layer, a panel a component.

    Args:
        results: of persona_patching.
        position_set: ``all`` or ``identity``.

    Returns:
        The figure: a row of panels a model.
    """
    if none_right(results):
        return _without_answers(results)
    recovery = medians(results.recovery.sel(position_set=position_set), "question")
    pairs = recovery.stack(pair=_PAIR).dropna("pair", how="all")
    n_pairs = pairs.sizes["pair"]
    chosen = _clearest(results, pairs.pair.values.tolist())
    pairs = pairs.sel(pair=chosen)
    models, components = results.model.values.tolist(), results.component.values.tolist()
    size = (2.8 + 3.0 * len(components), 1.9 + (0.9 + 0.17 * len(chosen)) * len(models))
    with panels(size, models, components, look="white", font_scale=0.9) as drawn:
        for model, component, axis in drawn:
            panel = pairs.sel(model=model, component=component).dropna("layer", how="all")
            frame = pd.DataFrame(
                panel.transpose("pair", "layer").values,
                index=[f"{clean} → {corrupt}" for clean, corrupt in chosen],
                columns=panel.layer.values,
            )
            first = component == components[0]
            heat(axis, frame, yticklabels=1 if first else False, **_RECOVERY)
            axis.set(title=f"{model} · {component}", xlabel="layer")
        drawn.label_outer()
        drawn.colorbar("median recovery", extend="both")
        shown = ""
        if len(chosen) < n_pairs:
            shown = f" Of {n_pairs} pairs, the {len(chosen)} whose answers differ most."
        said = f"Rows: clean persona → corrupt persona. Median over questions.{shown}"
        drawn.title(f"{_asked(results)}, patched at {_WHERE[position_set]}", said, _MEANT)
    return drawn.figure


def recovery_by_head(results: xr.Dataset, position_set: str) -> Figure:
    """Median recovery over pairs and questions: a row a layer, a column a head, a panel a model."""
    if none_right(results):
        return _without_answers(results)
    recovery = results.head_recovery.sel(position_set=position_set)
    values = medians(recovery, [*_PAIR, "question"])
    models, limit = results.model.values.tolist(), float(np.nanmax(np.abs(values), initial=1e-6))
    scale = {**_RECOVERY, "vmin": -limit, "vmax": limit}
    height = 2.0 + 0.2 * max(8, results.sizes["layer"])
    with panels((1.8 + 3.2 * len(models), height), columns=models, look="white") as drawn:
        for _, model, axis in drawn:
            panel = values.sel(model=model).dropna("layer", how="all").dropna("head", how="all")
            heat(axis, frame_of(panel.transpose("layer", "head")), **scale)
            axis.set(title=model, xlabel="head", ylabel="layer")
        drawn.label_outer()
        drawn.colorbar("median recovery")
        where = _WHERE[position_set]
        said = "One head patched; median over all pairs and questions."
        drawn.title(f"{_asked(results)}, heads patched at {where}", said, _MEANT)
    return drawn.figure


def accuracy_by_persona(results: xr.Dataset) -> Figure:
    """Accuracy of every persona with its 95 % interval (Wilson's) over questions."""
    models, personas = results.model.values.tolist(), results.persona.values.tolist()
    size = (1.6 + 3.4 * len(models), 1.8 + 0.26 * len(personas))
    n, color = results.sizes["question"], sns.color_palette("colorblind")[0]
    with panels(size, columns=models, sharey=True) as drawn:
        for _, model, axis in drawn:
            for place, persona in enumerate(personas):
                share = float(results.accuracy.sel(model=model, persona=persona))
                if np.isnan(share):
                    continue
                low, high = share_interval(share * n, n)
                error = [[share - low], [high - share]]
                axis.errorbar([share], [place], xerr=error, fmt="o", color=color, capsize=2)
            axis.set(title=model, xlabel=axis_label(results.accuracy), xlim=(-0.02, 1.02))
        drawn.axes[0, 0].set_yticks(range(len(personas)), personas)
        drawn.axes[0, 0].set_ylim(len(personas) - 0.5, -0.5)
        missing = int(results.accuracy.isnull().sum())
        unknown = f"Not measured yet: {missing} personas." if missing else ""
        drawn.title(_asked(results), "Bars: 95 % interval over questions (Wilson's).", unknown)
    return drawn.figure


def none_right(results: xr.Dataset) -> bool:
    """Whether no persona answers any question right, so that there is nothing to recover.

    Where accuracy is not known yet, the right letter's logit nowhere beats the mean of the others.
    """
    known = results.accuracy.dropna("persona", how="all")
    if known.size:
        return bool(known.max() == 0)
    return bool(results.ld.notnull().any()) and bool(results.ld.max() <= 0)


def _without_answers(results: xr.Dataset) -> Figure:
    """What stands in place of recovery where no answer is right."""
    with panels((6.4, 1.8), look="white") as drawn:
        say_in(drawn.axes[0, 0], "No persona answers any question right:\nno recovery is drawn.")
        drawn.title(_asked(results))
    return drawn.figure


def _asked(results: xr.Dataset) -> str:
    """How many questions and pairs of personas were measured, as a title says it."""
    pairs = int(results.completed.any("model").sum())
    return f"{results.attrs['experiment']} · {results.sizes['question']} questions, {pairs} pairs"


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
    size = (2.8 + 3.4 * len(models), 1.6 + 0.26 * _MOST_HEADS)
    with panels(size, columns=models) as drawn:
        for _, model, axis in drawn:
            top = ranking.loc[ranking["model"] == model].head(_MOST_HEADS)
            if top.empty:
                continue
            place = np.arange(len(top))
            axis.barh(place, top.attention, height=0.4, color=colors[0], label="identity")
            axis.barh(
                place + 0.4, top.attention_control, height=0.4, color=colors[1], label="control"
            )
            labels = [f"L{row['layer']} H{row['head']}" for _, row in top.iterrows()]
            axis.set_yticks(place + 0.2, labels)
            axis.invert_yaxis()
            axis.set(title=model, xlabel="attention from the last prompt token")
        drawn.legend("word in the slot")
        most = f"The {_MOST_HEADS} heads that attend most to the identity beyond the control word."
        drawn.title(_asked(results), f"{most} L: layer, H: head. Mean over personas and questions.")
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
    size = (2.4 + 2.3 * _SHOWN_HEADS, 1.7 + 2.2 * len(models))
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
            axis.axhline(float(before.mean()), **DOTTED, label="unpatched")
            axis.set(title=f"{model}\nlayer {layer}, head {head}", xlabel="patched layer")
            axis.set_ylabel("mean " + results[variable].attrs["long_name"].replace(" to ", "\nto "))
        for axis in drawn.axes[:, 1:].flat:
            axis.set_ylabel("")
        _name_patches(drawn)
        drawn.legend()
        most = f"The {_SHOWN_HEADS} heads that attend most to the identity beyond the control word"
        drawn.title(_asked(results), f"{most}, after patching. Mean over pairs and questions.")
    return drawn.figure


def _name_patches(drawn: Panels) -> None:
    """Say in the legend what seaborn heads by the names of dimensions."""
    words = {"component": "patched component", "position_set": "patched at", **_WHERE}
    for axis in drawn.axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handle.set_label(words.get(label, label))


def _clearest(results: xr.Dataset, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs to show, in their order: all, or those whose logit differences differ most."""
    if len(pairs) <= _MOST_PAIRS:
        return pairs

    def gap(pair: tuple[str, str]) -> float:
        clean, corrupt = (results.ld.sel(persona=persona) for persona in pair)
        return float(np.abs(clean - corrupt).median())

    shown = sorted(pairs, key=gap, reverse=True)[:_MOST_PAIRS]
    return [pair for pair in pairs if pair in shown]
