"""An experiment's figures, drawn and saved."""

from pathlib import Path

import matplotlib as mpl
import xarray as xr
from matplotlib.figure import Figure

from persona_nns.declarations.catalog import bundled_experiments, load_experiment
from persona_nns.errors import UsageError
from persona_nns.figures.by_layer import lines_by_layer


def draw(results: xr.Dataset, experiment: str) -> dict[str, Figure]:
    """An experiment's figures by name.

    Args:
        results: what to draw.
        experiment: its name or its file, which says what to draw; the results of one that is
            unknown here are drawn in a plain way.

    Raises:
        UsageError: there is nothing to draw.
    """
    known = experiment in bundled_experiments() or experiment.endswith(".py")
    functions = load_experiment(experiment).figures if known else {}
    figures = {name: function(results) for name, function in functions.items()}
    figures = figures or default_figures(results)
    if not figures:
        raise UsageError(f"{experiment!r} has no numbers over layers, so there is nothing to draw.")
    return figures


def default_figures(results: xr.Dataset) -> dict[str, Figure]:
    """What is drawn for an experiment that brings no figures: each number against layer."""
    names = [
        str(name)
        for name, array in results.data_vars.items()
        if {"cell", "layer"} <= set(array.dims) <= {"model", "cell", "layer", "position"}
        and array.dtype.kind == "f"
    ]
    return {f"{name}_by_layer": lines_by_layer(results, [name]) for name in names}


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

    Raises:
        UsageError: the file cannot be written.
    """
    files = [file, file.with_suffix(".pdf")] if pdf else [file]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context({"pdf.fonttype": 42}):
            for path in files:
                figure.savefig(path, bbox_inches="tight", dpi=200)
    except OSError as error:
        raise UsageError(f"The figure {str(file)!r} cannot be written: {error}.") from error
    return [str(path) for path in files]
