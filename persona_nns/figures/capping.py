"""Figures of capping, of its thresholds, and of what steering costs."""

from typing import Any

import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from persona_nns.figures import seaborn as sns
from persona_nns.figures.style import DOTTED, MARKED, draw_lines, long_form, panels
from persona_nns.figures.traits import SAID, trait_title

_SHARES = (5, 25, 50, 75, 95)


def capping_curves(results: xr.Dataset) -> Figure | None:
    """Log-probability of given answers against the threshold, a line a set of layers.

    A column is a model and the tokens that are capped, a row the answers with the trait or
    without; None where nothing was capped.
    """
    if "logp_cap" not in results:
        return None
    frame = long_form(results["logp_cap"], "tau")
    columns = _columns(results)
    labels = [label for label in SAID if label in set(frame["row_label"])]
    size = (2.2 + 2.8 * len(columns), 1.2 + 2.5 * len(labels))
    with panels(size, labels, columns, sharey="row", sharex=True) as drawn:
        for label, (model, tokens), axis in drawn:
            shown = frame.query(
                "model == @model and position_set == @tokens and row_label == @label"
            )
            drawn_at = shown.assign(tau=shown["tau"].astype(str))
            draw_lines(axis, drawn_at, "tau", "layer_set", errorbar=None, **MARKED)
            if "logp_none" in results:
                chosen = (results["row_label"] == label).values
                none = results["logp_none"].sel(model=model).isel(row=chosen)
                axis.axhline(float(none.mean()), **DOTTED, label="nothing capped")
            axis.set(title=f"{model} · {tokens}", xlabel="threshold τ")
            axis.set_ylabel(f"mean log-probability (nat)\n{SAID[label]}")
        drawn.label_outer()
        drawn.legend("layers capped")
        said = "Mean over answers. What lies above τ along v is cut off at the tokens named on top"
        of = "; pNN: percentile of the answers' own projections at each layer."
        drawn.title(trait_title(results), said + of)
    return drawn.figure


def receipts_figure(results: xr.Dataset) -> Figure | None:
    """Share of answers that move against the direction, and KL on neutral prompts, against α.

    A line is a layer; dashed, a random direction of the same norm. None without receipts.
    """
    if "against" not in results:
        return None
    kinds = {"trait vector": "kl_neutral", "random, same norm": "kl_neutral_random"}
    apart = pd.concat(
        [
            long_form(results[name].mean("neutral")).assign(direction=kind)
            for kind, name in kinds.items()
        ]
    )
    against = long_form(results["against"].mean("row")).assign(direction="trait vector")
    rows = {"against": against, "kl_neutral": apart}
    columns, layers = _columns(results), sorted(set(apart["layer"]))
    look: dict[str, Any] = {"palette": "viridis", "hue_norm": (layers[0], max(layers[-1], 1))}
    size = (2.8 + 2.8 * len(columns), 5.8)
    with panels(size, list(rows), columns, sharey="row", sharex=True) as drawn:
        for name, (model, tokens), axis in drawn:
            shown = rows[name].query("model == @model and position_set == @tokens")
            sns.lineplot(
                shown,
                x="alpha",
                y="value",
                hue="layer",
                style="direction",
                style_order=list(kinds),
                markers=["o", "X"],
                legend="full",
                ax=axis,
                **look,
            )
            axis.set(title=f"{model} · {tokens}", xlabel="α")
            if name == "against":
                axis.axhline(0.5, **DOTTED)
                axis.set(ylabel="share of answers\nmoving against v", ylim=(-0.05, 1.05))
            else:
                axis.set(ylabel="mean KL on\nneutral prompts (nat)")
        drawn.label_outer()
        drawn.legend()
        drawn.title(
            trait_title(results),
            "With the trait an answer should become more likely at α > 0, without it less likely; "
            "dotted: half of them do. KL of what follows a neutral prompt.",
        )
    return drawn.figure


def projection_percentiles(results: xr.Dataset) -> Figure:
    """Percentiles of all answer tokens' projections against layer: what thresholds are."""
    models = results.model.values.tolist()
    shares = results["projection"].quantile([share / 100 for share in _SHARES], ("row", "token"))
    frame = long_form(shares)
    frame["percentile"] = [f"p{100 * share:g}" for share in frame["quantile"]]
    with panels((2.6 + 3.2 * len(models), 3.5), columns=models, sharey=True) as drawn:
        for _, model, axis in drawn:
            rows = frame.loc[frame["model"] == model]
            draw_lines(axis, rows, "layer", "percentile", **MARKED)
            axis.set(title=model, xlabel="layer", ylabel="projection on v̂")
        drawn.label_outer()
        drawn.legend()
        drawn.title(
            trait_title(results), "Of all tokens of all answers. v̂: the direction, of length 1."
        )
    return drawn.figure


def _columns(results: xr.Dataset) -> list[tuple[str, str]]:
    """Models with the tokens that are steered."""
    return [
        (model, tokens)
        for model in results.model.values.tolist()
        for tokens in results.position_set.values.tolist()
    ]
