"""The figures of the findings: ``python docs/findings/draw.py STORE FOLDER``."""

import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path

import xarray as xr
from matplotlib.figure import Figure

import persona_nns as pn
from persona_nns.declarations import load_experiment
from persona_nns.figures import (
    closure_by_budget,
    methods_by_bytes,
    persona_tokens,
    role_map,
    role_ranking,
    save_figure,
)

REAL = "smollm2-135m-instruct"


def draw(store: str, folder: Path) -> None:
    """Draw every figure, as a PNG file."""
    for name, figure in FIGURES.items():
        drawn = figure(store)
        assert drawn is not None, f"{name} shows what was not measured"
        save_figure(drawn, folder / f"{name}.png")


def opened(store: str, experiment: str, grid: str | None = None) -> xr.Dataset:
    """An experiment's results on the language model: of several runs, the one with most numbers."""
    runs = [
        pn.open_results(store, experiment, run=info.run)
        for info in pn.list_runs(store, experiment)
        if info.attrs["model"] == REAL and grid in (None, info.attrs["grid"])
    ]
    return max(runs, key=lambda results: results.nbytes)


def methods(store: str) -> Figure:
    """Every way to bring a persona to the host, against its bytes."""
    on_review = ("kv_budget", "kv_graft", "host_injection")
    each = {name: opened(store, name, "review") for name in on_review}
    runs = pn.list_runs(store, "persona_cartridge")
    kinds = [pn.open_results(store, "persona_cartridge", run=info.run) for info in runs]
    every = reduce(lambda one, other: one.combine_first(other), kinds)
    return methods_by_bytes({**each, "persona_cartridge": every})


def additivity(store: str) -> Figure:
    """What the additive residual does to the next tokens, by layer."""
    experiment = load_experiment("localized_positions")
    return experiment.figures["kl_by_layer"](opened(store, "localized_positions", "short"))


FIGURES: dict[str, Callable[[str], Figure | None]] = {
    "additivity": additivity,
    "roles": lambda store: role_map(opened(store, "persona_space")),
    "roles-ranking": lambda store: role_ranking(opened(store, "persona_space")),
    "heads": lambda store: closure_by_budget(opened(store, "head_budget")),
    "tokens": lambda store: persona_tokens(opened(store, "kv_budget", "review")),
    "methods": methods,
}

if __name__ == "__main__":
    draw(sys.argv[1], Path(sys.argv[2]))
