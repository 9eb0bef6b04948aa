"""An experiment's figures, drawn and saved."""

import hashlib
from pathlib import Path
from typing import Any

import matplotlib as mpl
import xarray as xr
from matplotlib.figure import Figure

from persona_nns.declarations.catalog import (
    Experiment,
    bundled_experiments,
    load_experiment,
    shown_where,
)
from persona_nns.errors import UsageError
from persona_nns.figures.default import default_figures
from persona_nns.figures.paper import DrawnFigure, Style, figure_style
from persona_nns.results.attributes import read_attribute

# Models that a file's name has room for.
_MOST_NAMED = 3


def draw(results: xr.Dataset, experiment: str, *, style: Style = "screen") -> dict[str, Figure]:
    """An experiment's figures by name.

    Args:
        results: what to draw.
        experiment: its name or its file, which says what to draw. The results of one that is
            unknown here are drawn as the file says that they were made with, or, where it is no
            longer there, in a plain way.
        style: ``paper`` for figures as wide as a column, with 8 pt text.

    Raises:
        UsageError: there is nothing to draw.
    """
    figures: dict[str, Figure] = {}
    with figure_style(style):
        if loaded := _loaded(results, experiment):
            with shown_where(loaded):
                drawn = {name: function(results) for name, function in loaded.figures.items()}
            # None is a figure of what this run was not asked to measure.
            figures = {name: figure for name, figure in drawn.items() if figure is not None}
        figures = figures or default_figures(results)
    if not figures:
        raise UsageError(f"{experiment!r} has measured no numbers, so there is nothing to draw.")
    return figures


def draw_one(results: xr.Dataset, experiment: str, figure: str) -> Figure:
    """One of an experiment's figures; the others are not drawn.

    Args:
        results: what to draw.
        experiment: its name or its file, as for `draw`.
        figure: the name of the figure.

    Raises:
        UsageError: there is no such figure, or nothing of it was measured.
    """
    loaded = _loaded(results, experiment)
    if not (loaded and loaded.figures):
        drawn = default_figures(results)
        if figure in drawn:
            return drawn[figure]
        raise UsageError(f"There is no figure {figure!r}; there are: {', '.join(drawn)}.")
    if figure not in loaded.figures:
        known = ", ".join(loaded.figures)
        raise UsageError(f"{experiment!r} has no figure {figure!r}; it has: {known}.")
    with shown_where(loaded):
        one = loaded.figures[figure](results)
    if one is None:
        raise UsageError(f"This run has not measured what the figure {figure!r} shows.")
    return one


def _loaded(results: xr.Dataset, experiment: str) -> Experiment | None:
    """The experiment that says what to draw, where there is a file of it."""
    file = experiment
    if not (experiment in bundled_experiments() or experiment.endswith(".py")):
        file = _own_file(results, experiment)
    return load_experiment(file) if file else None


def _own_file(results: xr.Dataset, experiment: str) -> str | None:
    """The file that the results were made with, where it is on this machine."""
    noted = read_attribute(results, "file")
    files = noted if isinstance(noted, list) else [noted]
    known = [file for file in files if file and Path(file).stem == experiment]
    return next((file for file in known if file.endswith(".py") and Path(file).is_file()), None)


def file_stem(results: xr.Dataset, experiment: str) -> str:
    """What the names of files of these results begin with: experiment, models, grid, run.

    Those of other models or runs begin otherwise.
    """
    noted = read_attribute(results, "run")
    runs = list(map(str, noted if isinstance(noted, list) else [noted]))
    if len(runs) == 1:
        return f"{experiment}-{runs[0]}"
    models = [model.replace("/", "--") for model in map(str, results.model.values)]
    named = "+".join(models) if len(models) <= _MOST_NAMED else f"{len(models)}-models"
    digest = hashlib.sha256(" ".join(sorted(runs)).encode()).hexdigest()[:10]
    return f"{experiment}-{named}.{results.attrs['grid']}.{digest}"


def check_format(file: Path) -> None:
    """See that a figure can be written under this name.

    Raises:
        UsageError: no such format, or no such folder to make.
    """
    formats = sorted(Figure().canvas.get_supported_filetypes())
    if file.suffix.removeprefix(".").lower() not in formats:
        raise UsageError(
            f"{str(file)!r} does not end in a figure format; use one of {', '.join(formats)}."
        )


def save_figure(figure: Figure, file: Path, *, pdf: bool = False) -> list[str]:
    """Write a figure, and a PDF beside it if asked for; returns what was written.

    One for a paper keeps its width, and its caption is a text file beside it. Fonts are in the PDF.

    Raises:
        UsageError: the file cannot be written.
    """
    files = [file, file.with_suffix(".pdf")] if pdf else [file]
    caption = figure.caption if isinstance(figure, DrawnFigure) else ""
    whole = isinstance(figure, DrawnFigure) and figure.is_for_paper
    # What sticks out is in the picture too, which then is wider than it was drawn.
    look: dict[str, Any] = {"dpi": 300} if whole else {"dpi": 200, "bbox_inches": "tight"}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context({"pdf.fonttype": 42}):
            for path in files:
                figure.savefig(path, **look)
        if caption:
            files.append(file.with_suffix(".txt"))
            files[-1].write_text(caption + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"The figure {str(file)!r} cannot be written: {error}.") from error
    return [str(path) for path in files]
