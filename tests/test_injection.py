"""behavioral_markers and host_injection on the ten architectures, recomputed with plain hooks."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from nnsight import TransformersModel
from plain_hooks import Writes, greedy, logits_with, prompt_ids, residuals, summed_kl
from random_models import architectures
from torch import Tensor
from transformers import PreTrainedModel

import persona_nns as pn
from persona_nns.errors import UsageError
from persona_nns.models.load import load_model
from persona_nns.prompts.grids import Cell, Grid

END = 2
N_TOKENS = 5
N_EVAL = 4
LAYERS = [1, 3]
LAYER_SETS = [[1, 3], [4]]
architecture = architectures("qwen2", "gemma3", "gpt2")
MARKERS = ("ing", "a", "the", "-")  # random models say little more than pieces of words


@pytest.fixture(scope="module")
def cells(small_grid: Grid) -> list[Cell]:
    return [replace(cell, markers=MARKERS) for cell in small_grid.cells]


def role_prompts(tokenizer: Any, cell: Cell) -> dict[str, list[int]]:
    persona, task = cell.persona_text, cell.task_text
    no_persona, no_task = cell.baseline_persona_text, cell.baseline_task_text
    texts = {
        "BB": (no_persona, no_task),
        "XB": (persona, no_task),
        "BY": (no_persona, task),
        "XY": (persona, task),
        "BARE": (None, task),
    }
    return {name: prompt_ids(tokenizer, *text) for name, text in texts.items()}


def plain_texts(
    plain: PreTrainedModel, tokenizer: Any, cell: Cell, layers: list[int], end: int = END
) -> list[list[str]]:
    """The four conditions of behavioral_markers at each layer, in its order."""
    ids = role_prompts(tokenizer, cell)
    hidden = [residuals(plain, ids[name])[:, -1] for name in ("BB", "XB", "BY", "XY")]

    def text(name: str, writes: Writes) -> str:
        said = greedy(plain, ids[name], N_TOKENS, end, writes)
        return tokenizer.decode(said, skip_special_tokens=True)

    clean, bare = text("XY", {}), text("BARE", {})
    texts: list[list[str]] = []
    for layer in layers:
        bb, xb, by, xy = (residual[layer] for residual in hidden)
        site = (layer, len(ids["XY"]) - 1)
        moved = [text("XY", {site: value}) for value in (xb + by - bb, xy - xb + bb)]
        texts.append([clean, *moved, bare])
    return texts


def plain_host(
    plain: PreTrainedModel, tokenizer: Any, cell: Cell, end: int = END
) -> tuple[Tensor, list[list[str]]]:
    """KL [layer set, source] and texts [site][source] of host_injection."""
    ids = role_prompts(tokenizer, cell)
    said = greedy(plain, ids["XY"], N_TOKENS, end)
    hidden = {name: residuals(plain, [*ids[name], *said[:2]]) for name in ("BB", "XB", "BY", "XY")}
    # What the sources put at p_last, g1 and g2 of the host, from each prompt's own positions.
    start = {name: len(ids[name]) - 1 for name in hidden}
    n_sites = min(3, 1 + len(said))

    def at(name: str, layer: int, site: int) -> Tensor:
        return hidden[name][layer, start[name] + site]

    def cached(layer: int, site: int) -> Tensor:
        return at("XB", layer, site) + at("BY", layer, site) - at("BB", layer, site)

    def oracle(layer: int, site: int) -> Tensor:
        return at("XY", layer, site)

    host, window = ids["BY"], said[:N_EVAL]

    def distributions(prompt: list[int], writes: Writes) -> Tensor:
        logits = logits_with(plain, [*prompt, *window], writes)
        return logits[len(prompt) - 1 : len(prompt) - 1 + len(window)]

    def writes(source: Any, layers: list[int], sites: int) -> Writes:
        return {
            (layer, len(host) - 1 + site): source(layer, site)
            for layer in layers
            for site in range(min(sites, n_sites))
        }

    clean = distributions(ids["XY"], {})
    kl = [
        [
            summed_kl(clean, distributions(host, {})),
            summed_kl(clean, distributions(host, writes(cached, layers, 1))),
            summed_kl(clean, distributions(host, writes(oracle, layers, 1))),
        ]
        for layers in LAYER_SETS
    ]

    def text(written: Writes) -> str:
        return tokenizer.decode(
            greedy(plain, host, N_TOKENS, end, written), skip_special_tokens=True
        )

    first = LAYER_SETS[0]
    texts = [
        [text({}), text(writes(cached, first, sites)), text(writes(oracle, first, sites))]
        for sites in (1, 3)
    ]
    return torch.tensor(kl), texts


def test_markers_after_a_substitution_equal_plain_hooks(
    architecture: str,
    random_model: Callable[[str], TransformersModel],
    plain_model: Callable[[str], PreTrainedModel],
    behavioral_markers: ModuleType,
    tokenizer: Any,
    cells: list[Cell],
) -> None:
    model, plain = random_model(architecture), plain_model(architecture)
    result = behavioral_markers.measure(model, cells, layers=LAYERS, n_tokens=N_TOKENS)
    changed = 0
    for row, cell in enumerate(cells):
        theirs = plain_texts(plain, tokenizer, cell, LAYERS)
        assert result["text"][row] == theirs
        changed += any(additive != clean for clean, additive, *_ in theirs)
    assert changed > 0
    unshared = behavioral_markers.measure(
        model, cells, layers=LAYERS, n_tokens=N_TOKENS, reuse=False
    )
    assert unshared["text"] == result["text"]
    alone = behavioral_markers.measure(model, cells[2:3], layers=LAYERS, n_tokens=N_TOKENS)
    assert alone["text"] == result["text"][2:3]


def test_host_injection_equals_plain_hooks(
    architecture: str,
    random_model: Callable[[str], TransformersModel],
    plain_model: Callable[[str], PreTrainedModel],
    host_injection: ModuleType,
    tokenizer: Any,
    cells: list[Cell],
) -> None:
    model, plain = random_model(architecture), plain_model(architecture)
    settings: dict[str, Any] = {"layer_sets": LAYER_SETS, "n_eval": N_EVAL, "n_tokens": N_TOKENS}
    result = host_injection.measure(model, cells, **settings)
    joint_matters = 0
    for row, cell in enumerate(cells):
        kl, texts = plain_host(plain, tokenizer, cell)
        torch.testing.assert_close(result["kl"][row], kl, rtol=1e-4, atol=1e-5)
        closure = 1 - kl / kl[:, :1]
        torch.testing.assert_close(result["closure"][row], closure, rtol=1e-3, atol=1e-4)
        assert result["text"][row] == texts
        joint_matters += texts[0] != texts[1]
    assert joint_matters > 0
    assert float((result["kl"][..., 1:] - result["kl"][..., :1]).abs().max()) > 0.01
    unshared = host_injection.measure(model, cells, **settings, reuse=False)
    torch.testing.assert_close(unshared["kl"], result["kl"], rtol=1e-4, atol=1e-5)
    assert unshared["text"] == result["text"]
    assert unshared["clean_text"] == result["clean_text"]
    alone = host_injection.measure(model, cells[2:3], **settings)
    torch.testing.assert_close(alone["kl"], result["kl"][2:3], rtol=1e-4, atol=1e-5)
    assert alone["text"] == result["text"][2:3]


@pytest.mark.parametrize("said", [0, 1, 3])
def test_texts_that_end_early_end_there(
    random_model: Callable[[str], TransformersModel],
    plain_model: Callable[[str], PreTrainedModel],
    behavioral_markers: ModuleType,
    host_injection: ModuleType,
    tokenizer: Any,
    cells: list[Cell],
    monkeypatch: pytest.MonkeyPatch,
    said: int,
) -> None:
    model, plain = random_model("llama"), plain_model("llama")
    cell = cells[2]
    end = greedy(plain, role_prompts(tokenizer, cell)["XY"], N_TOKENS, END)[said]
    monkeypatch.setattr(model._module.generation_config, "eos_token_id", end)
    for batch in ([cells[0], cell], [cell]):
        row = batch.index(cell)
        result = behavioral_markers.measure(model, batch, layers=[1], n_tokens=N_TOKENS)
        assert result["text"][row] == plain_texts(plain, tokenizer, cell, [1], end)
        with pytest.warns(UserWarning, match=rf"{cell.label} \({said + 1}\)"):
            host = host_injection.measure(
                model, batch, layer_sets=LAYER_SETS, n_eval=N_EVAL + 1, n_tokens=N_TOKENS
            )
        assert int(host["n_eval"][row]) == said + 1
        kl, texts = plain_host(plain, tokenizer, cell, end)
        torch.testing.assert_close(host["kl"][row], kl, rtol=1e-4, atol=1e-5)
        assert host["text"][row] == texts


def test_a_host_that_ends_before_the_joint_site_is_over(
    random_model: Callable[[str], TransformersModel],
    host_injection: ModuleType,
    cells: list[Cell],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every token ends a text: all rows are over after the first, and nothing else is warned of."""
    model = random_model("qwen2")
    monkeypatch.setattr(model._module.generation_config, "eos_token_id", list(range(1024)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = host_injection.measure(model, cells, layer_sets=[[1]], n_tokens=N_TOKENS)
    assert [str(warning.message)[:13] for warning in caught] == ["Continuations"]
    assert result["n_eval"].tolist() == [1] * len(cells)
    assert result["text"][0][0] == result["text"][0][1]


def test_one_generated_token_is_enough(
    random_model: Callable[[str], TransformersModel], host_injection: ModuleType, cells: list[Cell]
) -> None:
    model = random_model("qwen2")
    settings: dict[str, Any] = {"layer_sets": [[1, 3]], "n_eval": 1}
    long = host_injection.measure(model, cells, **settings, n_tokens=N_TOKENS)
    short = host_injection.measure(model, cells, **settings, n_tokens=1)
    torch.testing.assert_close(short["kl"], long["kl"], rtol=1e-4, atol=1e-5)
    for row in range(len(cells)):
        # One token in, the joint site is p_last.
        assert short["text"][row][0] == short["text"][row][1]
        assert long["text"][row][0][1].startswith(short["text"][row][0][1])


def test_markers_are_counted_in_the_texts(
    random_model: Callable[[str], TransformersModel],
    behavioral_markers: ModuleType,
    host_injection: ModuleType,
    cells: list[Cell],
) -> None:
    model = random_model("mistral")
    first = behavioral_markers.measure(model, cells, layers=LAYERS, n_tokens=20)
    # Markers taken from one of the texts: a substring with a space, and one that is not there.
    text = first["text"][0][0][0]
    assert " " in text.strip()
    place = text.strip().index(" ")
    piece = text.strip()[max(place - 1, 0) : place + 2].upper()
    marked = [replace(cell, markers=(piece, piece.lower(), "no such-thing")) for cell in cells]
    result = behavioral_markers.measure(model, marked, layers=LAYERS, n_tokens=20)
    assert result["text"] == first["text"]
    assert result["distinct_markers"][0, :, 0].tolist() == [1, 1]
    for row in range(len(cells)):
        for k in range(len(LAYERS)):
            there = [piece.lower() in each.lower() for each in first["text"][row][k]]
            assert result["any_marker"][row, k].tolist() == there
    assert not result["any_marker"].all()
    host = host_injection.measure(model, marked, layer_sets=[[1]], n_tokens=20)
    assert host["clean_any_marker"].tolist() == result["any_marker"][:, 0, 0].tolist()


def test_without_markers_there_is_nothing_to_count(
    tmp_path: Path,
    random_model: Callable[[str], TransformersModel],
    small_grid: Grid,
) -> None:
    store = tmp_path / "s.zarr"
    model = random_model("qwen2")
    with pytest.raises(UsageError, match=r"no markers for chef, yoda; add a \[markers\] table"):
        pn.run("behavioral_markers", model, small_grid, store=store)
    assert not store.exists()
    half = replace(small_grid, markers={"chef": ("fresh",)})
    with pytest.raises(UsageError, match="no markers for yoda;"):
        pn.run("behavioral_markers", model, half, store=store)
    asked = ["chef/haiku", "chef/policy"]
    ds = pn.run("behavioral_markers", model, half, store=store, cells=asked, n_tokens=3)
    assert ds.completed.sel(cell=asked).all()
    with pytest.warns(UserWarning, match="no markers for yoda: there distinct_markers is -1"):
        ds = pn.run("host_injection", model, half, store=store, n_tokens=3)
    counts = ds.distinct_markers.isel(model=0)
    assert np.isnan(counts.sel(cell="yoda/haiku")).all()
    assert (counts.sel(cell="chef/haiku") >= 0).all()
    assert bool(ds.kl.notnull().all())


def test_a_persona_like_the_hosts_has_no_gap_to_close(
    random_model: Callable[[str], TransformersModel],
    small_grid: Grid,
    host_injection: ModuleType,
) -> None:
    (cell,) = small_grid.select_cells("chef/haiku")
    same = replace(cell, persona_text=cell.baseline_persona_text)
    with pytest.warns(UserWarning, match="no markers"):
        result = host_injection.measure(
            random_model("qwen2"), [same, cell], layer_sets=[[1]], n_tokens=2
        )
    assert float(result["kl"][0].abs().max()) < 1e-6
    assert result["closure"][0].isnan().all()
    assert result["closure"][1].isfinite().all()


def test_labels_and_dimensions_are_those_of_the_contract(
    tmp_path: Path, random_model: Callable[[str], TransformersModel], small_grid: Grid
) -> None:
    grid = replace(small_grid, markers=dict.fromkeys(("chef", "yoda"), MARKERS))
    model, store = random_model("qwen2"), tmp_path / "s.zarr"
    ds = pn.run("behavioral_markers", model, grid, store=store, layers="1,3", n_tokens=3)
    for name in ("any_marker", "distinct_markers", "text"):
        assert ds[name].dims == ("model", "cell", "layer", "condition")
    assert ds.condition.values.tolist() == ["clean", "additive", "remove_persona", "bare"]
    assert ds.layer.values.tolist() == [1, 3]
    same = ds.text.sel(condition=["clean", "bare"])
    assert (same.sel(layer=1) == same.sel(layer=3)).all()
    ds = pn.run("host_injection", model, grid, store=store, layer_sets="3;1,2", n_tokens=3)
    for name in ("kl", "closure"):
        assert ds[name].dims == ("model", "cell", "layer_set", "source")
    for name in ("any_marker", "distinct_markers", "text"):
        assert ds[name].dims == ("model", "cell", "site", "source")
    assert ds.layer_set.values.tolist() == ["3", "1,2"]
    assert ds.source.values.tolist() == ["none", "cached", "oracle"]
    assert ds.site.values.tolist() == ["p_last", "p_last+g1+g2"]
    assert float(ds.closure.sel(source="none").max()) == 0.0
    one = ds.kl.sel(source="none", layer_set="3")
    assert (one == ds.kl.sel(source="none", layer_set="1,2")).all()
    # Equal depth to 14/26 of a model of 5 layers: 2.69.
    assert pn.run(
        "behavioral_markers", model, grid, store=store, n_tokens=3
    ).layer.values.tolist() == [3]
    assert pn.run(
        "host_injection", model, grid, store=store, n_tokens=3
    ).layer_set.values.tolist() == ["3"]


def test_bfloat16_runs(
    random_folder: Callable[[str], Path],
    behavioral_markers: ModuleType,
    host_injection: ModuleType,
    cells: list[Cell],
) -> None:
    model = load_model(random_folder("gemma2"), dtype="bfloat16")
    for reuse in (True, False):
        result = host_injection.measure(
            model, cells, layer_sets=LAYER_SETS, n_eval=1, n_tokens=4, reuse=reuse
        )
        assert torch.isfinite(result["kl"]).all()
        assert math.isclose(float(result["closure"][:, :, 0].abs().max()), 0.0)
        behavioral_markers.measure(model, cells, layers=LAYERS, n_tokens=4, reuse=reuse)
