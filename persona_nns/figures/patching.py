"""Figures of patching: where what a persona does to the answer is restored, and who looks at it."""

import warnings
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure

from persona_nns.figures.style import axis_label

# Pairs that a heatmap shows; of more, those whose answers differ most.
_MOST_PAIRS = 40
_MOST_HEADS = 12
_SHOWN_HEADS = 4
_RECOVERY: dict[str, Any] = {"cmap": "vlag", "vmin": -1.0, "vmax": 1.0, "center": 0.0}


def recovery_by_pair(results: xr.Dataset, position_set: str) -> Figure:
    """Median recovery over questions: a row a pair, a column a layer, a panel a component.

    Args:
        results: of persona_patching.
        position_set: ``all`` or ``identity``.

    Returns:
        The figure: a row of panels a model.
    """
    recovery = _over_questions(results.recovery.sel(position_set=position_set))
    pairs = recovery.stack(pair=("clean_persona", "corrupt_persona"))
    pairs = pairs.dropna("pair", how="all")
    chosen = _clearest(results, pairs.pair.values.tolist())
    pairs = pairs.sel(pair=chosen)
    models, components = results.model.values.tolist(), results.component.values.tolist()
    with sns.axes_style("white"), sns.plotting_context("paper", font_scale=0.9):
        size = (2.6 + 3.0 * len(components), 1.2 + 0.17 * len(chosen) * len(models))
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        axes = figure.subplots(len(models), len(components), squeeze=False)
        for row, model in enumerate(models):
            for column, component in enumerate(components):
                panel = pairs.sel(model=model, component=component).dropna("layer", how="all")
                frame = pd.DataFrame(
                    panel.transpose("pair", "layer").values,
                    index=[f"{clean} → {corrupt}" for clean, corrupt in chosen],
                    columns=panel.layer.values,
                )
                axis = axes[row, column]
                sns.heatmap(frame, ax=axis, cbar=False, yticklabels=column == 0, **_RECOVERY)
                axis.set_title(f"{model} · {component}")
                axis.set_xlabel("layer" if row == len(models) - 1 else "")
        _colorbar(figure, axes, "median recovery over questions")
        shown = "" if len(chosen) == pairs.sizes["pair"] == _n_pairs(results) else " (clearest)"
        figure.suptitle(
            f"Clean persona → corrupt persona{shown}, patched at {_WHERE[position_set]}",
            fontsize="medium",
        )
    return figure


def recovery_by_head(results: xr.Dataset, position_set: str) -> Figure:
    """Median recovery over pairs and questions: a row a layer, a column a head, a panel a model."""
    recovery = results.head_recovery.sel(position_set=position_set)
    medians = _median(recovery, ["clean_persona", "corrupt_persona", "question"])
    return _head_maps(
        medians,
        "median recovery",
        f"Heads patched at {_WHERE[position_set]}, over all pairs and questions",
        symmetric=True,
    )


def accuracy_by_persona(results: xr.Dataset) -> Figure:
    """Accuracy of every persona with its 95 % bootstrap interval over questions."""
    models, personas = results.model.values.tolist(), results.persona.values.tolist()
    with sns.axes_style("whitegrid"), sns.plotting_context("paper", font_scale=1.1):
        size = (1.2 + 3.4 * len(models), 1.2 + 0.26 * len(personas))
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        axes = figure.subplots(1, len(models), squeeze=False, sharey=True)
        for axis, model in zip(axes[0], models, strict=True):
            accuracy = results.accuracy.sel(model=model)
            bounds = results.accuracy_interval.sel(model=model)
            errors = np.abs(bounds - accuracy).transpose("bound", "persona").values
            axis.errorbar(
                accuracy,
                range(len(personas)),
                xerr=errors,
                fmt="o",
                color=sns.color_palette("colorblind")[0],
                capsize=2,
            )
            axis.set_yticks(range(len(personas)), personas)
            axis.set(title=model, xlabel=axis_label(results.accuracy), xlim=(-0.02, 1.02))
        axes[0, 0].invert_yaxis()
        figure.suptitle(f"{results.sizes['question']} questions, 95 % interval", fontsize="medium")
    return figure


def rank_heads(results: xr.Dataset) -> pd.DataFrame:
    """Heads by how much more they attend to identities than to the control word in that slot.

    Returns:
        A row a head of each model, the clearest first: model, layer, head, attention to the
        identity, attention to the control word, their difference; means over personas and
        questions.
    """
    over = ["persona", "question"]
    means = results[["attention", "attention_control"]].mean(over)
    means["difference"] = means.attention - means.attention_control
    frame = means.to_dataframe().reset_index().dropna(subset="difference")
    columns = ["model", "layer", "head", "attention", "attention_control", "difference"]
    ranked = pd.DataFrame(frame, columns=columns)
    return ranked.sort_values("difference", ascending=False, ignore_index=True)


