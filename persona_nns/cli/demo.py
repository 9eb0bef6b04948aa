"""The demo: the paper's story from model to figure, in three acts, on a language model.

Persona and task add up locally; a vector injected into another prompt does not replace the persona
text; the keys and values of the persona's tokens do what one vector cannot.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xarray as xr
from rich.console import Console
from rich.table import Table
from rich.text import Text

from persona_nns.declarations.catalog import load_experiment
from persona_nns.errors import PersonaError
from persona_nns.figures.drawing import draw, save_figure
from persona_nns.figures.tables import new_table, number
from persona_nns.models.checkpoints import bundled_models
from persona_nns.models.fetched import fetch_model
from persona_nns.models.load import load_model
from persona_nns.results.reading import open_results
from persona_nns.runs.run import run

GRIDS = ("short", "long")
REAL = "smollm2-135m-instruct"
Request = tuple[str, str, dict[str, Any]]
"""Experiment, grid, and what is asked for beside the defaults."""


@dataclass(frozen=True)
class Story:
    """What the demo is told on.

    Attributes:
        models: their names.
        folder: where its figures go, below the folder of all figures.
        requests: what is run.
        caveat: what its numbers are evidence about.
    """

    models: tuple[str, ...]
    folder: str
    requests: tuple[Request, ...]
    caveat: str


def _requests(
    additive: dict[str, Any], grafts: dict[str, Any], knockouts: dict[str, Any]
) -> tuple[Request, ...]:
    return (
        *(("localized_positions", grid, additive) for grid in GRIDS),
        ("behavioral_markers", "review", {}),
        ("host_injection", "review", {}),
        ("kv_graft", "review", grafts),
        ("attention_knockout", "review", knockouts),
    )


_FIVES = [f"{k},0:{k},{k}:30" for k in range(5, 30, 5)]
#: 30 layers: the additive KL at the five depths of the paper, and some bands of layers.
ON_A_LANGUAGE_MODEL = Story(
    models=(REAL,),
    folder=REAL,
    requests=_requests({}, {"bands": f"0,{','.join(_FIVES)}"}, {"bands": "0:15,15:30"}),
    caveat="One small language model (135M parameters, weights of 4 bits dequantised). Whether it "
    "is so elsewhere, the same commands with another --model say.",
)
#: 8 layers, seconds each: every layer and every band.
ON_ORGANISMS = Story(
    models=tuple(bundled_models()),
    folder="organisms",
    requests=_requests({"layers": "all"}, {}, {}),
    caveat="The bundled models are trained on synthetic text to show this shape; evidence about "
    "the method and the code, not about language models.",
)
_CONDITIONS = {
    "clean": "the role prompt",
    "additive": "h_BB + ΔX + ΔY in place of h_XY",
    "remove_persona": "h_XY − ΔX in place of h_XY",
    "bare": "the task alone",
}


def choose_story(*, quick: bool, console: Console) -> Story:
    """The story on a language model, which is fetched; on the bundled ones where it cannot be.

    Args:
        quick: the bundled models are asked for.
        console: where it is said that, and why, the language model cannot be had.
    """
    if quick:
        return ON_ORGANISMS
    try:
        fetch_model(REAL)
    except PersonaError as error:
        went_on = f"{error}\nThe demo runs on the bundled models instead, as with --quick."
        console.print(went_on, markup=False, highlight=False, soft_wrap=True)
        return ON_ORGANISMS
    return ON_A_LANGUAGE_MODEL


def run_demo(story: Story, store: str, figures: Path, console: Console) -> None:
    """Run the paper's experiments, and what goes past them.

    Args:
        story: from `choose_story`.
        store: where the results go; what it already holds is not computed again.
        figures: folder for the figures.
        console: where the tables are printed.
    """
    runs: dict[tuple[str, str], list[str]] = {}
    for name in story.models:
        model = load_model(name)
        for experiment, grid, asked in story.requests:
            results = run(load_experiment(experiment), model, grid, store=store, **asked)
            runs.setdefault((experiment, grid), []).append(results.attrs["run"])
    drawn: list[str] = []
    opened: dict[tuple[str, str], xr.Dataset] = {}
    for experiment, grid in runs:
        results = open_results(store, experiment, run=runs[experiment, grid])
        opened[experiment, grid] = results
        for name, figure in draw(results, experiment).items():
            file = figures / story.folder / f"{experiment}-{grid}-{name}.png"
            drawn += save_figure(figure, file, pdf=True)
    console.print(Text("\n1. Local additivity holds", style="bold"))
    for grid in GRIDS:
        console.print(_additivity(opened["localized_positions", grid]))
    console.print(Text("2. Injection does not replace the prompt", style="bold"))
    markers, host = (opened[name, "review"] for name in ("behavioral_markers", "host_injection"))
    console.print(_injection(markers, host))
    console.print(Text("3. Keys and values carry what a vector cannot", style="bold"))
    grafts, knockout = (opened[name, "review"] for name in ("kv_graft", "attention_knockout"))
    console.print(_grafts(grafts, knockout))
    console.print(story.caveat, style="italic")
    closing = (
        f"Results: {store}\n"
        f"Figures: {len(drawn)} files in {figures / story.folder}, such as {drawn[0]}\n"
        f"More: persona-nns show {shlex.quote(store)} localized_positions --grid long"
    )
    console.print(closing, markup=False, highlight=False, soft_wrap=True)


def _additivity(results: xr.Dataset) -> Table:
    """Median KL by layer and position, with the paper's question answered layer by layer."""
    n_cells = results.sizes["cell"]
    table = new_table(
        f"{results.attrs['grid']} grid ({n_cells} cells): median KL in nats after putting "
        "h_BB + ΔX + ΔY in place of h_XY at one site",
        texts=["model"],
        numbers=["layer", "depth", *results.position.values, "cos(ΔXY, ΔX+ΔY) at p_last"],
        caption="Below 0.1 nat the substituted run is close to the clean one (the paper's line).",
    )
    medians = results.kl.median("cell").dropna("layer", how="all")
    cosines = results.cos_additive.median("cell").sel(position="p_last")
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
    table = new_table(
        f"Markers of the persona in 80 tokens, and injection at p_last of one layer "
        f"({host.sizes['cell']} cells)",
        texts=[""],
        numbers=host.model.values,
        caption="The host is the prompt with the baseline persona. Closure: the share of the "
        "host's KL to the role prompt that injecting the role prompt's own residual h_XY removes.",
    )
    found = markers.any_marker.isel(layer=0, drop=True).mean("cell").sel(model=host.model)
    shares = {what: found.sel(condition=condition) for condition, what in _CONDITIONS.items()}
    injected = host.any_marker.sel(site="p_last", source="oracle").mean("cell")
    for what, share in {**shares, "the host after injection": injected}.items():
        row = (f"{100 * value:.0f} %" for value in share.values)
        table.add_row(f"texts with a marker: {what}", *row)
    medians = host[["kl", "closure"]].isel(layer_set=0).median("cell")
    for what, values in (
        ("median KL of the host", medians.kl.sel(source="none")),
        ("median KL of the host after injection", medians.kl.sel(source="oracle")),
        ("median closure", medians.closure.sel(source="oracle")),
    ):
        table.add_row(what, *map(number, values.values))
    return table


