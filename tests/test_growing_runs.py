"""More layers, more cells, a persona more: only the new is measured, and opened with the old."""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from nnsight import TransformersModel

import persona_nns as pn
from persona_nns.declarations.catalog import load_experiment
from persona_nns.errors import UsageError
from persona_nns.results.removing import remove_run
from persona_nns.runs.run import run

OWN = '''
"""Numbers of cells and layers, for the tests."""
import torch
from persona_nns import Variable

protocol_version = 1
variables = {
    "size": Variable("cell layer", "size"),
    "every": Variable("cell layer", "layer", every_layer=True),
    "tokens": Variable("cell", "tokens", kind="int"),
    "text": Variable("cell", "label", kind="text"),
}


def measure(model, cells, *, layers: list[int], weight: float = 2.0):
    sizes = torch.tensor([[len(c.label) * weight + layer for layer in layers] for c in cells])
    return {
        "size": sizes,
        "every": torch.arange(len(model.layers) + 1).float().expand(len(cells), -1),
        "tokens": [len(cell.label) for cell in cells],
        "text": [cell.label for cell in cells],
    }
'''


@pytest.fixture(scope="module")
def model(random_model: Callable[[str], TransformersModel]) -> TransformersModel:
    return random_model("qwen2")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "numbers.py"
    file.write_text(OWN)
    return file


class Counted:
    """An experiment that notes the cells and layers that it measures."""

    def __init__(self, name: str | Path) -> None:
        loaded = load_experiment(name)
        self.measured: list[tuple[str, int]] = []

        @wraps(loaded.measure)
        def measure(model: Any, cells: Any, *, layers: list[int], **options: Any) -> Any:
            self.measured += [(cell.label, layer) for cell in cells for layer in layers]
            return loaded.measure(model, cells, layers=layers, **options)

        self.experiment = replace(loaded, measure=measure)

    def since(self) -> set[tuple[str, int]]:
        found, self.measured[:] = set(self.measured), []
        return found


def grown(grid: pn.Grid) -> pn.Grid:
    personas = {**grid.personas, "nurse": "a nurse on night shift"}
    return replace(grid, name="grown", personas=personas)


def same(one: xr.Dataset, other: xr.Dataset) -> None:
    for name in ("kl", "cos_additive"):
        np.testing.assert_allclose(one[name], other[name], rtol=1e-3, atol=1e-5)


def test_more_layers_measure_the_new_ones_alone(
    tmp_path: Path, model: TransformersModel, small_grid: pn.Grid
) -> None:
    counted, store = Counted("localized_positions"), tmp_path / "s.zarr"
    run(counted.experiment, model, small_grid, layers="1", store=store)
    assert {layer for _, layer in counted.since()} == {1}
    both = run(counted.experiment, model, small_grid, layers="1,3", store=store)
    assert {layer for _, layer in counted.since()} == {3}
    plain = run("localized_positions", model, small_grid, layers="1,3", store=tmp_path / "p.zarr")
    same(both, plain)
    opened = pn.open_results(store, "localized_positions")
    same(opened, plain)
    assert bool(opened.completed.all())


def test_a_run_that_took_over_from_another_keeps_it_when_that_one_is_removed(
    tmp_path: Path, model: TransformersModel, own: Path, small_grid: pn.Grid
) -> None:
    store = tmp_path / "s.zarr"
    first = run(own, model, small_grid, layers="1", store=store)
    both = run(own, model, small_grid, layers="1,3", store=store)
    remove_run(store, "numbers", first.attrs["run"])
    xr.testing.assert_identical(pn.open_results(store, "numbers"), both)
    assert pn.open_results(store, "numbers", run=both.attrs["run"]).completed.all()


def test_fewer_layers_are_taken_from_more(
    tmp_path: Path, model: TransformersModel, small_grid: pn.Grid
) -> None:
    counted, store = Counted("localized_positions"), tmp_path / "s.zarr"
    more = run(counted.experiment, model, small_grid, layers="1,3", store=store)
    counted.since()
    fewer = run(counted.experiment, model, small_grid, layers="3", store=store)
    assert not counted.since()
    np.testing.assert_array_equal(fewer.kl.sel(layer=3), more.kl.sel(layer=3))
    assert bool(fewer.kl.sel(layer=1).isnull().all())
    assert pn.open_results(store, "localized_positions").attrs["run"] == more.attrs["run"]


def test_a_persona_more_measures_its_cells_alone(
    tmp_path: Path, model: TransformersModel, small_grid: pn.Grid
) -> None:
    counted, store = Counted("localized_positions"), tmp_path / "s.zarr"
    run(counted.experiment, model, small_grid, layers="1", store=store)
    counted.since()
    more = run(counted.experiment, model, grown(small_grid), layers="1", store=store)
    assert {cell.partition("/")[0] for cell, _ in counted.since()} == {"nurse"}
    assert bool(more.completed.all())
    plain = run(
        "localized_positions", model, grown(small_grid), layers="1", store=tmp_path / "p.zarr"
    )
    same(more, plain)
    assert set(pn.open_results(store, "localized_positions").persona.values) >= {"nurse", "chef"}


