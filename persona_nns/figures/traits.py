"""Figures of the trait experiments."""

from typing import Any

import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from persona_nns.errors import UsageError
from persona_nns.figures import seaborn as sns
from persona_nns.figures.style import (
    DOTTED,
    MARKED,
    ZERO,
    axis_label,
    draw_lines,
    long_form,
    panels,
)

_AVERAGES = (
    "response_avg: mean over the answer's tokens, prompt_avg: over the prompt's; prompt_last: the "
    "last prompt token."
)
_SCORES = ("score", "coherence")
#: Kinds of given answers, as a row of panels is called.
SAID = {"pos": "pos: with the trait", "neg": "neg: without it"}
#: Bars and lines of the two judgements, mean ± sd.
_JUDGED: dict[str, Any] = {"y": "value", "hue": "what", "palette": "colorblind", "errorbar": "sd"}


def score_bars(results: xr.Dataset, by: str) -> Figure:
    """Trait score and coherence by the labels of a dimension, mean ± sd."""
    frame = _scores(results)
    models = list(dict.fromkeys(frame["model"]))
    with panels((2.6 + 2.8 * len(models), 3.4), columns=models, sharey=True) as drawn:
        for _, model, axis in drawn:
            sns.barplot(frame.loc[frame["model"] == model], x=by, ax=axis, **_JUDGED)
            axis.set(title=model, xlabel="", ylabel="judged (points)", ylim=(0, 125))
        drawn.label_outer()
        drawn.legend()
        drawn.title(trait_title(results), f"Mean ± sd over answers{_answers(results)}.")
    return drawn.figure


def vector_norms(results: xr.Dataset) -> Figure:
    """‖v‖ against layer, a line an average."""
    frame = long_form((results["vector"] ** 2).sum("d_model") ** 0.5)
    with panels((6.2, 3.5)) as drawn:
        axis = drawn.axes[0, 0]
        draw_lines(axis, frame, "layer", "average", **MARKED)
        axis.set(xlabel="layer", ylabel="norm of the trait vector, ‖v‖")
        drawn.legend("tokens averaged")
        drawn.title(f"{trait_title(results)} · {_labels(results, 'model')}", _AVERAGES)
    return drawn.figure


def projection_figure(results: xr.Dataset) -> Figure:
    """Projection on v̂ of the answers of both labels against layer; a panel an average."""
    frame = long_form(results["projection"]).rename(columns={"row_label": "label"})
    averages = results.average.values.tolist()
    with panels((2.4 + 2.7 * len(averages), 3.5), columns=averages, sharey=True) as drawn:
        for _, average, axis in drawn:
            rows = frame.loc[frame["average"] == average]
            draw_lines(axis, rows, "layer", "label", errorbar="sd", palette="colorblind")
            axis.set(title=average, xlabel="layer", ylabel="projection on v̂")
        drawn.label_outer()
        drawn.legend("asked to show the trait")
        said = "v̂: trait vector of response_avg, of length 1. Lines: mean over answers; bands: sd."
        drawn.title(f"{trait_title(results)} · {_labels(results, 'model')}", said, _AVERAGES)
    return drawn.figure


def steering_sweep(results: xr.Dataset) -> Figure | None:
    """Score and coherence (or log-probability) against α, a line a layer, a column a token set.

    None where nothing was added.
    """
    if "score" in results:
        _check_judged(results)
    frames = {
        axis_label(results[name]): long_form(
            results[name].mean({"question", "sample"} & set(results[name].dims))
        )
        for name in _SCORES
        if name in results
    } | _given(results)
    if not frames:
        return None
    names = list(frames)
    columns = [
        (model, tokens)
        for model in results.model.values.tolist()
        for tokens in results.position_set.values.tolist()
    ]
    layers = results.layer.values
    size = (2.0 + 2.8 * len(columns), 1.0 + 2.6 * len(names))
    with panels(size, names, columns, sharey="row", sharex=True) as drawn:
        for name, (model, tokens), axis in drawn:
            frame = frames[name].query("model == @model and position_set == @tokens")
            sns.lineplot(
                frame,
                x="alpha",
                y="value",
                hue="layer",
                hue_norm=(layers.min(), layers.max()),
                palette="viridis",
                marker="o",
                legend="full",
                ax=axis,
            )
            axis.set_title(f"{model} · {tokens}" if name == names[0] else "")
            axis.set_xlabel("α" if name == names[-1] else "")
            axis.set_ylabel(f"mean {name}")
            if "score" in results:
                axis.set_ylim(-3, 103)
        drawn.label_outer()
        drawn.legend("layer")
        said = f"Mean over answers{_answers(results)}. α: how much of the trait vector is added."
        drawn.title(trait_title(results), said)
    return drawn.figure


def _given(results: xr.Dataset) -> dict[str, pd.DataFrame]:
    """Log-probabilities of given answers: those with the trait, and those without it."""
    if "logp" not in results:
        return {}
    logp = results["logp"]
    if "row_label" not in logp.coords:
        return {"log-probability\nof the response (nat)": long_form(logp.mean("row"))}
    return {
        f"log-probability (nat)\n{said}": long_form(
            logp.isel(row=(logp["row_label"] == label).values).mean("row")
        )
        for label, said in SAID.items()
        if label in logp["row_label"]
    }


