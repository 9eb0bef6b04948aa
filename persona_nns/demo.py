"""The demo: local additivity on the bundled models, from model to figure."""

from collections.abc import Iterator
from pathlib import Path

import xarray as xr
from rich.console import Console
from rich.table import Table

from persona_nns.catalog import bundled_experiments, load_experiment
from persona_nns.errors import UsageError
from persona_nns.models import bundled_models, load_model
from persona_nns.plots import default_figures, save_figure
from persona_nns.runs import run
from persona_nns.store import open_results

GRIDS = ("short", "long")
CAVEAT = (
    "The bundled models are trained on synthetic text to show this shape; evidence about the "
    "method and the code, not about language models."
)


def run_demo(store: str, figures: Path, console: Console) -> None:
    """Run `localized_positions` on every bundled model and both grids of the paper.

    Args:
        store: where the results go; what it already holds is not computed again.
        figures: folder for the figures.
        console: where the tables are printed.
    """
    experiment = load_experiment("localized_positions")
    runs: dict[str, list[str]] = {grid: [] for grid in GRIDS}
    for name in bundled_models():
        model = load_model(name)
        for grid in GRIDS:
            results = run(experiment, model, grid, layers="all", store=store)
            runs[grid].append(results.attrs["run"])
    paths: list[str] = []
    for grid in GRIDS:
        results = open_results(store, experiment.name, run=runs[grid])
        console.print(_summary(results))
        paths += draw(results, experiment.name, store, figures / f"{grid}.png", both=True)
    console.print(CAVEAT, style="italic")
    console.print(f"\nResults: {store}\nFigures: {', '.join(paths)}", soft_wrap=True)


def draw(
    results: xr.Dataset,
    experiment: str,
    store: str,
    output: Path | None,
    *,
    both: bool = False,
) -> list[str]:
    """Draw and save an experiment's figures.

    Args:
        results: what to draw.
        experiment: its name, or its file; one that is unknown here is drawn in a plain way.
        store: where the results came from.
        output: file of the first figure; the others add their name to it. None: beside the
            store, as PNG and PDF.
        both: write a PDF beside every PNG.
    """
    return list(_draw(results, experiment, store, output, both=both))


def _draw(
    results: xr.Dataset, experiment: str, store: str, output: Path | None, *, both: bool
) -> Iterator[str]:
    known = experiment in bundled_experiments() or experiment.endswith(".py")
    functions = load_experiment(experiment).figures if known else {}
    drawn = {name: function(results) for name, function in functions.items()}
    drawn = drawn or default_figures(results)
    if not drawn:
        raise UsageError(f"{experiment!r} has no numbers over layers, so there is nothing to draw.")
    folder = Path() if "://" in store else Path(store).parent
    for index, (name, figure) in enumerate(drawn.items()):
        if output is None:
            file = folder / f"{Path(experiment).stem}-{results.attrs['grid']}-{name}.png"
        else:
            file = output if index == 0 else output.with_stem(f"{output.stem}-{name}")
        yield from save_figure(figure, file, pdf=both or output is None)


def _summary(results: xr.Dataset) -> Table:
    """Median KL by layer and position, with the paper's question answered layer by layer."""
    n_cells = results.sizes["cell"]
    table = Table(
        title=f"{results.attrs['grid']} grid ({n_cells} cells): median KL in nats after putting "
        "h_BB + ΔX + ΔY in place of h_XY at one site",
        caption="Below 0.1 nat the substituted run is close to the clean one (the paper's line).",
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("model", "layer", "depth"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for position in results.position.values.tolist():
        table.add_column(position, justify="right")
    medians = results.kl.median("cell").dropna("layer", how="all")
    cosines = results.cos_additive.median("cell").sel(position="p_last")
    table.add_column("cos(ΔXY, ΔX+ΔY) at p_last", justify="right")
    for model in results.model.values.tolist():
        layers = medians.sel(model=model).dropna("layer", how="all").layer.values.tolist()
        for layer in layers:
            site = {"model": model, "layer": layer}
            table.add_row(
                model if layer == layers[0] else "",
                str(layer),
                f"{float(results.depth.sel(site)):.2f}",
                *(f"{value:.3f}" for value in medians.sel(site).values),
                f"{float(cosines.sel(site)):.3f}",
                end_section=layer == layers[-1],
            )
    return table
