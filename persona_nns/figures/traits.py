"""Figures of the trait experiments."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure

from persona_nns.figures.style import axis_label

_SCORES = ("score", "coherence")


def score_bars(results: xr.Dataset, by: str) -> Figure:
    """Trait score and coherence by the labels of a dimension, mean ± sd."""
    frame = _scores(results, (by,))
    models = list(dict.fromkeys(frame.model))
    with _style():
        figure = Figure(figsize=(1.2 + 2.8 * len(models), 3.2), dpi=150, layout="constrained")
        axes = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
        for axis, model in zip(axes, models, strict=True):
            sns.barplot(
                _rows(frame, model=model),
                x=by,
                y="value",
                hue="what",
                palette="colorblind",
                errorbar="sd",
                ax=axis,
                legend=bool(axis is axes[-1]),
            )
            axis.set(title=model, xlabel="", ylabel="judged (points)", ylim=(0, 125))
        _one_legend(axes[-1])
        figure.suptitle(f"{_trait(results)}: mean ± sd over answers", fontsize="medium")
    return figure


def vector_norms(results: xr.Dataset) -> Figure:
    """‖v‖ against layer, a line an average."""
    norm = (results["vector"] ** 2).sum("d_model") ** 0.5
    frame = norm.rename("value").to_dataframe().reset_index()
    with _style():
        figure = Figure(figsize=(4.4, 3.0), dpi=150, layout="constrained")
        axis = figure.subplots()
        sns.lineplot(
            frame,
            x="layer",
            y="value",
            hue="average",
            style="average",
            markers=True,
            dashes=False,
            palette="colorblind",
            ax=axis,
        )
        axis.set(xlabel="layer", ylabel="‖v‖", title=f"{_trait(results)} · {_models(results)}")
    return figure


def projection_figure(results: xr.Dataset) -> Figure:
    """Projection on v̂ of the answers of both labels against layer; a panel an average."""
    array = results["projection"]
    frame = array.rename("value").to_dataframe().reset_index()
    frame["label"] = frame["row_label"]
    averages = results.average.values.tolist()
    with _style():
        figure = Figure(figsize=(1.2 + 2.7 * len(averages), 3.0), dpi=150, layout="constrained")
        axes = figure.subplots(1, len(averages), sharey=True)
        for axis, average in zip(axes, averages, strict=True):
            sns.lineplot(
                _rows(frame, average=average),
                x="layer",
                y="value",
                hue="label",
                style="label",
                errorbar="sd",
                palette="colorblind",
                ax=axis,
                legend=average == averages[-1],
            )
            axis.set(title=average, xlabel="layer", ylabel="projection on v̂")
        _one_legend(axes[-1])
        title = f"{_trait(results)} · {_models(results)}: mean ± sd over answers"
        figure.suptitle(title, fontsize="medium")
    return figure


def steering_sweep(results: xr.Dataset) -> Figure:
    """Score and coherence (or log-probability) against α, a line a layer, a column a token set."""
    names = [name for name in _SCORES if name in results] or ["logp"]
    array = xr.concat([results[name] for name in names], pd.Index(names, name="what"))
    sample_dims = [dim for dim in array.dims if dim in ("question", "sample", "row")]
    mean = array.mean(sample_dims)
    frame = mean.rename("value").to_dataframe().reset_index().dropna(subset="value")
    sets = results.position_set.values.tolist()
    models = results.model.values.tolist()
    columns = [(model, tokens) for model in models for tokens in sets]
    with _style():
        size = (1.6 + 2.8 * len(columns), 0.6 + 2.6 * len(names))
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        axes = figure.subplots(len(names), len(columns), squeeze=False, sharey="row", sharex=True)
        for row, name in enumerate(names):
            for column, (model, tokens) in enumerate(columns):
                axis = axes[row, column]
                shown = _rows(frame, what=name, model=model, position_set=tokens)
                last = row == 0 and column == len(columns) - 1
                sns.lineplot(
                    shown,
                    x="alpha",
                    y="value",
                    hue="layer",
                    palette="viridis",
                    marker="o",
                    ax=axis,
                    legend="full" if last else False,
                )
                axis.set_title(f"{model} · {tokens}" if row == 0 else "")
                axis.set_xlabel("α" if row == len(names) - 1 else "")
                axis.set_ylabel(axis_label(results[name]))
                if name in _SCORES:
                    axis.set_ylim(-3, 103)
        _one_legend(axes[0, -1])
        figure.suptitle(f"{_trait(results)}: mean over answers", fontsize="medium")
    return figure


def correlation_by_layer(results: xr.Dataset) -> Figure:
    """Pearson's r of projection and score against layer: over all answers, and within degrees."""
    found = correlation(results)
    within = found["within"].rename("value").to_dataframe().reset_index()
    overall = found["overall"].rename("value").to_dataframe().reset_index()
    frame = pd.concat([overall.assign(degree="all answers"), within]).dropna(subset="value")
    models = results.model.values.tolist()
    with _style():
        figure = Figure(figsize=(1.8 + 3.2 * len(models), 3.0), dpi=150, layout="constrained")
        axes = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
        for axis, model in zip(axes, models, strict=True):
            sns.lineplot(
                _rows(frame, model=model),
                x="layer",
                y="value",
                hue="degree",
                style="degree",
                markers=True,
                dashes=False,
                palette="colorblind",
                ax=axis,
                legend=model == models[-1],
            )
            axis.axhline(0, color="0.4", linewidth=0.8)
            axis.set(title=model, xlabel="layer", ylabel="r(projection, score)", ylim=(-1.05, 1.05))
        _one_legend(axes[-1])
        figure.suptitle(f"{_trait(results)}: last prompt token on v̂", fontsize="medium")
    return figure