def _grafts(grafts: xr.Dataset, knockout: xr.Dataset) -> Table:
    """What grafted spans of the key-value cache close, and what cutting attention to them does."""
    table = new_table(
        "Median closure when spans of the role prompt's key-value cache are grafted into the host",
        texts=["graft"],
        numbers=[*grafts.model.values, "kB"],
        caption="Knocked out: no position after the persona attends to its tokens. How much of the "
        "way to the host the run has then gone: 1 − KL(host ‖ knocked out) / KL(host ‖ clean).",
    )
    closure, size = grafts.closure.median("cell"), grafts.cache_bytes.median(["model", "cell"])
    n_layers = int(grafts.n_layers.max())
    for graft, band, what in (
        ("persona", "0", "persona, layer 0 only"),
        ("persona", f"0:{n_layers // 2}", "persona, first half of the layers"),
        ("persona", f"{n_layers // 2}:{n_layers}", "persona, second half"),
        ("persona", "all", "persona"),
        ("task+tail", "all", "task and tail"),
        ("persona+task", "all", "persona and task"),
        ("all", "all", "all of them"),
    ):
        site = {"graft": graft, "layer_band": band}
        kilobytes = f"{float(size.sel(site)) / 1000:.0f}"
        table.add_row(what, *map(number, closure.sel(site).values), kilobytes)
    table.add_section()
    left = knockout.kl_host.sel(blocked="later", layer_band="all") / knockout.kl_host_clean
    gone = 1 - left.median("cell").sel(model=grafts.model)
    table.add_row("persona knocked out", *map(number, gone.values), "")
    return table
