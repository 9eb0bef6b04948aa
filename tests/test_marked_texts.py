"""Texts with their markers made visible, and personas that show none even in clean texts."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.text import Text as Drawn
from nnsight import TransformersModel
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

import persona_nns as pn
from persona_nns.cli.commands import app
from persona_nns.errors import UsageError
from persona_nns.figures.estimates import estimates
from persona_nns.figures.tables import result_table
from persona_nns.figures.texts import marked_texts
from persona_nns.prompts.grids import Grid
from persona_nns.prompts.markers import marker_spans
from persona_nns.results.measured import clean_marker_note, without_clean_markers

CONDITIONS = ["clean", "additive"]
SAID = {
    "chef/plan": ["A menu [of the day].", "The MENU, the season."],
    "chef/haiku": ["Nothing.", "Season."],
    "yoda/plan": ["Nothing at all.", "A menu, hmm."],
}


def results(
    changes: Mapping[str, list[str]] = {}, *, models: tuple[str, ...] = ("m",)
) -> xr.Dataset:
    """Two personas, of which Yoda says no marker of his in the clean run; two layers."""
    cells, said = list(SAID), {**SAID, **changes}
    markers = {"chef": ["menu", "season"], "yoda": ["hmm", "of-the force"]}
    text = np.array([[said[cell] for _ in range(2)] for cell in cells], dtype=object)
    found = np.array(
        [
            [[bool(marker_spans(one, markers[cell[:4]])) for one in of] for of in by_layer]
            for cell, by_layer in zip(cells, text.tolist(), strict=True)
        ]
    )
    dims, n = ("model", "cell", "layer", "condition"), len(models)
    return xr.Dataset(
        {
            "any_marker": (dims, np.stack([found] * n), {"kind": "bool", "long_name": "any"}),
            "text": (dims, np.stack([text] * n)),
            "completed": (("model", "cell"), np.ones((n, len(cells)), bool)),
        },
        coords={
            "model": np.array(models, dtype=object),
            "cell": np.array(cells, dtype=object),
            "persona": ("cell", np.array([cell[:4] for cell in cells], dtype=object)),
            "task": ("cell", np.array([cell[5:] for cell in cells], dtype=object)),
            "layer": [3, 7],
            "condition": np.array(CONDITIONS, dtype=object),
            "n_layers": ("model", [10] * n),
        },
        attrs={"experiment": "e", "grid": "g", "markers": json.dumps(markers)},
    )


def test_markers_are_found_where_they_stand() -> None:
    text = "Shipping a menu; MENUS, menu. Capital-efficiently."
    spans = marker_spans(text, ["menu", "MENU", "capital-efficient", "ship"])
    assert [text[span.start : span.stop] for span in spans] == ["Capital-efficient", "menu", "menu"]


def test_each_cell_has_its_texts_with_the_markers_in_them() -> None:
    tables = list(marked_texts(results()))
    assert len(tables) == 3
    console = Console(width=100)
    with console.capture() as capture:
        console.print(tables[0])
    shown = capture.get()
    assert "m · chef/plan" in shown
    assert shown.count("A menu [of the day].") == 1  # the same at both layers
    assert "menu, season" in shown
    *_, texts = tables[0].columns
    said = [cell for cell in texts.cells if isinstance(cell, Text)]
    marked = [[cell.plain[span.start : span.end] for span in cell.spans] for cell in said]
    assert marked == [["menu"], ["MENU", "season"]]
    with pytest.raises(UsageError, match="'e' hold no texts"):
        next(marked_texts(results().drop_vars("text")))


def test_a_persona_without_markers_in_clean_texts_is_named() -> None:
    ds = results()
    assert without_clean_markers(ds) == {"m": ["yoda"]}
    assert clean_marker_note(ds) == "Without a marker in any clean text: yoda."
    assert "Without a marker in any clean text: yoda." in str(
        result_table(ds, "any_marker").caption
    )
    figure = estimates(ds, {"any_marker": "mean"}, x="condition", hue="layer")
    said = " ".join(text.get_text() for text in figure.findobj(Drawn))
    assert "Without a marker in any clean text: yoda." in " ".join(said.split())
    plt.close(figure)
    both = clean_marker_note(results(models=("a", "b")))
    assert both == "Without a marker in any clean text: yoda (a); yoda (b)."
    assert clean_marker_note(results({"yoda/plan": ["Hmm.", ""]})) == ""


def test_what_was_not_measured_or_looked_for_is_not_named() -> None:
    ds = results()
    ds["completed"][:, 2] = False
    assert without_clean_markers(ds) == {}
    assert without_clean_markers(results().drop_vars("any_marker")) == {}
    assert without_clean_markers(results().isel(condition=1)) == {}
    host = results().isel(condition=0, layer=0).rename(any_marker="clean_any_marker")
    assert without_clean_markers(host) == {"m": ["yoda"]}


def test_a_run_names_it_and_the_texts_are_shown(
    random_model: Callable[[str], TransformersModel], small_grid: Grid, tmp_path: Path
) -> None:
    grid = replace(small_grid, markers={"chef": ("menu",), "yoda": ("hmm",)})
    store = str(tmp_path / "s.zarr")
    own = {"cells": "chef/haiku", "n_tokens": 2, "store": store, "progress": False}
    with pytest.warns(UserWarning, match=r"any clean text: chef\. .* behavioral_markers --texts"):
        ds = pn.run("behavioral_markers", random_model("qwen2"), grid, **own)
    shown = CliRunner().invoke(app, ["show", store, "behavioral_markers", "--texts"])
    assert shown.exit_code == 0
    assert ds.attrs["model"] + " · chef/haiku" in shown.output
    assert "remove_persona" in shown.output
