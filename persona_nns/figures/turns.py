"""Figures of conversations, turn by turn: projections, and what is left of steering."""

from typing import Any

import xarray as xr
from matplotlib.figure import Figure

from persona_nns.figures.style import FEW, axis_label, dodge, draw_medians, long_form, panels

#: Depths at which projections are drawn.
_DEPTHS = (0.25, 0.5, 0.75)


def drift_curves(results: xr.Dataset) -> Figure:
    """Projections against the turn: a row a model and direction, a column a depth.

    A line for each speaker, or, of conversations of several domains, one for each domain's answers.

    Args:
        results: of `persona_drift`.
    """
    places = [
        (model, each) for model in _of(results, "model") for each in _of(results, "direction")
    ]
    domains = [each for each in dict.fromkeys(_domains(results)) if each]
    size = (2.4 + 2.9 * len(_DEPTHS), 1.3 + 2.5 * len(places))
    with panels(size, places, _DEPTHS) as drawn:
        for (model, direction), depth, axis in drawn:
            layer = round(depth * int(results.n_layers.sel(model=model)))
            at = results.sel(model=model, direction=direction, layer=layer)
            frame = long_form(at["projection"].drop_vars("direction"))
            speakers = at["speaker"].to_series()
            keys = zip(frame["conversation"], frame["turn"], strict=True)
            frame["speaker"] = [speakers[key] for key in keys]
            hue = "speaker"
            if len(domains) > 1:
                hue, frame = "domain", frame.loc[frame["speaker"] == "assistant"]
            draw_medians(axis, frame, "turn", hue)
            axis.set(title=f"{model} · layer {layer}", ylabel=f"projection on {direction}")
        drawn.label_outer()
        drawn.legend("answers on" if len(domains) > 1 else "speaker")
        said = "Mean over a turn's tokens of h·d̂, not centred."
        drawn.title(_title(results), said, _spread(results))
    return drawn.figure


def memory_by_turn(results: xr.Dataset) -> Figure:
    """Log-probability and KL of the answers, a token, against the turn; a line a condition.

    Args:
        results: of `steering_memory`.
    """
    per_token = results[["logp", "kl"]] / results["n_tokens"]
    named = {str(name): per_token[name].assign_attrs(results[name].attrs) for name in per_token}
    labels = {"logp": "log p of the answer\n(nat a token)", "kl": "KL from clean_kv\n(nat a token)"}
    said = "Sums over an answer's tokens, divided by their number; KL(clean_kv ‖ condition)."
    return _by_condition(results, named, labels, said)


def answers_by_turn(results: xr.Dataset) -> Figure | None:
    """Trait score and coherence of each condition's own answers against the turn.

    Args:
        results: of `steering_memory`.

    Returns:
        None where no answers were judged.
    """
    if "score" not in results:
        return None
    named = {name: results[name] for name in ("score", "coherence")}
    labels = {name: f"{axis_label(array)}\n(points)" for name, array in named.items()}
    return _by_condition(results, named, labels, "Each condition answers for itself.")


def _by_condition(
    results: xr.Dataset,
    named: dict[str, xr.DataArray],
    labels: dict[str, str],
    *said: str,
) -> Figure:
    """A row a variable, a column a model and α that is not 0; a line a condition."""
    alphas = [alpha for alpha in _of(results, "alpha") if alpha] or _of(results, "alpha")
    places = [(model, alpha) for model in _of(results, "model") for alpha in alphas]
    size = (2.8 + 2.9 * len(places), 1.3 + 2.5 * len(named))
    with panels(size, list(named), places, sharey="row") as drawn:
        for name, (model, alpha), axis in drawn:
            values = named[name].sel(model=model, alpha=alpha)
            shown = values.dropna("condition", how="all")
            if shown.size:
                frame = long_form(shown, "condition")
                apart = [dodge(k, shown.sizes["condition"]) for k in frame["condition"].cat.codes]
                draw_medians(axis, frame.assign(turn=frame["turn"] + apart), "turn", "condition")
            axis.set(title=f"{model} · α = {alpha:g}", ylabel=labels[name])
        drawn.label_outer()
        drawn.legend("condition")
        drawn.title(_title(results), *said, _spread(results), _CONDITIONS)
    return drawn.figure


_CONDITIONS = (
    "steered: this answer and the earlier ones; clean_kv: this one alone; dirty_kv: the earlier "
    "ones alone; system: asked for in words."
)


def _of(results: xr.Dataset, dim: str) -> list[Any]:
    return results[dim].values.tolist()


def _domains(results: xr.Dataset) -> list[str]:
    return _of(results, "domain") if "domain" in results.coords else []


def _title(results: xr.Dataset) -> str:
    measured = results["completed"].any("model")
    of = f"{int(measured.sum())} of {measured.size} conversations"
    return f"{results.attrs['experiment']} · {results.attrs['grid']}, {of}"


def _spread(results: xr.Dataset) -> str:
    """What is drawn beside the medians, as a caption says it."""
    if int(results["completed"].sum("conversation").max()) < FEW:
        return "Lines: median over conversations; dots: the conversations."
    return "Lines: median over conversations; beside them 25 and 75 %, of few the values."
