"""The store: what is written is what is read, by xarray alone, cell by cell."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from store_writer import block_of

from persona_nns.declarations.plans import Plan
from persona_nns.declarations.variables import Variable
from persona_nns.errors import UsageError
from persona_nns.prompts.grids import Cell, Grid
from persona_nns.results.allocation import attach
from persona_nns.results.block import Block
from persona_nns.results.measured import measured_values
from persona_nns.results.reading import list_runs, open_results
from persona_nns.results.store import check_writable

CELLS = {
    f"{persona}/{task}": Cell(persona, task, persona, task, "someone", "something")
    for persona, task in (("chef", "haiku"), ("chef", "policy"), ("angelou", "haiku"))
}
PLAN = Plan(
    name="g",
    units=tuple(CELLS.values()),
    axes={"cell": list(CELLS)},
    unit_axes=("cell",),
    content={},
    token_ids={},
    digest="d",
    coords={
        "persona": ("cell", [cell.persona for cell in CELLS.values()]),
        "task": ("cell", [cell.task for cell in CELLS.values()]),
    },
)
VARIABLES = {
    "kl": Variable("cell layer position", "causal KL", units="nat", description="of the test"),
    "n_eval": Variable("cell position", "scored tokens", units="token", kind="int"),
    "text": Variable("cell", "what was said", kind="text"),
    "hit": Variable("cell condition", "hit", kind="bool", coords={"condition": ["clean", "bare"]}),
}


def make_block(**changes: Any) -> Block:
    attrs = {
        "model": "m",
        "grid": "g",
        "grid_digest": "d",
        "precision": "float32",
        "protocol_version": "1",
        "parameters": {"layers": [1, 3], "positions": ["p_last", "g1"]},
        "created": "2026-01-01T00:00:00+00:00",
        "experiment": "e",
        "identity": "i",
        **changes.pop("attrs", {}),
    }
    block = Block(
        experiment="e",
        run="m.g.1",
        model="m",
        n_layers=4,
        d_model=3,
        precision="float32",
        plan=PLAN,
        layers=[1, 3],
        positions=["p_last", "g1"],
        variables=VARIABLES,
        attrs=attrs,
    )
    return replace(block, **changes)


def values_of(index: int, n_layers: int = 2) -> dict[str, Any]:
    return {
        "kl": np.arange(n_layers * 2, dtype=np.float32).reshape(n_layers, 2) + 10 * index,
        "n_eval": np.array([10, 9 - index]),
        "text": np.array(f"naïve “text” {index}", dtype=object),
        "hit": np.array([True, False]),
    }


def test_plain_xarray_reads_names_coordinates_and_units(tmp_path: Path) -> None:
    group = attach(tmp_path / "s.zarr", make_block())
    group.write_units([(CELLS["chef/policy"], values_of(1))], seconds=0.5)

    ds = xr.open_zarr(tmp_path / "s.zarr", group="e/m.g.1", consolidated=False).load()

    assert ds.kl.dims == ("model", "cell", "layer", "position")
    assert ds.model.values.tolist() == ["m"]
    assert ds.cell.values.tolist() == ["chef/haiku", "chef/policy", "angelou/haiku"]
    assert ds.persona.values.tolist() == ["chef", "chef", "angelou"]
    assert ds.persona.dims == ds.task.dims == ("cell",)
    assert ds.depth.dims == ("model", "layer")
    assert ds.depth.values.tolist() == [[0.25, 0.75]]
    assert ds.n_layers.values.tolist() == [4]
    assert ds.precision.values.tolist() == ["float32"]
    assert {"persona", "task", "depth", "n_layers", "precision"} <= set(ds.coords)
    assert (ds.kl.units, ds.kl.long_name, ds.kl.description) == ("nat", "causal KL", "of the test")
    assert ds.kl.dtype == np.float32
    assert ds.kl.sel(cell="chef/policy", layer=3, position="g1").item() == 13.0
    assert np.isnan(ds.kl.sel(cell="chef/haiku")).all()
    assert ds.n_eval.sel(cell="angelou/haiku").values.tolist() == [[-1, -1]]
    assert ds.completed.values.tolist() == [[False, True, False]]
    assert ds.text.values[0, 1] == "naïve “text” 1"
    assert ds.hit.sel(condition="clean").values.tolist() == [[False, True, False]]


def test_one_cell_is_whole_chunks_of_every_array(tmp_path: Path) -> None:
    attach(tmp_path / "s.zarr", make_block())
    group = zarr.open_group(tmp_path / "s.zarr", path="e/m.g.1", mode="r")
    for name in [*VARIABLES, "seconds", "completed"]:
        array = group[name]
        assert isinstance(array, zarr.Array)
        assert array.chunks[:2] == (1, 1)
        assert array.chunks[2:] == array.shape[2:]


def test_a_second_attachment_keeps_what_is_there(tmp_path: Path) -> None:
    attach(tmp_path / "s.zarr", make_block()).write_units(
        [(CELLS["chef/haiku"], values_of(0))], seconds=1.0
    )
    again = attach(tmp_path / "s.zarr", make_block())
    assert again.completed(PLAN.units) == {"chef/haiku"}
    assert open_results(tmp_path / "s.zarr", "e").kl.sel(cell="chef/haiku").values.max() == 3.0


def test_an_allocation_that_was_cut_off_is_finished(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    attach(store, make_block())
    for name in ("completed", "seconds", "hit"):
        for file in sorted((store / "e" / "m.g.1" / name).rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        (store / "e" / "m.g.1" / name).rmdir()
    assert list_runs(store) == []
    group = attach(store, make_block())
    group.write_units([(CELLS["angelou/haiku"], values_of(2))], seconds=1.0)
    assert open_results(store, "e").completed.values.tolist() == [[False, False, True]]


def test_a_cell_that_is_not_completed_reads_as_missing(tmp_path: Path) -> None:
    group = attach(tmp_path / "s.zarr", make_block())
    group.write_units([(CELLS["chef/haiku"], values_of(0))], seconds=1.0)
    raw = zarr.open_group(tmp_path / "s.zarr", path="e/m.g.1", mode="r+")
    raw["kl"][0, 1] = 5.0  # type: ignore[index]
    raw["n_eval"][0, 1] = 5  # type: ignore[index]
    raw["text"][0, 1] = "half"  # type: ignore[index]
    ds = open_results(tmp_path / "s.zarr", "e")
    assert np.isnan(ds.kl.sel(cell="chef/policy")).all()
    assert np.isnan(ds.n_eval.sel(cell="chef/policy")).all()
    assert ds.n_eval.mean() == 9.5
    assert ds.hit.mean() == 0.5
    assert ds.text.sel(cell="chef/policy").item() == ""
    assert ds.kl.sel(cell="chef/haiku", layer=3, position="g1").item() == 3.0
    assert ds.completed.dtype == bool


def test_what_was_measured_throughout_is_read_as_declared(tmp_path: Path) -> None:
    group = attach(tmp_path / "s.zarr", make_block())
    measured = [(cell, values_of(index)) for index, cell in enumerate(CELLS.values())]
    measured[1][1]["n_eval"] = np.array([-1, 3])  # a difference, say: −1 is a number like others
    group.write_units(measured, seconds=1.0)
    ds = open_results(tmp_path / "s.zarr", "e")
    assert (ds.n_eval.dtype, ds.hit.dtype) == (np.dtype("int64"), np.dtype(bool))
    assert (ds.n_eval.attrs["kind"], ds.hit.attrs["kind"]) == ("int", "bool")
    assert ds.n_eval.sel(cell="chef/policy").values.tolist() == [[-1, 3]]
    assert measured_values(ds, "n_eval").sel(cell="chef/policy").values.tolist() == [[-1.0, 3.0]]


@pytest.mark.parametrize("lazily", [False, True])
def test_what_a_complete_cell_leaves_out_enters_no_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lazily: bool
) -> None:
    if lazily:
        monkeypatch.setattr("persona_nns.results.opening._EAGER", 0)
    dims = "cell layer condition"
    coords = {"condition": ["clean", "bare"]}
    variables = {
        "every": Variable("cell layer", "all layers", every_layer=True),
        "any": Variable(dims, "any", kind="bool", coords=coords),
        "count": Variable(dims, "count", kind="int", coords=coords, unmeasured=-1),
        "steps": Variable("cell layer", "steps", kind="int"),
    }
    attrs = {"parameters": {"layers": [1, 2]}}
    block = make_block(variables=variables, layers=[0, 1, 2], positions=[], attrs=attrs)
    values = {
        "every": np.zeros(3, dtype=np.float32),
        "any": np.array([[False, False], [True, False], [False, False]]),
        "count": np.array([[-1, -1], [2, 0], [-1, -1]]),  # layer 0 not asked, 2 without markers
        "steps": np.array([-1, 4, 6]),
    }
    attach(tmp_path / "s.zarr", block).write_units(
        [(cell, values) for cell in CELLS.values()], seconds=1.0
    )
    ds = open_results(tmp_path / "s.zarr", "e")
    assert (bool(ds["any"].chunks), float(ds["any"].mean())) == (lazily, 0.5)
    assert (float(ds["count"].mean()), float(ds["steps"].mean())) == (1.0, 5.0)
    assert np.isnan(ds["any"].sel(layer=[0, 2])).all()


def test_truth_values_and_counts_that_one_model_lacks_enter_no_mean(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    dims = "cell layer"
    variables = {"hit": Variable(dims, "hit", kind="bool"), "n": Variable(dims, "n", kind="int")}
    for model, layers in (("m", [1, 3]), ("n", [2])):
        attrs = {"model": model, "parameters": {"layers": layers}}
        block = make_block(
            run=f"{model}.g.1", model=model, layers=layers, variables=variables, attrs=attrs
        )
        values = {"hit": np.ones(len(layers), dtype=bool), "n": np.full(len(layers), 2)}
        attach(store, block).write_units([(cell, values) for cell in CELLS.values()], seconds=1.0)
    ds = open_results(store, "e")
    assert (float(ds.hit.mean()), float(ds.n.mean())) == (1.0, 2.0)
    assert np.isnan(ds.hit.sel(model="n", layer=1)).all()
    assert ds.completed.dtype == bool
    for model in ("m", "n"):
        alone = open_results(store, "e", run=f"{model}.g.1")
        assert (alone.hit.dtype, alone.n.dtype) == (np.dtype(bool), np.dtype("int64"))


def test_models_are_joined_and_missing_layers_are_nan(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    attach(store, make_block()).write_units([(CELLS["chef/haiku"], values_of(0))], seconds=1.0)
    parameters = {"layers": [2], "positions": ["p_last", "g1"]}
    other = make_block(
        run="n.g.2",
        model="n",
        n_layers=8,
        layers=[2],
        attrs={"model": "n", "parameters": parameters, "created": "2026-01-02T00:00:00+00:00"},
    )
    attach(store, other).write_units(
        [(CELLS["angelou/haiku"], values_of(2, n_layers=1))], seconds=1.0
    )

    ds = open_results(store, "e")

    assert ds.model.values.tolist() == ["m", "n"]
    assert ds.layer.values.tolist() == [1, 2, 3]
    assert ds.cell.values.tolist() == ["chef/haiku", "chef/policy", "angelou/haiku"]
    assert ds.n_layers.values.tolist() == [4, 8]
    assert ds.depth.sel(model="n", layer=2).item() == 0.25
    assert np.isnan(ds.depth.sel(model="m", layer=2))
    assert ds.kl.sel(model="m", cell="chef/haiku", layer=3, position="g1").item() == 3.0
    assert np.isnan(ds.kl.sel(model="m", cell="chef/haiku", layer=2)).all()
    assert ds.kl.sel(model="n", cell="angelou/haiku", layer=2, position="g1").item() == 21.0
    assert ds.completed.dtype == bool
    assert ds.n_eval.mean() == np.mean([10, 9, 10, 7])
    assert ds.text.sel(model="n", cell="angelou/haiku").item() == "naïve “text” 2"
    assert list(ds.data_vars) == [*VARIABLES, "seconds", "completed"]


@pytest.mark.parametrize(
    "attrs",
    [
        {"grid_digest": "another text"},
        {"protocol_version": "2"},
        {"parameters": {"layers": [1, 3], "positions": ["p_last", "g1"], "n_eval": 5}},
    ],
)
def test_runs_that_disagree_are_never_mixed(tmp_path: Path, attrs: dict[str, Any]) -> None:
    store = tmp_path / "s.zarr"
    attach(store, make_block())
    attach(store, make_block(run="n.g.2", model="n", attrs={"model": "n", **attrs}))
    with pytest.raises(UsageError, match=r"Several sets .* m\.g\.1 .* n\.g\.2 "):
        open_results(store, "e")
    assert open_results(store, "e", run="n.g.2").model.values.tolist() == ["n"]
    assert open_results(store, "e", model="n").model.values.tolist() == ["n"]
    assert open_results(store, "e", model=["m"]).model.values.tolist() == ["m"]
    with pytest.raises(UsageError, match="no run of the model 'o'; there are: m, n"):
        open_results(store, "e", model="o")


def test_one_model_twice_is_refused_and_can_be_chosen(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    attach(store, make_block())
    attach(store, make_block(run="m.g.2", precision="bfloat16", attrs={"precision": "bfloat16"}))
    with pytest.raises(UsageError, match=r"Several runs of the model .m. match.*bfloat16"):
        open_results(store, "e")
    chosen = open_results(store, "e", run="m.g.2")
    assert chosen.precision.values.tolist() == ["bfloat16"]


def test_a_grid_is_chosen_by_name_or_by_text(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    grid = Grid("g", {"baseline": "a", "chef": "b"}, {"baseline": "c", "haiku": "d"})
    attach(store, make_block(attrs={"grid_digest": grid.digest}))
    attach(store, make_block(run="m.h.2", attrs={"grid": "h"}))
    assert open_results(store, "e", grid="h").attrs["grid"] == "h"
    assert open_results(store, "e", grid=grid).attrs["grid"] == "g"
    with pytest.raises(UsageError, match="No run of 'e' matches"):
        open_results(store, "e", grid="short")


def test_what_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no Zarr store at"):
        open_results(tmp_path / "none.zarr", "e")
    attach(tmp_path / "s.zarr", make_block())
    with pytest.raises(UsageError, match="holds no results of 'f'"):
        open_results(tmp_path / "s.zarr", "f")


def test_a_store_is_not_put_into_a_file_or_among_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UsageError, match="is no Zarr store"):
            check_writable(place)
    with pytest.raises(UsageError, match="cannot be written"):
        check_writable(tmp_path / "notes.txt" / "below.zarr")
    check_writable(tmp_path / "new" / "s.zarr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]


def test_a_run_is_as_old_as_its_first_allocation(tmp_path: Path) -> None:
    """A process that finishes what another began to allocate does not make it younger."""
    first = block_of(2)
    again = replace(first, attrs={**first.attrs, "created": "2026-02-02T00:00:00+00:00"})
    attach(tmp_path / "s.zarr", first)
    shutil.rmtree(tmp_path / "s.zarr" / "e" / first.run / "completed")  # the last to be written
    attach(tmp_path / "s.zarr", again)
    (info,) = list_runs(tmp_path / "s.zarr")
    assert info.attrs["created"] == "2026-01-01T00:00:00+00:00"