def test_another_text_of_a_persona_is_measured_again(
    tmp_path: Path, model: TransformersModel, small_grid: pn.Grid
) -> None:
    counted, store = Counted("localized_positions"), tmp_path / "s.zarr"
    run(counted.experiment, model, small_grid, layers="1", store=store)
    counted.since()
    personas = {**small_grid.personas, "chef": "a cook who hates salt"}
    run(counted.experiment, model, replace(small_grid, personas=personas), layers="1", store=store)
    assert {cell.partition("/")[0] for cell, _ in counted.since()} == {"chef"}
    with pytest.raises(UsageError, match="Several sets of results"):
        pn.open_results(store, "localized_positions")


def test_layers_that_were_measured_apart_are_opened_together(
    tmp_path: Path, model: TransformersModel, own: Path, small_grid: pn.Grid
) -> None:
    store = tmp_path / "s.zarr"
    first = small_grid.cells[0].label
    run(own, model, small_grid, layers="1", cells=first, store=store)
    run(own, model, small_grid, layers="4", store=store)
    opened = pn.open_results(store, "numbers")
    assert opened.attrs["parameters"].count("1") == 1
    n_cells = len(small_grid.cells)
    assert int(opened["size"].sel(layer=1).notnull().sum()) == 1
    assert int(opened["size"].sel(layer=4).notnull().sum()) == n_cells
    assert opened.cell.values.tolist() == [cell.label for cell in small_grid.cells]
    assert opened.tokens.dtype.kind == "i"
    assert opened.text.values[0].tolist() == opened.cell.values.tolist()
    assert bool(opened.completed.all())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"size": sizes', '"size": sizes / sizes.sum(dim=1, keepdim=True)'),
        ('"tokens": [len(cell.label)', '"tokens": [len(layers)'),
    ],
)
def test_layers_that_depend_on_each_other_are_measured_together(
    tmp_path: Path, model: TransformersModel, own: Path, small_grid: pn.Grid, old: str, new: str
) -> None:
    own.write_text(OWN.replace(old, new))
    store = tmp_path / "s.zarr"
    run(own, model, small_grid, layers="1,2", store=store)
    grown_ = run(own, model, small_grid, layers="1,2,4", store=store)
    plain = run(own, model, small_grid, layers="1,2,4", store=tmp_path / "p.zarr")
    xr.testing.assert_equal(grown_["size"], plain["size"])
    xr.testing.assert_equal(grown_["tokens"], plain["tokens"])


def test_other_options_share_nothing(
    tmp_path: Path, model: TransformersModel, own: Path, small_grid: pn.Grid
) -> None:
    counted, store = Counted(own), tmp_path / "s.zarr"
    run(counted.experiment, model, small_grid, layers="1", store=store)
    counted.since()
    run(counted.experiment, model, small_grid, layers="1", weight=3.0, store=store)
    assert len(counted.since()) == len(small_grid.cells)


def test_a_variable_that_is_added_without_a_new_version_is_refused(
    tmp_path: Path, model: TransformersModel, own: Path, small_grid: pn.Grid
) -> None:
    store, cells = tmp_path / "s.zarr", [cell.label for cell in small_grid.cells]
    run(own, model, small_grid, layers="1", cells=cells[:1], store=store)
    own.write_text(
        OWN.replace('"text": V', '"more": Variable("cell", "more"),\n    "text": V').replace(
            '"text": [', '"more": [1.0 for _ in cells],\n        "text": ['
        )
    )
    for asked in (cells[:1], cells):
        with pytest.raises(UsageError, match=r"\(more\) under the same protocol_version .* raise"):
            run(own, model, small_grid, layers="1", cells=asked, store=store)
    own.write_text(own.read_text().replace("protocol_version = 1", "protocol_version = 2"))
    assert bool(run(own, model, small_grid, layers="1", store=store).more.notnull().all())


def test_more_layers_of_patching_are_those_that_are_measured_at_once(
    tmp_path: Path, model: TransformersModel
) -> None:
    (tmp_path / "identities.txt").write_text("good\nbad\n")
    asked = {"identities": str(tmp_path / "identities.txt"), "n_questions": 1}
    first = run("persona_patching", model, layers="1", store=tmp_path / "s.zarr", **asked)
    both = run("persona_patching", model, layers="1,3", store=tmp_path / "s.zarr", **asked)
    plain = run("persona_patching", model, layers="1,3", store=tmp_path / "p.zarr", **asked)
    assert first.attrs["run"] != both.attrs["run"] == plain.attrs["run"]
    numbers = [name for name, array in plain.data_vars.items() if array.dtype.kind == "f"]
    for name in set(numbers) - {"seconds"}:
        np.testing.assert_allclose(both[name], plain[name], rtol=1e-3, atol=1e-4, err_msg=str(name))
    assert len(pn.list_runs(tmp_path / "s.zarr")) == 3  # layer 3 alone was measured for the second