def correlation_by_layer(results: xr.Dataset) -> Figure:
    """Pearson's r of projection and score against layer: over all answers, and within degrees."""
    _check_judged(results)
    found = correlation(results)
    overall = long_form(found["overall"]).assign(degree="all answers")
    frame = pd.concat([overall, long_form(found["within"])])
    models = results.model.values.tolist()
    with panels((2.6 + 3.2 * len(models), 3.4), columns=models, sharey=True) as drawn:
        for _, model, axis in drawn:
            draw_lines(axis, frame.loc[frame["model"] == model], "layer", "degree", **MARKED)
            axis.axhline(0, **ZERO, label="0: says nothing")
            axis.set(title=model, xlabel="layer", ylabel="r(projection, score)", ylim=(-1.05, 1.05))
        drawn.label_outer()
        drawn.legend("degree asked for")
        said = (
            "Pearson's r, over answers, of the trait score with the last prompt token's projection "
            "on the trait vector."
        )
        drawn.title(trait_title(results), said)
    return drawn.figure


def distillation_curves(results: xr.Dataset) -> Figure:
    """Score and coherence of each student, and of one against the number of trajectories."""
    frame = _scores(results)
    most = frame["n_trajectories"].max()
    curve = _curve_student(results)
    along = frame.query("n_trajectories > 0 and student == @curve")
    steered = frame.query("student == 'steered' and what == 'trait score'")["value"].mean()
    ticks = sorted(along["n_trajectories"].unique())
    columns = ["students", "trajectories"][: len(ticks)]  # of one number there is no curve
    with panels((2.6 + 4 * len(columns), 3.8), columns=columns, sharey=True) as drawn:
        left = drawn.axes[0, 0]
        table = frame.query("n_trajectories in (0, @most)")
        sns.barplot(table, x="student", ax=left, legend=len(ticks) == 1, **_JUDGED)
        left.set(xlabel=f"student ({most} trajectories)", ylabel="judged (points)", ylim=(0, 125))
        if len(ticks) > 1:
            right = drawn.axes[0, 1]
            bars: dict[str, Any] = {"err_style": "bars", "markers": True}
            sns.lineplot(along, x="n_trajectories", style="what", ax=right, **bars, **_JUDGED)
            right.axhline(steered, **DOTTED, label="trait score of the steered teacher")
            right.set(xlabel=f"trajectories ({curve})", xscale="log")
            right.set_xticks(ticks, [str(tick) for tick in ticks])
            right.minorticks_off()
        drawn.legend()
        title = f"{trait_title(results)} · {_labels(results, 'model')}"
        drawn.title(title, "Mean ± sd over answers to held-out questions. r8: LoRA of rank 8.")
    return drawn.figure


def token_kl_figure(results: xr.Dataset) -> Figure:
    """Mean KL to the teacher at each token of its answers, a line a student."""
    most = int(results.n_trajectories.max())
    shown = results.n_trajectories.isin([0, most]) & (results.student != "steered")
    frame = long_form(results["token_kl"].isel(condition=shown.values).mean("question"))
    with panels((6.4, 3.6)) as drawn:
        axis = drawn.axes[0, 0]
        sns.lineplot(frame, x="token", y="value", hue="condition", palette="colorblind", ax=axis)
        axis.set(
            xlabel="token of the teacher's answer",
            ylabel="KL(teacher ‖ student) (nat)",
            yscale="log",
        )
        drawn.legend("student/trajectories")
        drawn.title(f"{trait_title(results)} · {_labels(results, 'model')}", "Mean over questions.")
    return drawn.figure


def _curve_student(results: xr.Dataset) -> str:
    """The student that was trained on several numbers of trajectories, or the first."""
    trained = [str(s) for s in results.student.values if s not in ("baseline", "steered")]
    return max(dict.fromkeys(trained), key=trained.count)


def _scores(results: xr.Dataset) -> pd.DataFrame:
    """A row an answer and judgement, which is named in ``what``."""
    _check_judged(results)
    frames = [
        long_form(results[name]).assign(what=results[name].attrs["long_name"]) for name in _SCORES
    ]
    return pd.concat(frames, ignore_index=True)


def _check_judged(results: xr.Dataset) -> None:
    """See that there are scores.

    Raises:
        UsageError: nobody judged the answers.
    """
    if not bool(results["score"].notnull().any()):
        raise UsageError(
            "Nobody judged these answers, so there are no scores to draw; have them judged with "
            "persona-nns rescore."
        )


def _labels(results: xr.Dataset, dim: str) -> str:
    return ", ".join(map(str, results[dim].values.tolist()))


def trait_title(results: xr.Dataset) -> str:
    """The experiment and its traits."""
    return f"{results.attrs['experiment']} · {_labels(results, 'trait')}"


def _answers(results: xr.Dataset) -> str:
    """How many questions were asked, where some were not."""
    if "question" not in results.completed.dims:
        return ""
    asked = results.completed.any([dim for dim in results.completed.dims if dim != "question"])
    measured, every = int(asked.sum()), asked.size
    return "" if measured == every else f" to {measured} of {every} questions"


def correlation(results: xr.Dataset) -> xr.Dataset:
    """Pearson's r between projection and trait score, at each layer.

    Args:
        results: of `trait_monitoring`, of one trait.

    Returns:
        ``overall`` over (model, layer); ``within`` over (model, degree, layer), NaN where all
        scores of a degree are alike.
    """
    score = results["score"].mean("sample")
    return xr.Dataset(
        {
            "overall": _pearson(results["projection"], score, ("trait", "degree", "question")),
            "within": _pearson(results["projection"], score, ("trait", "question")),
        }
    )


def _pearson(x: xr.DataArray, y: xr.DataArray, dims: tuple[str, ...]) -> xr.DataArray:
    valid = x.notnull() & y.notnull()
    x, y = x.where(valid), y.where(valid)
    x, y = x - x.mean(dims), y - y.mean(dims)
    scale = ((x**2).sum(dims) * (y**2).sum(dims)) ** 0.5
    return ((x * y).sum(dims) / scale.where(scale > 1e-9)).rename("r")
