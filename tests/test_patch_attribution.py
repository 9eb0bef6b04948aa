"""Attribution beside the sweep of persona_patching, against small steps of its patches."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from nnsight import TransformersModel
from random_models import crossed
from sandboxed import sandboxed
from test_persona_patching import LAYERS, N_HEADS, Run, head_features, make_pair, partner_tokens
from torch import Tensor
from transformers import PreTrainedModel

import persona_nns as pn
from persona_nns.declarations.budgets import agreement
from persona_nns.declarations.catalog import load_experiment
from persona_nns.errors import UsageError
from persona_nns.figures import attribution_agreement, attribution_of_patches, patch_effects


def difference(letters: Tensor, answer: int) -> float:
    others = [k for k in range(4) if k != answer]
    return float(letters[answer] - letters[others].mean())


@pytest.mark.parametrize("architecture", crossed("gemma3", "gpt2"))
def test_every_estimate_is_the_slope_of_its_patch(
    architecture: str,
    random_model: Callable[[str], TransformersModel],
    plain_model: Callable[[str], PreTrainedModel],
    tokenizer: Any,
) -> None:
    module = sys.modules[load_experiment("persona_patching").measure.__module__]
    pair, plain = make_pair(tokenizer, "thoroughly careful", "red"), plain_model(architecture)
    measured = module.measure(random_model(architecture), [pair], layers=LAYERS, attribution=True)
    ours = {name: measured[name][0] for name in ("attribution", "head_attribution")}
    clean, corrupt = pair.asked_clean[0], pair.asked_corrupt[0]
    source, host = Run(plain, clean), Run(plain, corrupt)

    def slope(layer: int, site: str, features: slice, position_set: str) -> float:
        to, take_from = partner_tokens(clean, corrupt, position_set)
        own = host.kept[layer, site][to][:, features]
        way = source.kept[layer, site][take_from][:, features] - own

        def moved(step: float) -> float:
            run = Run(plain, corrupt, [(layer, site, to, features, own + step * way)])
            return difference(run.letters, corrupt.answer)

        wide, narrow = ((moved(step) - moved(-step)) / (2 * step) for step in (0.1, 0.05))
        return (4 * narrow - wide) / 3

    for s, position_set in enumerate(("all", "identity")):
        for c, site in enumerate(("mlp", "attn")):
            expected = [slope(layer, site, slice(None), position_set) for layer in LAYERS]
            found = ours["attribution"][0, c, :, s]
            largest = max(map(abs, expected))
            np.testing.assert_allclose(found, expected, rtol=2e-2, atol=1e-5 + 5e-3 * largest)
        width = host.kept[0, "head"].shape[-1]
        for layer in (0, 3):
            found = ours["head_attribution"][0, layer, :, s]
            own = [head_features(width, head) for head in range(N_HEADS)]
            expected = [slope(layer, "head", each, position_set) for each in own]
            largest = max(map(abs, expected))
            np.testing.assert_allclose(found, expected, rtol=2e-2, atol=1e-5 + 5e-3 * largest)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("asked")
    (folder / "identities.txt").write_text("good\nvery bad\n")
    return {"identities": str(folder / "identities.txt"), "n_questions": 2, "progress": False}


@pytest.fixture(scope="module")
def results(
    random_model: Callable[[str], TransformersModel],
    asked: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> xr.Dataset:
    store = tmp_path_factory.mktemp("store") / "s.zarr"
    return pn.run("persona_patching", random_model("qwen2"), store=store, attribution=True, **asked)


def test_heads_add_up_and_a_pair_with_itself_has_nothing_to_add(results: xr.Dataset) -> None:
    attn = results.attribution.sel(component="attn")
    heads = results.head_attribution.sum("head").transpose(*attn.dims)
    np.testing.assert_allclose(attn, heads, rtol=1e-3, atol=1e-5)
    assert not results.attribution.sel(clean_persona="good", corrupt_persona="good").any()


def test_agreement_is_the_rank_correlation_with_the_sweep(results: xr.Dataset) -> None:
    at = {"clean_persona": "good", "corrupt_persona": "very bad", "position_set": "all"}
    of = results.sel(at).isel(model=0, question=1)
    answer, found = int(of.answer), attribution_agreement(results)
    corrupt = of.ld.sel(persona="very bad").values
    for name, patched in (
        ("attribution", "logits_patched"),
        ("head_attribution", "head_logits_patched"),
    ):
        letters, estimate = of[patched], of[name]
        if name == "attribution":
            letters, estimate = letters.sel(component="mlp"), estimate.sel(component="mlp")
        exact = np.apply_along_axis(
            lambda each: difference(torch.tensor(each), answer), -1, letters.values
        )
        effects = patch_effects(results, patched).sel(at).isel(model=0, question=1)
        effects = effects if name != "attribution" else effects.sel(component="mlp")
        np.testing.assert_allclose(effects, exact - corrupt, rtol=1e-4, atol=1e-5)
        expected = agreement(estimate.values, exact)
        ours = found[name].sel(at).isel(model=0, question=1)
        ours = ours if name != "attribution" else ours.sel(component="mlp")
        assert float(ours) == pytest.approx(expected, abs=1e-6)


def test_the_figure_says_how_well_they_agree(results: xr.Dataset) -> None:
    figure = attribution_of_patches(results)
    assert figure is not None
    titles = [axis.get_title() for axis in figure.axes]
    assert len(titles) == 6
    assert all("rank correlation 0." in title or "−" in title for title in titles)


def test_without_it_nothing_is_as_it_was_not(
    random_model: Callable[[str], TransformersModel], asked: dict[str, Any], tmp_path: Path
) -> None:
    model = random_model("qwen2")
    before = pn.run("persona_patching", model, store=tmp_path / "s.zarr", heads=False, **asked)
    assert not {"attribution", "head_attribution"} & set(before.data_vars)
    said = "gradients, which a server does not give"
    with sandboxed(model), pytest.raises(UsageError, match=said):
        pn.run("persona_patching", model, store=tmp_path / "t.zarr", attribution=True, **asked)
    assert not (tmp_path / "t.zarr").exists()
