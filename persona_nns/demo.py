"""The demo: local additivity on the bundled models, from model to figure."""

import shlex
from pathlib import Path

import xarray as xr
from rich import box
from rich.console import Console
from rich.table import Table

from persona_nns.catalog import load_experiment
from persona_nns.models import bundled_models, load_model
from persona_nns.plots import draw, save_figure
from persona_nns.runs import run
from persona_nns.store import open_results
from persona_nns.tables import number

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
    drawn: list[str] = []
    for grid in GRIDS:
        results = open_results(store, experiment.name, run=runs[grid])
        console.print(_summary(results))
        for name, figure in draw(results, experiment.name).items():
            drawn += save_figure(figure, figures / f"{grid}-{name}.png", pdf=True)
    console.print(CAVEAT, style="italic")
    closing = (
        f"Results: {store}\n"
        f"Figures: {len(drawn)} files in {figures}, such as {drawn[0]}\n"
        f"More: persona-nns show {shlex.quote(store)} {experiment.name} --grid long"
    )
    console.print(closing, markup=False, highlight=False, soft_wrap=True)


def _summary(results: xr.Dataset) -> Table:
    """Median KL by layer and position, with the paper's question answered layer by layer."""
    n_cells = results.sizes["cell"]
    table = Table(
        title=f"{results.attrs['grid']} grid ({n_cells} cells): median KL in nats after putting "
        "h_BB + ΔX + ΔY in place of h_XY at one site",
        caption="Below 0.1 nat the substituted run is close to the clean one (the paper's line).",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
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
                *map(number, medians.sel(site).values),
                number(float(cosines.sel(site))),
                end_section=layer == layers[-1],
            )
    return table
