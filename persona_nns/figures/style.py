"""What all figures share: panels with their labels, one legend, a caption, how a median is drawn.

Seaborn's figure-level functions are not used: they make figures of pyplot, which keeps them open
and belongs to the notebook or program that calls us. Colours are its colour-blind palette.
"""

import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from persona_nns.figures import seaborn as sns
from persona_nns.figures.paper import DrawnFigure, fit_text, fonts, legend_below, new_figure

DOTTED: dict[str, Any] = {"color": "0.4", "linestyle": ":", "linewidth": 1.2}
#: A thin line through an axis, where something begins.
ZERO: dict[str, Any] = {"color": "0.4", "linewidth": 0.8}
#: A solid line with a marker of its own for each label.
MARKED: dict[str, Any] = {"markers": True, "dashes": False, "palette": "colorblind"}
MARKERS = "osD^vPX*<>"
#: Fewer numbers than this are drawn each; quartiles of them would say nothing.
FEW = 4
_MOST_FILLED = 2  # bands of more series than these would mix their colours
_MOST_TICKS = 12  # labels beside each other on an axis of a heatmap
_CHARACTERS = 15  # of a caption, in an inch


@dataclass(frozen=True)
class Panels:
    """A figure of panels.

    Attributes:
        figure: the whole of it.
        axes: its panels, [row, column].
        rows: what each row shows.
        columns: what each column shows.
    """

    figure: DrawnFigure
    axes: NDArray[Any]
    rows: Sequence[Any]
    columns: Sequence[Any]

    def __iter__(self) -> Iterator[tuple[Any, Any, Axes]]:
        """Each panel with what its row and its column show."""
        for row, axes in zip(self.rows, self.axes, strict=True):
            for column, axis in zip(self.columns, axes, strict=True):
                yield row, column, axis

    def title(self, text: str, *caption: str) -> None:
        """The title of the figure, which names it, and the caption below, which explains it.

        A figure for a paper shows neither: both are its `caption`.

        Args:
            text: of the title.
            *caption: sentences; empty ones are left out.
        """
        said = " ".join(sentence for sentence in caption if sentence)
        if self.figure.is_for_paper:
            self.figure.caption = f"{text}. {said}".strip()
            return
        width = self.figure.get_figwidth()
        self.figure.suptitle(textwrap.fill(text, int(11 * width)), fontsize="medium")
        if said:
            lines = textwrap.fill(said, int(_CHARACTERS * width))
            self.figure.supxlabel(lines, fontsize="small", x=0.01, ha="left", color="0.25")

    def label_outer(self) -> None:
        """Keep axis labels at the left and at the bottom only, and a column's title on top."""
        for axis in self.axes[:-1].flat:
            axis.set_xlabel("")
        for axis in self.axes[:, 1:].flat:
            axis.set_ylabel("")
        for row in self.axes[1:]:
            for axis, top in zip(row, self.axes[0], strict=True):
                if axis.get_title() == top.get_title():
                    axis.set_title("")

    def legend(self, title: str = "", **look: Any) -> None:
        """One legend for all panels in place of theirs: every label that one of them has."""
        settings = {"loc": "outside right center", "title": title, **look}
        shown: list[tuple[Any, str]] = []
        for axis in self.axes.flat:
            known = {label for _, label in shown}
            own = zip(*axis.get_legend_handles_labels(), strict=True)
            shown += [(handle, label) for handle, label in own if label not in known]
            if axis.get_legend() is not None:
                axis.get_legend().remove()
        if shown:
            if self.figure.is_for_paper:
                settings |= legend_below(self.figure, [label for _, label in shown])
            self.figure.legend(*zip(*shown, strict=True), **settings)

    def colorbar(self, label: str, **look: Any) -> None:
        """One colour bar for the heatmaps of all panels, which share their scale."""
        drawn = [axis.collections[0] for axis in self.axes.flat if axis.collections]
        if drawn:
            self.figure.colorbar(drawn[0], ax=self.axes, label=label, **look)

    def mark_empty(self) -> None:
        """Say in each panel without anything that nothing was measured."""
        for axis in self.axes.flat:
            if not axis.has_data():
                say_in(axis, "nothing measured")


