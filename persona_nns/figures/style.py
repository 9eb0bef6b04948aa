"""What all figures share: panels with their labels, one legend, and how a median is drawn.

Seaborn draws into the panels. Its own figure-level functions are not used: they make figures of
pyplot, which keeps them open and belongs to the notebook or program that calls us. Colours are
seaborn's colour-blind palette.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

DOTTED: dict[str, Any] = {"color": "0.4", "linestyle": ":", "linewidth": 1.2}
#: A solid line with a marker of its own for each label.
MARKED: dict[str, Any] = {"markers": True, "dashes": False, "palette": "colorblind"}
MEDIANS = "median over cells, band 25–75 %"  # what `draw_medians` draws
_QUARTILES = ("pi", 50)  # 25–75 % of the cells


@dataclass(frozen=True)
class Panels:
    """A figure of panels.

    Attributes:
        figure: the whole of it.
        axes: its panels, [row, column].
        rows: what each row shows.
        columns: what each column shows.
    """

    figure: Figure
    axes: NDArray[Any]
    rows: Sequence[Any]
    columns: Sequence[Any]

    def __iter__(self) -> Iterator[tuple[Any, Any, Axes]]:
        """Each panel with what its row and its column show."""
        for row, axes in zip(self.rows, self.axes, strict=True):
            for column, axis in zip(self.columns, axes, strict=True):
                yield row, column, axis

    def title(self, text: str) -> None:
        """The title of the figure."""
        self.figure.suptitle(text, fontsize="medium")

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
            self.figure.legend(*zip(*shown, strict=True), **settings)

    def colorbar(self, label: str, **look: Any) -> None:
        """One colour bar for the heatmaps of all panels, which share their scale."""
        self.figure.colorbar(self.axes[0, 0].collections[0], ax=self.axes, label=label, **look)


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
    with sns.axes_style(look), sns.plotting_context("paper", font_scale=font_scale):
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        axes = figure.subplots(len(rows), len(columns), squeeze=False, **settings)
        yield Panels(figure, axes, rows, columns)


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
    """Lines of medians of ``value`` with a band over the quartiles, against layers.

    Args:
        axis: the panel.
        frame: from `long_form`.
        x: the column of layers.
        hue: the column whose labels have a line each; without it there is one line.
    """
    look = MARKED if hue else {"marker": "o"}
    draw_lines(axis, frame, x, hue, estimator="median", errorbar=_QUARTILES, **look)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def dodge(k: int, n: int, width: float = 0.5) -> float:
    """How far the k-th of n series stands from its label, so that they stand side by side.

    Args:
        k: its index.
        n: number of series.
        width: that all of them take, of the distance between labels.
    """
    return width * ((k + 0.5) / n - 0.5)


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


def grid_title(results: xr.Dataset, what: str, separator: str = " · ") -> str:
    """A figure's title: the experiment, its grid and cells, and what is drawn of them."""
    experiment, grid = results.attrs["experiment"], results.attrs["grid"]
    return f"{experiment} · {grid} grid, {results.sizes['cell']} cells{separator}{what}"