def distillation_curves(results: xr.Dataset) -> Figure:
    """Score and coherence of each student, and of one against the number of trajectories."""
    frame = _scores(results, ("condition",))
    students = dict(zip(results.condition.values, results.student.values, strict=True))
    counts = dict(zip(results.condition.values, results.n_trajectories.values, strict=True))
    frame["student"] = frame.condition.map(students)
    frame["n_trajectories"] = frame.condition.map(counts)
    most = frame.n_trajectories.max()
    table = pd.concat([_rows(frame, n_trajectories=count) for count in (0, most)])
    curve = _curve_student(results)
    along = _rows(frame[frame.n_trajectories > 0], student=curve)
    with _style():
        figure = Figure(figsize=(10.6, 3.4), dpi=150, layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        sns.barplot(
            table,
            x="student",
            y="value",
            hue="what",
            palette="colorblind",
            errorbar="sd",
            ax=left,
            legend=False,
        )
        left.set(xlabel=f"student ({most} trajectories)", ylabel="judged (points)", ylim=(0, 125))
        sns.lineplot(
            along,
            x="n_trajectories",
            y="value",
            hue="what",
            style="what",
            markers=True,
            palette="colorblind",
            errorbar="sd",
            err_style="bars",
            ax=right,
        )
        steered = frame[(frame.student == "steered") & (frame.what == "trait score")].value.mean()
        right.axhline(steered, color="0.4", linestyle=":", label="steered, score")
        right.set(xlabel=f"trajectories ({curve})", xscale="log")
        ticks = sorted(along.n_trajectories.unique())
        right.set_xticks(ticks, [str(tick) for tick in ticks])
        right.minorticks_off()
        _one_legend(right)
        title = f"{_trait(results)} · {_models(results)}: held-out questions, mean ± sd"
        figure.suptitle(title, fontsize="medium")
    return figure


def token_kl_figure(results: xr.Dataset) -> Figure:
    """Mean KL to the teacher at each token of its answers, a line a student."""
    most = int(results.n_trajectories.max())
    shown = results.sel(
        condition=[
            str(name)
            for name, count, student in zip(
                results.condition.values,
                results.n_trajectories.values,
                results.student.values,
                strict=True,
            )
            if count in (0, most) and student != "steered"
        ]
    )
    mean = shown["token_kl"].mean("question").dropna("token", how="all")
    frame = mean.rename("value").to_dataframe().reset_index().dropna(subset="value")
    with _style():
        figure = Figure(figsize=(6.4, 3.2), dpi=150, layout="constrained")
        axis = figure.subplots()
        sns.lineplot(frame, x="token", y="value", hue="condition", palette="colorblind", ax=axis)
        axis.set(
            xlabel="token of the teacher's answer",
            ylabel="KL(teacher ‖ student) (nat)",
            yscale="log",
            title=f"{_trait(results)} · {_models(results)}: mean over questions",
        )
        _one_legend(axis)
    return figure


def _curve_student(results: xr.Dataset) -> str:
    """The student that was trained on several numbers of trajectories, or the first."""
    trained = [str(s) for s in results.student.values if s not in ("baseline", "steered")]
    return max(dict.fromkeys(trained), key=trained.count)


def _scores(results: xr.Dataset, dims: tuple[str, ...]) -> pd.DataFrame:
    """A long table of scores and coherence, a row an answer."""
    parts = []
    for name in _SCORES:
        frame = results[name].rename("value").to_dataframe().reset_index()
        frame = frame.dropna(subset="value")[["model", *dims, "value"]]
        parts.append(frame.assign(what=results[name].attrs["long_name"]))
    return pd.concat(parts, ignore_index=True)


def _rows(frame: Any, **labels: Any) -> pd.DataFrame:
    """The rows of a table with these values in these columns."""
    for name, label in labels.items():
        frame = frame[frame[name] == label]
    return frame


def _trait(results: xr.Dataset) -> str:
    return ", ".join(map(str, results.trait.values.tolist()))


def _models(results: xr.Dataset) -> str:
    return ", ".join(map(str, results.model.values.tolist()))


def _one_legend(axis: Any) -> None:
    """The legend beside its panel."""
    handles, labels = axis.get_legend_handles_labels()
    if axis.get_legend() is not None:
        title = axis.get_legend().get_title().get_text()
        axis.get_legend().remove()
        axis.figure.legend(
            handles, labels, title="" if title == "what" else title, loc="outside right center"
        )


@contextmanager
def _style() -> Iterator[None]:
    """Seaborn's look for what is drawn inside."""
    with sns.axes_style("whitegrid"), sns.plotting_context("paper", font_scale=1.1):
        yield


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