@contextmanager
def panels(
    size: tuple[float, float],
    rows: Sequence[Any] = (None,),
    columns: Sequence[Any] = (None,),
    *,
    look: Literal["whitegrid", "white"] = "whitegrid",
    font_scale: float = 1.1,
    **settings: Any,
) -> Iterator[Panels]:
    """A figure to be filled, in seaborn's look while it is drawn; not shown.

    Args:
        size: of the figure, width and height in inches.
        rows: what each row of panels shows.
        columns: what each column shows.
        look: seaborn's style.
        font_scale: of all text.
        settings: of matplotlib's ``subplots``, such as ``sharey``.
    """
    with sns.axes_style(look), mpl.rc_context(fonts(font_scale)):
        figure = new_figure(size, font_scale)
        axes = figure.subplots(len(rows), len(columns), squeeze=False, **settings)
        drawn = Panels(figure, axes, rows, columns)
        yield drawn
        drawn.mark_empty()
        if figure.is_for_paper:
            fit_text(axes)


def say_in(axis: Axes, text: str) -> None:
    """Words in a panel, in place of what cannot be drawn."""
    axis.text(0.5, 0.5, text, ha="center", va="center", color="0.4", transform=axis.transAxes)
    axis.grid(visible=False)
    axis.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False)


def long_form(values: xr.DataArray, *ordered: str) -> pd.DataFrame:
    """A row a measured number: its labels, and itself as ``value``.

    Args:
        values: of any dimensions.
        ordered: dimensions whose labels keep their order in a figure.
    """
    frame = values.rename("value").to_dataframe().reset_index().dropna(subset="value")
    for dim in ordered:
        frame[dim] = pd.Categorical(frame[dim], values[dim].values.tolist(), ordered=True)
    return frame


def groups(frame: pd.DataFrame, *names: str) -> Iterator[tuple[Any, pd.DataFrame]]:
    """The labels in these columns, and the rows that share them; in order of appearance."""
    yield from frame.groupby(list(names), sort=False)


def draw_lines(axis: Axes, frame: pd.DataFrame, x: str, hue: str | None, **look: Any) -> None:
    """Lines of ``value`` in a panel, a colour and style for each label of `hue`."""
    sns.lineplot(frame, x=x, y="value", hue=hue, style=hue, ax=axis, **look)


def draw_medians(axis: Axes, frame: pd.DataFrame, x: str, hue: str | None = None) -> None:
    """Lines of medians of ``value`` against numbers, with the quartiles.

    The quartiles are a band, or, where there are more than two series, thin lines. Of fewer than
    four values at a place each is a dot in their place: see `spread_of`.

    Args:
        axis: the panel.
        frame: from `long_form`.
        x: the column of numbers, such as layers.
        hue: the column whose labels have a line each; without it there is one line.
    """
    named = [(None, frame)]
    if hue is not None:
        labels: list[Any] = list(dict.fromkeys(frame[hue]))
        if isinstance(frame[hue].dtype, pd.CategoricalDtype):
            labels = frame[hue].cat.categories.tolist()
        named = [(label, frame.loc[frame[hue] == label]) for label in labels]
    colours = sns.color_palette("colorblind", max(len(named), 1))
    places = len(set(frame[x]))
    drawn: list[tuple[Any, pd.DataFrame, pd.DataFrame]] = []
    for k, (label, rows) in enumerate(named):
        if not len(rows):
            continue
        by_place = rows.groupby(x, observed=True)["value"]
        shares = pd.concat({share: by_place.quantile(share) for share in (0.25, 0.5, 0.75)}, axis=1)
        axis.plot(
            shares.index.to_numpy(dtype=float),
            shares[0.5].to_numpy(dtype=float),
            marker=MARKERS[k % len(MARKERS)],
            markersize=4.5 if places <= _MOST_TICKS else 2.5,
            markeredgecolor="white",
            markeredgewidth=0.5,
            color=colours[k],
            label=None if label is None else str(label),
        )
        drawn.append((colours[k], rows, shares))
    for colour, rows, shares in drawn:
        _draw_spread(axis, colour, rows, shares, x, fill=len(named) <= _MOST_FILLED)
    axis.set_xlabel(x)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_spread(
    axis: Axes, colour: Any, rows: pd.DataFrame, shares: pd.DataFrame, x: str, *, fill: bool
) -> None:
    """Quartiles of one series, or its single values where they are few."""
    at = shares.index.to_numpy(dtype=float)
    low, high = (shares[share].to_numpy(dtype=float) for share in (0.25, 0.75))
    if _most(rows, x) < FEW:
        axis.scatter(rows[x].astype(float), rows["value"], s=7, color=colour, alpha=0.5)
    elif fill:
        axis.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
    else:
        for edge in (low, high):
            axis.plot(at, edge, color=colour, linewidth=0.8, alpha=0.8, linestyle=(0, (4, 2)))


