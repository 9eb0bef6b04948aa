"""Figures as a paper takes them: a column wide, with 8 pt text, the caption apart from the figure.

On a screen a figure has a title and says below itself what it shows. In a paper the caption does:
there, a figure keeps both as text, and `save_figure` writes them beside it.
"""

import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator
from numpy.typing import NDArray

from persona_nns.figures import seaborn as sns

Style = Literal["screen", "paper"]
_COLUMN, _PAGE = 3.25, 6.75  # inches: a column of two, and both with the gap between them
_FITS = 7.5  # inches on a screen that can be read in a column
_POINTS = 8.0
_SEABORN = 9.6  # points of its context "paper"
_HANDLE, _CHARACTER = 0.5, 0.075  # inches: a line in a legend, and a letter anywhere
_FONTS: dict[Any, float] = dict.fromkeys(
    (
        "font.size",
        "axes.labelsize",
        "axes.titlesize",
        "figure.titlesize",
        "legend.fontsize",
        "legend.title_fontsize",
        "xtick.labelsize",
        "ytick.labelsize",
    ),
    _POINTS,
)
_style: ContextVar[Style] = ContextVar("style", default="screen")


class DrawnFigure(Figure):
    """A figure that a notebook shows where a cell ends with it, without pyplot.

    Attributes:
        caption: what it shows, where it does not say so itself; else empty.
        is_for_paper: whether its size is to be kept.
    """

    caption: str = ""
    is_for_paper: bool = False

    def _repr_png_(self) -> bytes:
        image = io.BytesIO()
        self.savefig(image, format="png", bbox_inches="tight")
        return image.getvalue()


@contextmanager
def figure_style(style: Style) -> Iterator[None]:
    """The style of all figures that are drawn in here; figures of one's own have its fonts."""
    token = _style.set(style)
    try:
        with mpl.rc_context(_FONTS if style == "paper" else {}):
            yield
    finally:
        _style.reset(token)


def is_for_paper() -> bool:
    """Whether a figure that is drawn now is to go into a paper."""
    return _style.get() == "paper"


def fonts(font_scale: float) -> dict[Any, Any]:
    """Seaborn's context for the text of a figure: scaled, or for a paper all of one size.

    Args:
        font_scale: of all text, on a screen.
    """
    if not is_for_paper():
        return sns.plotting_context("paper", font_scale=font_scale)
    return sns.plotting_context("paper", font_scale=_POINTS / _SEABORN) | _FONTS


def new_figure(size: tuple[float, float], font_scale: float) -> DrawnFigure:
    """An empty figure; for a paper, as wide as one of its columns.

    What is too wide for that on a screen is as wide as the page. The height shrinks as the text
    does.

    Args:
        size: on a screen, width and height in inches.
        font_scale: of all text, on a screen.
    """
    if is_for_paper():
        width = _COLUMN if size[0] <= _FITS else _PAGE
        size = (width, size[1] * min(1.0, _POINTS / (_SEABORN * font_scale)))
    figure = DrawnFigure(figsize=size, dpi=150, layout="constrained")
    figure.is_for_paper = is_for_paper()
    return figure


def legend_below(figure: Figure, labels: Sequence[str]) -> dict[str, Any]:
    """Settings of a legend below the panels, with as many entries in a row as have room.

    Args:
        figure: the whole of it.
        labels: of the legend.
    """
    entry = _HANDLE + _CHARACTER * max(map(len, labels), default=0)
    n_columns = max(1, min(len(labels), int(figure.get_figwidth() / entry)))
    return {"loc": "outside lower center", "ncols": n_columns, "columnspacing": 1.0}


def fit_text(axes: NDArray[Any]) -> None:
    """Break titles and labels that are longer than their panels, and slant names that meet.

    Args:
        axes: panels of one figure, [row, column].
    """
    width, height = axes[0, 0].figure.get_size_inches() / axes.shape[::-1] / _CHARACTER
    for axis in axes.flat:
        axis.set_title(_broken(axis.get_title(), 0.9 * width))
        axis.set_xlabel(_broken(axis.get_xlabel(), 0.9 * width))
        axis.set_ylabel(_broken(axis.get_ylabel(), 0.7 * height))
        if isinstance(axis.xaxis.get_major_locator(), FixedLocator):
            _slant(axis.get_xticklabels(), 0.8 * width)


def _slant(names: Sequence[Text], width: float) -> None:
    """Slant names that have no room beside each other; numbers are short."""
    words = [name.get_text() for name in names]
    if any(map(str.isalpha, "".join(words))) and sum(map(len, words)) + len(words) > width:
        for name in names:
            name.set(rotation=30, horizontalalignment="right")


class _Wrapper(textwrap.TextWrapper):
    """Breaks lines behind hyphens too, as the names of models have them."""

    wordsep_re = re.compile(r"(\s+|(?<=-)(?=\S))")


def _broken(text: str, width: float) -> str:
    wrapper = _Wrapper(max(int(width), 1), break_long_words=False)
    return "\n".join(wrapper.fill(line) for line in text.splitlines())