def head_ranking(results: xr.Dataset) -> Figure:
    """The heads that attend to identities most beyond the control word, with both."""
    ranking, models = rank_heads(results), results.model.values.tolist()
    colors = sns.color_palette("colorblind")
    with sns.axes_style("whitegrid"), sns.plotting_context("paper", font_scale=1.1):
        size = (1.4 + 3.4 * len(models), 1.2 + 0.26 * _MOST_HEADS)
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        axes = figure.subplots(1, len(models), squeeze=False)
        for axis, model in zip(axes[0], models, strict=True):
            top = ranking[ranking.model == model].head(_MOST_HEADS)
            place = np.arange(len(top))
            axis.barh(place, top.attention, height=0.4, color=colors[0], label="identity")
            axis.barh(
                place + 0.4, top.attention_control, height=0.4, color=colors[1], label="control"
            )
            labels = [f"L{row['layer']} H{row['head']}" for _, row in top.iterrows()]
            axis.set_yticks(place + 0.2, labels)
            axis.invert_yaxis()
            axis.set(title=model, xlabel="attention from the last prompt token")
        axes[0, -1].legend(title="word in the slot", loc="lower right")
        figure.suptitle("Heads by attention to identities beyond the control word")
    return figure


def attention_before_and_after(results: xr.Dataset, variable: str = "attention") -> Figure:
    """Attention to the identity in the heads that look at it most, by the patched layer.

    Args:
        results: of `persona_patching`.
        variable: ``attention``, or ``attention_value``.
    """
    ranking, models = rank_heads(results), results.model.values.tolist()
    names, shared = results.persona.values, ["clean_persona", "corrupt_persona"]
    others = xr.DataArray(
        ~np.eye(len(names), dtype=bool), dims=shared, coords=dict.fromkeys(shared, names)
    )
    with sns.axes_style("whitegrid"), sns.plotting_context("paper", font_scale=1.0):
        size = (1.2 + 2.3 * _SHOWN_HEADS, 1.0 + 2.2 * len(models))
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        axes = figure.subplots(len(models), _SHOWN_HEADS, squeeze=False, sharey="row")
        for row, model in enumerate(models):
            top = ranking[ranking.model == model].head(_SHOWN_HEADS)
            for axis, (_, head) in zip(axes[row], top.iterrows(), strict=False):
                after = results[f"{variable}_patched"].sel(
                    model=model, attention_layer=head["layer"], attention_head=head["head"]
                )
                own = {"model": model, "layer": head["layer"], "head": head["head"]}
                before = float(results[variable].sel(own).mean())
                after = after.where(others).mean([*shared, "question"]).rename("after")
                frame = after.to_dataframe().reset_index().dropna(subset="after")
                sns.lineplot(
                    frame,
                    x="layer",
                    y="after",
                    hue="component",
                    style="position_set",
                    palette="colorblind",
                    markers=True,
                    legend=axis is axes[0, -1],
                    ax=axis,
                )
                axis.axhline(before, color="0.3", linestyle=":", label="unpatched")
                axis.set(title=f"{model}\nL{head['layer']} H{head['head']}", xlabel="patched layer")
                axis.set_ylabel(results[variable].attrs["long_name"])
        handles, labels = axes[0, -1].get_legend_handles_labels()
        if axes[0, -1].get_legend() is not None:
            axes[0, -1].get_legend().remove()
        figure.legend(handles, labels, loc="outside right center")
        figure.suptitle("Before (dotted) and after patching, mean over pairs and questions")
    return figure


_WHERE = {"all": "all positions", "identity": "the identity only"}


def _head_maps(values: xr.DataArray, label: str, title: str, *, symmetric: bool) -> Figure:
    models = values.model.values.tolist()
    limit = max(float(np.abs(values).max()), 1e-6)
    scale: dict[str, Any] = (
        {**_RECOVERY, "vmin": -limit, "vmax": limit} if symmetric else {"cmap": "viridis"}
    )
    with sns.axes_style("white"), sns.plotting_context("paper", font_scale=1.1):
        figure = Figure(figsize=(1.4 + 3.2 * len(models), 3.6), dpi=150, layout="constrained")
        axes = figure.subplots(1, len(models), squeeze=False)
        for axis, model in zip(axes[0], models, strict=True):
            panel = values.sel(model=model).dropna("layer", how="all").dropna("head", how="all")
            frame = panel.transpose("layer", "head").to_pandas()
            sns.heatmap(frame, ax=axis, cbar=False, **scale)
            axis.set_title(model)
        _colorbar(figure, axes, label)
        figure.suptitle(title, fontsize="medium")
    return figure


def _colorbar(figure: Figure, axes: Any, label: str) -> None:
    figure.colorbar(axes[0, 0].collections[0], ax=axes, label=label, extend="both")


def _over_questions(array: xr.DataArray) -> xr.DataArray:
    return _median(array, ["question"])


def _median(array: xr.DataArray, over: list[str]) -> xr.DataArray:
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # all NaN
        return array.median(over, skipna=True)


def _n_pairs(results: xr.Dataset) -> int:
    n = results.sizes["persona"]
    return n * (n - 1)


def _clearest(results: xr.Dataset, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs to show, in their order: all, or those whose logit differences differ most."""
    if len(pairs) <= _MOST_PAIRS:
        return pairs
    ld = results.ld
    gaps = {
        pair: float(np.abs(ld.sel(persona=pair[0]) - ld.sel(persona=pair[1])).median())
        for pair in pairs
    }
    shown = set(sorted(pairs, key=lambda pair: -gaps[pair])[:_MOST_PAIRS])
    return [pair for pair in pairs if pair in shown]
