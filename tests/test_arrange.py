"""Experiments on a grid that know more than a cell at a time: `arrange`."""

from collections.abc import Callable
from pathlib import Path

import pytest
import xarray as xr
from nnsight import TransformersModel

import persona_nns as pn
from persona_nns.prompts.grids import Grid
from persona_nns.runs.verify import verify_store

OWN = '''
"""How many other tasks a persona has, and how long its tokens are."""
from dataclasses import dataclass, replace

import torch
from persona_nns import Cell, Variable, render_cell

protocol_version = 1
variables = {
    "others": Variable("cell", "other tasks", kind="int"),
    "length": Variable("cell token", "characters"),
}


@dataclass(frozen=True)
class Companions:
    cell: Cell
    others: tuple[str, ...]
    n_longest: int

    @property
    def label(self):
        return self.cell.label

    @property
    def place(self):
        return self.cell.place


def persona_tokens(tokenizer, cell):
    prompt = render_cell(tokenizer, cell, ("XY",))["XY"]
    return [prompt.ids[k] for k in prompt.spans["persona"]]


def arrange(tokenizer, plan, cells):
    longest = max(len(persona_tokens(tokenizer, cell)) for cell in plan.units)
    units = [
        Companions(
            cell,
            tuple(
                each.label
                for each in plan.units
                if each.persona == cell.persona and each.task != cell.task
            ),
            longest,
        )
        for cell in plan.units
    ]
    return replace(plan, units=units, axes={**plan.axes, "token": list(range(longest))})


def measure(model, units):
    length = torch.full((len(units), units[0].n_longest), torch.nan)
    for row, unit in enumerate(units):
        ids = persona_tokens(model.tokenizer, unit.cell)
        length[row, : len(ids)] = torch.tensor(
            [len(model.tokenizer.decode(token)) for token in ids]
        )
    return {"others": torch.tensor([len(u.others) for u in units]), "length": length}
'''


@pytest.fixture
def model(random_folder: Callable[[str], Path]) -> TransformersModel:
    return pn.load_model(random_folder("qwen2"))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "companions.py"
    file.write_text(OWN)
    return file


def test_units_know_of_others_and_tokens_have_labels(
    own: Path, tmp_path: Path, model: TransformersModel, small_grid: Grid
) -> None:
    store = tmp_path / "s.zarr"
    results = pn.run(own, model, small_grid, store=store)
    n_tasks = len(small_grid.tasks) - 1
    assert set(results.others.values.ravel()) == {n_tasks - 1}
    assert results.sizes["token"] == results.length.notnull().sum("token").max()
    for cell in small_grid.cells:
        found = results.length.sel(cell=cell.label).sum()
        assert found == len(f" {cell.persona_text}"), cell.label


def test_only_cells_that_are_asked_for_are_measured(
    own: Path, tmp_path: Path, model: TransformersModel, small_grid: Grid
) -> None:
    store, first = tmp_path / "s.zarr", small_grid.cells[0]
    results = pn.run(own, model, small_grid, cells=first.label, store=store)
    assert results.completed.sum() == 1
    whole = pn.run(own, model, small_grid, store=store)
    assert bool(whole.completed.all())
    xr.testing.assert_identical(
        whole.length.sel(cell=first.label).drop_attrs(),
        results.length.sel(cell=first.label).drop_attrs(),
    )


def test_a_dimension_without_labels_is_one_sentence(
    own: Path, tmp_path: Path, model: TransformersModel, small_grid: Grid
) -> None:
    own.write_text(OWN.replace('"token": list', '"letter": list'))
    with pytest.raises(pn.PersonaError, match="has a dimension 'token' without labels"):
        pn.run(own, model, small_grid, store=tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()


def test_what_is_arranged_can_be_computed_anew(
    own: Path, tmp_path: Path, model: TransformersModel, small_grid: Grid
) -> None:
    pn.run(own, model, small_grid, cells=small_grid.cells[0].label, store=tmp_path / "s.zarr")
    verdicts = list(verify_store(tmp_path / "s.zarr", sample=1))
    assert [verdict.problems for verdict in verdicts] == [()]