def _most(frame: pd.DataFrame, *places: str) -> int:
    """The most numbers that there are at one place."""
    return max(frame.groupby(list(places), observed=True).size().tolist(), default=0)


def spread_of(results: xr.Dataset, series: int = 1, over: str = "cells") -> str:
    """What `draw_medians` draws beside the medians, as a caption says it.

    Args:
        results: of one experiment.
        series: lines in a panel.
        over: what the medians are over.
    """
    if max(measured_cells(results).values(), default=0) < FEW:
        return f"Lines: median over {over}; dots: the {over}."
    quartiles = "bands" if series <= _MOST_FILLED else "dashed lines"
    return f"Lines: median over {over}; {quartiles}: 25 and 75 %."


def dodge(k: int, n: int, width: float = 0.5) -> float:
    """How far the k-th of n series stands from its label, so that they stand side by side.

    Args:
        k: its index.
        n: number of series.
        width: that all of them take, of the distance between labels.
    """
    return width * ((k + 0.5) / n - 0.5)


def frame_of(values: xr.DataArray) -> pd.DataFrame:
    """Values over two dimensions as a table, the first one down."""
    down, across = map(str, values.dims)
    return pd.DataFrame(values.values, index=values[down].values, columns=values[across].values)


def heat(axis: Axes, values: pd.DataFrame, **look: Any) -> None:
    """A heatmap in a panel without a colour bar; of many columns, some are labelled."""
    if not values.notna().to_numpy().any():
        return
    step = -(-values.shape[1] // _MOST_TICKS)
    sns.heatmap(values, ax=axis, cbar=False, **{"xticklabels": step, **look})
    axis.tick_params(axis="both", rotation=0)


def colour_range(values: xr.DataArray) -> tuple[float, float]:
    """The ends of a logarithmic scale of the numbers there are, but for the lowest twentieth."""
    positive = values.values[values.values > 0]
    if not positive.size:
        return 1e-3, 1e-2
    high = float(positive.max())
    return min(float(np.quantile(positive, 0.05)), high / 10), high


def medians(values: xr.DataArray, over: str | Sequence[str]) -> xr.DataArray:
    """Medians of what was measured; NaN where nothing was."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        return values.median(over, skipna=True)


def axis_label(array: xr.DataArray) -> str:
    """A variable's name with its unit, as it stands on an axis."""
    units = array.attrs.get("units", "1")
    name = array.attrs.get("long_name", array.name)
    return f"{name} ({units})" if units != "1" else str(name)


def panel_title(results: xr.Dataset, model: str) -> str:
    """The title of one model's panel."""
    n_layers = int(results.n_layers.sel(model=model))
    return f"{model} ({n_layers} layers)"


def measured_cells(results: xr.Dataset) -> dict[str, int]:
    """How many cells of each model are complete."""
    models = results.model.values.tolist()
    if "completed" not in results or results.completed.dims != ("model", "cell"):
        return dict.fromkeys(models, results.sizes.get("cell", 0))
    return dict(zip(models, results.completed.sum("cell").values.tolist(), strict=True))


def grid_title(results: xr.Dataset) -> str:
    """A figure's title: the experiment, its grid, and how many of its cells were measured."""
    experiment, grid = results.attrs["experiment"], results.attrs["grid"]
    if "cell" not in results.sizes:
        done = results.completed.any("model")
        return f"{experiment} · {grid}, {int(done.sum())} of {done.size} measured"
    return f"{experiment} · {grid} grid, {_counted(results)}"


def _counted(results: xr.Dataset) -> str:
    of_grid, measured = results.sizes["cell"], measured_cells(results)
    counts = set(measured.values())
    if counts == {of_grid}:
        return f"{of_grid} cells"
    if len(counts) == 1:
        return f"{counts.pop()} of its {of_grid} cells"
    each = ", ".join(f"{count} ({model})" for model, count in measured.items())
    return f"{each} of its {of_grid} cells"


def left_out(results: xr.Dataset, names: Sequence[str]) -> str:
    """Which layers have no number of these variables, as a caption says it; or nothing."""
    sentences: dict[str, str] = {}
    for name in names:
        array = results[name]
        if "layer" not in array.dims:
            continue
        empty = array.isnull().all([dim for dim in array.dims if dim != "layer"])
        missing = array.layer.values[empty.values].tolist()
        if missing:
            sentences.setdefault(_ranges(missing), axis_label(array).partition(" (")[0])
    return " ".join(f"Not at layer {at}: {name}." for at, name in sentences.items())


def _ranges(layers: Sequence[int]) -> str:
    """Layers as they are said: ``0, 5–8``."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in spans)
