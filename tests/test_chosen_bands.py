"""A run that is asked for fewer bands, or no heads, measures what the whole run does, of those."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from nnsight import TransformersModel

import persona_nns as pn
from persona_nns.cli.shortening import shorten, some_of
from persona_nns.declarations import band_labels, load_experiment
from persona_nns.declarations.bands import check_bands, choose_bands
from persona_nns.figures import draw
from persona_nns.prompts.grids import Grid


@pytest.mark.parametrize(
    ("asked", "labels"),
    [
        ("every", band_labels(5)),
        ("all", ["all"]),
        ("3,0:2", ["all", "3", "0:2"]),
        ("0:5, 4:5,all,4", ["all", "4"]),
        ("1:3", ["all", "1:3"]),
    ],
)
def test_bands_have_one_label_each_and_all_is_first(asked: str, labels: list[str]) -> None:
    assert choose_bands(check_bands(asked), 5) == labels


@pytest.mark.parametrize("asked", ["5", "3:3", "2:6"])
def test_a_band_that_the_model_lacks_is_refused(asked: str) -> None:
    with pytest.raises(pn.UsageError, match=f"no band '{asked}': the model has layers 0 to 4"):
        choose_bands(asked, 5)


@pytest.mark.parametrize("name", ["kv_graft", "attention_knockout"])
def test_chosen_bands_are_those_of_the_whole_run(
    name: str,
    random_model: Callable[[str], TransformersModel],
    small_grid: Grid,
    tmp_path: Path,
) -> None:
    settings: dict[str, Any] = {"cells": "yoda/haiku", "n_eval": 3, "n_tokens": 2}
    if name == "kv_graft":
        settings["grafts"] = "persona"
    model, store = random_model("qwen2"), tmp_path / "s.zarr"
    whole = pn.run(name, model, small_grid, store=store, **settings)
    assert "bands" not in whole.attrs["parameters"]  # nor in its identity, as before
    again = pn.run(name, model, small_grid, store=store, bands="every", **settings)
    assert again.attrs["run"] == whole.attrs["run"]
    few = pn.run(name, model, small_grid, store=store, bands="3,0:2", **settings)
    assert few.layer_band.values.tolist() == ["all", "3", "0:2"]
    assert few.attrs["run"] != whole.attrs["run"]
    for each in ("kl", "closure", "cache_bytes", "kl_host"):
        if each in whole:
            chosen = whole[each].sel(layer_band=few.layer_band)
            np.testing.assert_allclose(few[each], chosen, rtol=1e-4, atol=1e-6)
    with pytest.raises(pn.UsageError, match="no band '0:9'"):
        pn.run(name, model, small_grid, store=store, bands="0:9", **settings)
    with pytest.raises(pn.UsageError, match="'bands' cannot be 'x'"):
        pn.run(name, model, small_grid, store=store, bands="x", **settings)


def test_patching_leaves_out_the_heads(
    random_model: Callable[[str], TransformersModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "two.txt").write_text("good\nbad\n")
    experiment = load_experiment("persona_patching")
    settings: dict[str, Any] = {
        "identities": str(tmp_path / "two.txt"),
        "n_questions": 1,
        "layers": "2",
        "store": tmp_path / "s.zarr",
    }
    model = random_model("qwen2")
    whole = pn.run(experiment, model, **settings)
    assert "heads" not in whole.attrs["parameters"]
    space = experiment.measure.__globals__
    monkeypatch.setitem(space, "_patch_heads", lambda *_: pytest.fail("heads are patched"))
    few = pn.run(experiment, model, heads=False, **settings)
    assert set(whole.data_vars) - set(few.data_vars) == {"head_recovery", "head_logits_patched"}
    for name in set(few.data_vars) - {"seconds"}:
        np.testing.assert_allclose(few[name], whole[name], rtol=1e-4, atol=1e-6)
    assert set(draw(few, "persona_patching")) == {
        *("recovery_all", "recovery_identity", "accuracy", "attention", "attention_value"),
    }


def test_a_terminal_shows_some_of_many_bands() -> None:
    bands = band_labels(80)
    results = xr.Dataset(
        {"kl": ("layer_band", np.arange(float(len(bands))))}, {"layer_band": bands}
    )
    shown, note = shorten(results)
    assert shown.layer_band.values.tolist() == [
        *("all", "0", "20", "40", "59", "79", "0:21", "0:40", "0:60"),
        *("20:80", "39:80", "59:80"),
    ]
    assert note.startswith("12 of 237 layer bands are shown; --every-band shows all of them")
    assert shorten(shown) == (shown, "")
    assert some_of(["all"]) == ["all"]
