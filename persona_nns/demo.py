"""The demo: the paper's story on the bundled models, from model to figure, in three acts.

Persona and task add up locally; a vector injected into another prompt does not replace the persona
text; the keys and values of the persona's tokens do what one vector cannot.
"""

import shlex
from pathlib import Path
from typing import Any

import xarray as xr
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from persona_nns.catalog import load_experiment
from persona_nns.models import bundled_models, load_model
from persona_nns.plots import draw, save_figure
from persona_nns.runs import run
from persona_nns.store import open_results
from persona_nns.tables import number

GRIDS = ("short", "long")
#: What is run: experiment, grid, and what is asked for beside the defaults.
REQUESTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    *(("localized_positions", grid, {"layers": "all"}) for grid in GRIDS),
    ("behavioral_markers", "review", {}),
    ("host_injection", "review", {}),
    ("kv_graft", "review", {}),
    ("attention_knockout", "review", {}),
)
CAVEAT = (
    "The bundled models are trained on synthetic text to show this shape; evidence about the "
    "method and the code, not about language models."
)
_CONDITIONS = ("clean", "additive", "remove_persona", "bare")
_GRAFTS = ("persona", "task+tail", "persona+task", "all")


def run_demo(store: str, figures: Path, console: Console) -> None:
    """Run the paper's experiments, and what goes past them, on every bundled model.

    Args:
        store: where the results go; what it already holds is not computed again.
        figures: folder for the figures.
        console: where the tables are printed.
    """
    runs: dict[tuple[str, str], list[str]] = {}
    for name in bundled_models():
        model = load_model(name)
        for experiment, grid, asked in REQUESTS:
            results = run(load_experiment(experiment), model, grid, store=store, **asked)
            runs.setdefault((experiment, grid), []).append(results.attrs["run"])
    drawn: list[str] = []
    opened: dict[tuple[str, str], xr.Dataset] = {}
    for experiment, grid in runs:
        results = open_results(store, experiment, run=runs[experiment, grid])
        opened[experiment, grid] = results
        for name, figure in draw(results, experiment).items():
            drawn += save_figure(figure, figures / f"{experiment}-{grid}-{name}.png", pdf=True)
    console.print(Text("\n1. Local additivity holds", style="bold"))
    for grid in GRIDS:
        console.print(_additivity(opened["localized_positions", grid]))
    console.print(Text("2. Injection does not replace the prompt", style="bold"))
    markers, host = (opened[name, "review"] for name in ("behavioral_markers", "host_injection"))
    console.print(_injection(markers, host))
    console.print(Text("3. Keys and values carry what a vector cannot", style="bold"))
    grafts, knockout = (opened[name, "review"] for name in ("kv_graft", "attention_knockout"))
    console.print(_grafts(grafts, knockout))
    console.print(CAVEAT, style="italic")
    closing = (
        f"Results: {store}\n"
        f"Figures: {len(drawn)} files in {figures}, such as {drawn[0]}\n"
        f"More: persona-nns show {shlex.quote(store)} localized_positions --grid long"
    )
    console.print(closing, markup=False, highlight=False, soft_wrap=True)


def _table(title: str, caption: str) -> Table:
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )


def _additivity(results: xr.Dataset) -> Table:
    """Median KL by layer and position, with the paper's question answered layer by layer."""
    n_cells = results.sizes["cell"]
    table = _table(
        f"{results.attrs['grid']} grid ({n_cells} cells): median KL in nats after putting "
        "h_BB + ΔX + ΔY in place of h_XY at one site",
        "Below 0.1 nat the substituted run is close to the clean one (the paper's line).",
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


def _injection(markers: xr.Dataset, host: xr.Dataset) -> Table:
    """Texts with a marker of the persona by condition, and what injection closes of the gap."""
    table = _table(
        f"Texts with a marker of the persona ({markers.sizes['cell']} cells, 80 tokens), and the "
        "baseline-persona host after h_XY is injected at p_last",
        "clean: the role prompt; additive: h_BB + ΔX + ΔY in its place; bare: the task alone. "
        "Closure: the share of the KL from the host to the role prompt that injection removes.",
    )
    table.add_column("model")
    for heading in (*_CONDITIONS, "KL none", "KL oracle", "closure", "texts with a marker"):
        table.add_column(heading, justify="right")
    for model in host.model.values.tolist():
        said = markers.any_marker.sel(model=model).isel(layer=0, drop=True)
        medians = host.isel(layer_set=0).sel(model=model)[["kl", "closure"]].median("cell")
        injected = host.any_marker.sel(model=model, site="p_last", source="oracle")
        table.add_row(
            model,
            *(f"{100 * float(said.sel(condition=name).mean()):.0f} %" for name in _CONDITIONS),
            number(float(medians.kl.sel(source="none"))),
            number(float(medians.kl.sel(source="oracle"))),
            number(float(medians.closure.sel(source="oracle"))),
            f"{100 * float(injected.mean()):.0f} %",
        )
    return table


def _grafts(grafts: xr.Dataset, knockout: xr.Dataset) -> Table:
    """What grafted spans of the key-value cache close, and what cutting attention to them does."""
    table = _table(
        "Median closure when spans of the role prompt's key-value cache are grafted into the host",
        "In brackets: size of the graft. Knockout: where no position after the persona attends to "
        "its tokens, how much of the way from the role prompt to the host the run has gone "
        "(1 − KL(host ‖ knocked out) / KL(host ‖ clean)).",
    )
    table.add_column("model")
    for heading in (*_GRAFTS, "persona, layer 0 only", "knockout"):
        table.add_column(heading, justify="right")
    for model in grafts.model.values.tolist():
        one = grafts.sel(model=model)
        closure = one.closure.median("cell")
        size = one.cache_bytes.median("cell") / 1000
        sites = [(graft, "all") for graft in _GRAFTS] + [("persona", "0")]
        cut = knockout.sel(model=model)
        gone = 1 - cut.kl_host.sel(blocked="later", layer_band="all") / cut.kl_host_clean
        table.add_row(
            model,
            *(
                f"{number(float(closure.sel(graft=graft, layer_band=band)))} "
                f"({float(size.sel(graft=graft, layer_band=band)):.0f} kB)"
                for graft, band in sites
            ),
            number(float(gone.median("cell"))),
        )
    return table
