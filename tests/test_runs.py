"""Running an experiment: resume, identity, and requests that cannot be carried out."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import xarray as xr
from nnsight import TransformersModel
from random_models import save_random_model

import persona_nns as pn
from persona_nns.declarations.catalog import load_experiment
from persona_nns.models.load import record_of
from persona_nns.prompts.grids import Grid
from persona_nns.results.attributes import read_attribute
from persona_nns.runs.identity import identity
from persona_nns.runs.request import make_plan
from persona_nns.runs.run import run

OWN = '''
"""Counts of things, for the tests."""
import torch
from persona_nns import Variable

protocol_version = 1
calls = []
variables = {
    "asked": Variable("cell layer", "layer times weight"),
    "every": Variable("cell layer", "layer", every_layer=True),
    "text": Variable("cell", "label", kind="text"),
}


def measure(model, cells, *, layers: list[int], weight: float = 2.0):
    calls.append([cell.label for cell in cells])
    return {
        "asked": weight * torch.tensor(layers).float().expand(len(cells), -1),
        "every": torch.arange(len(model.layers) + 1).float().expand(len(cells), -1),
        "text": [cell.label for cell in cells],
    }
'''


def test_what_is_nan_throughout_is_named(
    own: Path, tmp_path: Path, model: TransformersModel, small_grid: Grid
) -> None:
    own.write_text(OWN.replace("weight * torch", "float('nan') * torch"))
    with pytest.warns(UserWarning, match=r"^asked of '.*': NaN in every cell that is complete"):
        pn.run(own, model, small_grid, layers="1", cells="chef/haiku", store=tmp_path / "s.zarr")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "counting.py"
    file.write_text(OWN)
    return file


@pytest.fixture(scope="module")
def model(random_model: Callable[[str], TransformersModel]) -> TransformersModel:
    return random_model("qwen2")


def test_results_have_the_promised_shape_and_survive_the_store(
    tmp_path: Path,
    model: TransformersModel,
    small_grid: Grid,
    localized_positions: ModuleType,
) -> None:
    ds = pn.run("localized_positions", model, small_grid, layers="1,3", store=tmp_path / "s.zarr")
    assert ds.kl.dims == ("model", "cell", "layer", "position")
    assert ds.layer.values.tolist() == [0, 1, 2, 3, 4, 5]
    assert ds.position.values.tolist() == ["p_last", "g1", "g2"]
    assert bool(ds.completed.all())
    direct = localized_positions.measure(
        model, list(small_grid.cells), layers=[1, 3], positions=["p_last", "g1", "g2"]
    )
    np.testing.assert_allclose(ds.kl.sel(layer=[1, 3])[0], direct["kl"], rtol=1e-6)
    np.testing.assert_allclose(ds.cos_additive[0], direct["cos_additive"], rtol=1e-6)
    assert np.isnan(ds.kl.sel(layer=[0, 2, 4, 5])).all()
    assert np.isfinite(ds.kl.sel(layer=[1, 3])).all()


def test_layers_asked_for_are_spread_onto_the_axis(
    own: Path, tmp_path: Path, model: TransformersModel, small_grid: Grid
) -> None:
    ds = run(own, model, small_grid, layers=[3, 1], store=tmp_path / "s.zarr", weight=3.0)
    row = ds.asked.sel(cell="chef/haiku").values[0]
    np.testing.assert_array_equal(row, [np.nan, 3, np.nan, 9, np.nan, np.nan])
    assert ds.every.values[0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert ds.text.values[0].tolist() == [cell.label for cell in small_grid.cells]
    assert read_attribute(ds, "parameters") == {"layers": [1, 3], "weight": 3.0}


def test_a_second_run_computes_only_what_is_missing(
    own: Path, tmp_path: Path, model: TransformersModel, small_grid: Grid
) -> None:
    experiment = load_experiment(own)
    calls: list[list[str]] = experiment.measure.__globals__["calls"]
    settings: dict[str, Any] = {"store": tmp_path / "s.zarr", "batch_size": 2}
    first = run(experiment, model, small_grid, cells="yoda/haiku", **settings)
    assert calls == [["yoda/haiku"]]
    assert first.completed.sum() == 1
    assert first.text.sel(cell="chef/haiku").item() == ""
    run(experiment, model, small_grid, **settings)
    assert sorted(calls[1:]) == [["chef/haiku", "chef/policy"], ["yoda/policy"]]
    run(experiment, model, small_grid, **settings)
    assert len(calls) == 3


def test_cells_measured_before_a_failure_are_kept(
    own: Path, tmp_path: Path, model: TransformersModel, small_grid: Grid
) -> None:
    own.write_text(
        OWN.replace(
            "    calls.append",
            "    if 'yoda/haiku' in [cell.label for cell in cells]: raise RuntimeError('gone')\n"
            "    calls.append",
        )
    )
    settings: dict[str, Any] = {"store": tmp_path / "s.zarr", "batch_size": 1}
    with pytest.raises(RuntimeError, match="gone"):
        run(own, model, small_grid, **settings)
    # Batches are measured in a random order: the cell that fails may be the first.
    kept = 0
    if (tmp_path / "s.zarr").exists():
        (kept,) = [info.n_completed for info in pn.list_runs(tmp_path / "s.zarr")]
    own.write_text(OWN)
    ds = run(own, model, small_grid, **settings)
    assert bool(ds.completed.all())
    assert len(pn.list_runs(tmp_path / "s.zarr")) == 1
    assert len(load_experiment(own).measure.__globals__["calls"]) == ds.cell.size - kept


def test_what_changes_the_numbers_changes_the_identity(
    own: Path,
    tmp_path: Path,
    small_grid: Grid,
    model: TransformersModel,
    random_model: Callable[[str], TransformersModel],
    random_folder: Callable[[str], Path],
    make_folder: Callable[..., Path],
) -> None:
    store = tmp_path / "s.zarr"
    edited = Grid("small", small_grid.personas, {**small_grid.tasks, "haiku": "Write a haiku!"})
    bfloat16 = pn.load_model(random_folder("qwen2"), dtype="bfloat16")
    other_weights = pn.load_model(make_folder("qwen2", initializer_range=0.1), label="qwen2")
    plain = pn.load_model(random_folder("qwen2"), template="plain")
    runs = [
        run(own, model, small_grid, store=store),
        run(own, model, small_grid, store=store, layers="0,1"),
        run(own, model, small_grid, store=store, weight=1.0),
        run(own, model, edited, store=store),
        run(own, bfloat16, small_grid, store=store),
        run(own, other_weights, small_grid, store=store),
        run(own, plain, small_grid, store=store),
        run(own, random_model("llama"), small_grid, store=store),
    ]
    own.write_text(OWN.replace("protocol_version = 1", "protocol_version = 2"))
    runs.append(run(own, model, small_grid, store=store))
    for one, other in itertools.combinations(runs, 2):
        assert one.attrs["identity"] != other.attrs["identity"]
    assert len(pn.list_runs(store)) == len(runs)
    with pytest.raises(pn.UsageError, match="Several sets"):
        pn.open_results(store, "counting")


def test_what_does_not_change_the_numbers_does_not_change_the_identity(
    own: Path, tmp_path: Path, model: TransformersModel, small_grid: Grid
) -> None:
    all_layers = run(own, model, small_grid, store=tmp_path / "s.zarr")
    by_number = run(
        own,
        model,
        Grid("small", dict(small_grid.personas), dict(small_grid.tasks)),
        layers=[4, 3, 2, 1, 0],
        cells=["chef/haiku"],
        batch_size=1,
        store=tmp_path / "s.zarr",
        weight=2.0,
    )
    assert all_layers.attrs["identity"] == by_number.attrs["identity"]


def test_a_file_without_a_protocol_version_is_known_by_its_source(
    own: Path, tmp_path: Path, model: TransformersModel, small_grid: Grid
) -> None:
    unversioned = OWN.replace("protocol_version = 1", "")
    own.write_text(unversioned)
    first = run(own, model, small_grid, store=tmp_path / "s.zarr")
    own.write_text(unversioned.replace("weight *", "weight * 10 *"))
    second = run(own, model, small_grid, store=tmp_path / "s.zarr")
    assert second.asked.max() == 10 * first.asked.max()


def test_every_token_of_every_prompt_counts_for_the_identity(
    own: Path, model: TransformersModel, small_grid: Grid
) -> None:
    from dataclasses import replace

    experiment, record = load_experiment(own), record_of(model)
    plan = make_plan(experiment, model.tokenizer, small_grid, [], {})
    ids = {cell: dict(of_cell) for cell, of_cell in plan.token_ids.items()}
    ids["yoda/policy"]["BB"] = [*ids["yoda/policy"]["BB"][:-1], 5]
    other = replace(plan, token_ids=ids)
    assert identity(experiment, record, plan, {}) != identity(experiment, record, other, {})


def test_the_group_tells_where_its_numbers_come_from(
    own: Path, tmp_path: Path, model: TransformersModel, small_grid: Grid
) -> None:
    ds = run(own, model, small_grid, store=tmp_path / "s.zarr", batch_size=3)
    group = f"counting/{ds.attrs['run']}"
    attrs = xr.open_zarr(tmp_path / "s.zarr", group=group, consolidated=False).attrs
    assert attrs["tasks"]["haiku"] == "Write a haiku about Monday mornings."
    assert attrs["architecture"] == "Qwen2ForCausalLM"
    assert attrs["precision"] == "float32"
    assert attrs["attn_implementation"] == "eager"
    assert len(attrs["model_version"]) == 64
    assert set(attrs["session"]["versions"]) >= {"torch", "nnsight", "transformers", "zarr"}
    json.dumps(dict(attrs))
    sessions = xr.open_datatree(
        tmp_path / "s.zarr", engine="zarr", group=f"{group}/sessions", consolidated=False
    )
    (session,) = sessions.children.values()
    assert session.attrs["batch_size"] == 3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers": "5"}, "Layer 5 is out of range: the model has layers 0 to 4"),
        ({"layers": "two"}, "'two' is not a layer"),
        ({"positions": "p_first"}, "Unknown position 'p_first'"),
        ({"positions": "p_last-500"}, "has no position 'p_last-500'"),
        ({"cells": "chef/opera"}, "has no cell 'chef/opera'"),
        ({"n_tokens": 3}, "has no option 'n_tokens'; its options: n_eval"),
        ({"batch_size": 0}, "batch size 0"),
        ({"n_eval": 0}, "'n_eval' cannot be 0: Input should be greater than or equal to 1"),
        ({"n_eval": "ten"}, "'n_eval' cannot be 'ten'"),
        ({"positions": []}, "No position was asked for"),
        ({"cells": []}, "No cell was asked for"),
    ],
)
def test_a_wrong_request_writes_nothing(
    tmp_path: Path,
    model: TransformersModel,
    small_grid: Grid,
    changes: dict[str, Any],
    sentence: str,
) -> None:
    with pytest.raises(pn.UsageError, match=sentence):
        run("localized_positions", model, small_grid, store=tmp_path / "s.zarr", **changes)
    assert list(tmp_path.iterdir()) == []


def test_sites_an_experiment_does_not_have_are_refused(
    own: Path, tmp_path: Path, model: TransformersModel, small_grid: Grid
) -> None:
    with pytest.raises(pn.UsageError, match="'counting' has no positions to choose"):
        run(own, model, small_grid, positions="p_last", store=tmp_path / "s.zarr")


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"text": [cell', '"words": [cell', r"returned \['asked', 'every', 'words'\]"),
        ("layers).float()", "layers[1:]).float()", "returned 'asked' of shape"),
    ],
)
def test_a_result_of_the_wrong_shape_is_refused(
    own: Path,
    tmp_path: Path,
    model: TransformersModel,
    small_grid: Grid,
    old: str,
    new: str,
    sentence: str,
) -> None:
    own.write_text(OWN.replace(old, new))
    with pytest.raises(pn.PersonaError, match=sentence):
        run(own, model, small_grid, store=tmp_path / "s.zarr")


def test_a_model_from_elsewhere_is_refused(tmp_path: Path, small_grid: Grid) -> None:
    with pytest.raises(pn.UsageError, match=r"load it with pn\.load_model"):
        run("localized_positions", object(), small_grid, store=tmp_path / "s.zarr")  # type: ignore[arg-type]


FULL = """
    if len(cells) > {limit}:
        raise {error}
    calls.append"""


@pytest.mark.filterwarnings("ignore:2 cells at a time")
def test_a_batch_that_does_not_fit_is_retried_at_half_its_size(
    own: Path, tmp_path: Path, model: TransformersModel, small_grid: Grid
) -> None:
    full = FULL.format(limit=1, error="torch.OutOfMemoryError('CUDA out of memory')")
    own.write_text(OWN.replace("\n    calls.append", full))
    experiment = load_experiment(own)
    with pytest.warns(UserWarning, match="4 cells at a time do not fit into memory.* with 2"):
        ds = run(experiment, model, small_grid, store=tmp_path / "s.zarr")
    assert [len(call) for call in experiment.measure.__globals__["calls"]] == [1, 1, 1, 1]
    assert bool(ds.completed.all())


@pytest.mark.filterwarnings("ignore:.*cells at a time")
def test_a_cell_that_does_not_fit_is_one_sentence(
    own: Path, tmp_path: Path, model: TransformersModel, small_grid: Grid
) -> None:
    error = "RuntimeError('DefaultCPUAllocator: cannot allocate memory')"
    own.write_text(OWN.replace("\n    calls.append", FULL.format(limit=0, error=error)))
    with pytest.raises(pn.PersonaError, match="A single cell does not fit into memory"):
        run(own, model, small_grid, store=tmp_path / "s.zarr")


def test_the_default_batch_fits_into_a_share_of_memory(
    monkeypatch: pytest.MonkeyPatch, model: TransformersModel, small_grid: Grid
) -> None:
    from persona_nns.models import memory
    from persona_nns.prompts.render import render_cell

    prompts = [p for c in small_grid.cells for p in render_cell(model.tokenizer, c).values()]
    per_token = 2 * 5 * 2 * 8 * 4  # keys and values, layers, heads, width, bytes
    per_cell = 6 * ((max(map(len, prompts)) + 16) * per_token + 16 * 1024 * 4)
    monkeypatch.setattr(memory, "_memory_to_use", lambda _device: 3.5 * per_cell)
    assert memory.fitting_batch_size(model, prompts) == 3
    monkeypatch.setattr(memory, "_memory_to_use", lambda _device: 0.0)
    assert memory.fitting_batch_size(model, prompts) == 1
    monkeypatch.setattr(memory, "_memory_to_use", lambda _device: 1e12)
    assert memory.fitting_batch_size(model, prompts) == 32


def test_the_plain_protocol_is_the_same_run(
    tmp_path: Path, model: TransformersModel, small_grid: Grid, own: Path
) -> None:
    settings: dict[str, Any] = {"layers": "2", "positions": "p_last"}
    name = "localized_positions"
    reused = run(name, model, small_grid, store=tmp_path / "a.zarr", **settings)
    plain = run(name, model, small_grid, store=tmp_path / "b.zarr", reuse=False, **settings)
    assert reused.attrs["identity"] == plain.attrs["identity"]
    np.testing.assert_allclose(reused.kl, plain.kl, rtol=1e-3, atol=1e-5)
    with pytest.raises(pn.UsageError, match="'counting' never reuses anything"):
        run(own, model, small_grid, store=tmp_path / "c.zarr", reuse=False)


def test_residuals_are_kept_beside_the_run_and_added_to_one_that_lacks_them(
    tmp_path: Path, model: TransformersModel, small_grid: Grid
) -> None:
    store = tmp_path / "s.zarr"
    settings: dict[str, Any] = {"layers": "2", "positions": "p_last,g1"}
    before = run("localized_positions", model, small_grid, store=store, **settings)
    after = run(
        "localized_positions", model, small_grid, store=store, keep_residuals=True, **settings
    )
    assert before.attrs["run"] == after.attrs["run"]
    group = f"localized_positions/{after.attrs['run']}/residuals"
    kept = xr.open_zarr(store, group=group, consolidated=False).load()
    assert kept.residuals.dims == ("model", "cell", "prompt", "layer", "position", "d_model")
    assert kept.residuals.shape == (1, 4, 4, 6, 2, 32)
    assert bool(kept.completed.all())
    h = kept.residuals.sel(cell="chef/policy")
    bb, xb, by, xy = (h.sel(prompt=name) for name in ("BB", "XB", "BY", "XY"))
    ratio = np.sqrt(((xy - xb - by + bb) ** 2).sum("d_model") / ((xy - bb) ** 2).sum("d_model"))
    expected = after.interaction_ratio.sel(cell="chef/policy", layer=[3, 4, 5])
    np.testing.assert_allclose(ratio.sel(layer=[3, 4, 5]), expected, rtol=1e-4)
    assert "residuals" not in after


def test_residuals_are_refused_where_there_are_none(
    own: Path, tmp_path: Path, model: TransformersModel, small_grid: Grid
) -> None:
    with pytest.raises(pn.UsageError, match="'counting' keeps no residuals"):
        run(own, model, small_grid, store=tmp_path / "s.zarr", keep_residuals=True)


def test_a_grid_in_another_order_is_the_same_run_and_cells_keep_their_numbers(
    own: Path, tmp_path: Path, model: TransformersModel, small_grid: Grid
) -> None:
    by_name = OWN.replace("weight *", "len(cells[0].persona) *")
    own.write_text(by_name)
    settings: dict[str, Any] = {"store": tmp_path / "s.zarr", "batch_size": 1}
    personas = dict(small_grid.personas)
    turned = Grid("turned", dict(reversed(personas.items())), small_grid.tasks)
    first = run(own, model, small_grid, cells="chef/haiku", **settings)
    second = run(own, model, turned, **settings)
    assert second.attrs["run"] == first.attrs["run"]
    assert len(pn.list_runs(tmp_path / "s.zarr")) == 1
    for cell in small_grid.cells:
        assert second.text.sel(cell=cell.label).item() == cell.label
        assert second.asked.sel(cell=cell.label, layer=1).item() == len(cell.persona)


def test_markers_count_for_the_identity(
    own: Path, tmp_path: Path, model: TransformersModel, small_grid: Grid
) -> None:
    marked = Grid("small", small_grid.personas, small_grid.tasks, {"yoda": ("force",)})
    first = run(own, model, small_grid, store=tmp_path / "s.zarr")
    second = run(own, model, marked, store=tmp_path / "s.zarr")
    assert first.attrs["identity"] != second.attrs["identity"]


def test_labels_that_look_alike_on_disk_have_runs_of_their_own(
    own: Path, tmp_path: Path, random_folder: Callable[[str], Path], small_grid: Grid
) -> None:
    for label in ("o/x", "o--x"):
        loaded = pn.load_model(random_folder("qwen2"), label=label)
        assert run(own, loaded, small_grid, store=tmp_path / "s.zarr").model.item() == label


@pytest.mark.parametrize("changes", [{"use_cache": False}, {"stop_strings": ["x"]}])
def test_generation_settings_of_a_checkpoint_do_not_change_the_protocol(
    make_folder: Callable[..., Path],
    model: TransformersModel,
    small_grid: Grid,
    localized_positions: ModuleType,
    changes: dict[str, Any],
) -> None:
    folder = make_folder("qwen2")
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    settings: dict[str, Any] = {"layers": [1, 3], "positions": ["p_last", "g1"]}
    cells = list(small_grid.cells)
    ours = localized_positions.measure(pn.load_model(folder), cells, **settings)["kl"]
    expected = localized_positions.measure(model, cells, **settings)["kl"]
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


def test_a_failure_in_the_first_batch_leaves_no_store(
    own: Path, tmp_path: Path, model: TransformersModel, small_grid: Grid
) -> None:
    own.write_text(OWN.replace('"text": [cell', '"words": [cell'))
    with pytest.raises(pn.PersonaError):
        run(own, model, small_grid, store=tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()


def test_cells_and_layers_are_taken_as_people_write_them(
    own: Path, tmp_path: Path, model: TransformersModel, small_grid: Grid
) -> None:
    ds = run(
        own,
        model,
        small_grid,
        layers=np.array([3, 1]).tolist(),
        cells=" chef/haiku , yoda/policy,",
        store=tmp_path / "s.zarr",
    )
    done = ds.completed.sel(model="qwen2")
    assert ds.cell[done].values.tolist() == ["chef/haiku", "yoda/policy"]
    with pytest.raises(pn.UsageError, match="There is no run none"):
        pn.open_results(tmp_path / "s.zarr", "counting", run=[ds.attrs["run"], "none"])


def test_an_array_of_another_kind_is_refused(
    own: Path, tmp_path: Path, model: TransformersModel, small_grid: Grid
) -> None:
    own.write_text(OWN.replace('"layer times weight"', '"layer", kind="int"'))
    with pytest.raises(pn.PersonaError, match="'asked' as float32; its kind is 'int'"):
        run(own, model, small_grid, store=tmp_path / "s.zarr")


def test_a_prompt_beyond_the_learned_positions_is_refused(tmp_path: Path, small_grid: Grid) -> None:
    model = pn.load_model(save_random_model(tmp_path / "short", "gpt2", n_positions=16))
    with pytest.raises(pn.UsageError, match=r"longest prompt .* have \d+ tokens, .* 16 positions"):
        pn.run("localized_positions", model, small_grid, store=tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()


def test_a_run_is_found_by_the_name_it_was_given_and_the_last_one_by_latest(
    own: Path, tmp_path: Path, model: TransformersModel, small_grid: Grid
) -> None:
    store = tmp_path / "s.zarr"
    first = run(own, model, small_grid, store=store, name="doubled")
    last = run(own, model, small_grid, store=store, weight=3.0)
    found = pn.open_results(store, "counting", run="doubled")
    assert found.attrs["identity"] == first.attrs["identity"]
    assert pn.open_results(store, "counting", run="latest").attrs["run"] == last.attrs["run"]
    with pytest.raises(pn.UsageError, match=r"doubled: qwen2.*begun 20\d\d-.*; qwen2.*weight=3.0"):
        pn.open_results(store, "counting")
    run(own, model, small_grid, store=store, weight=3.0, name="tripled")
    assert pn.open_results(store, "counting", run="tripled").attrs["run"] == last.attrs["run"]
    with pytest.raises(pn.UsageError, match="cannot be called 'latest'"):
        run(own, model, small_grid, store=store, name="latest")
