"""`verify` finds what is wrong with a store, and nothing where nothing is."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

import persona_nns as pn
from persona_nns.prompts.grids import Grid
from persona_nns.published.store import published_store
from persona_nns.results.reading import list_runs
from persona_nns.runs.verify import verify_store

NAME = "localized_positions"


@pytest.fixture
def store(tmp_path: Path, random_folder: Callable[[str], Path], small_grid: Grid) -> Path:
    model = pn.load_model(random_folder("qwen2"), template="plain")
    marked = Grid("small", small_grid.personas, small_grid.tasks, {"yoda": ("force",)})
    place = tmp_path / "s.zarr"
    cells = "chef/haiku,yoda/policy"
    pn.run(NAME, model, marked, layers="1,3", positions="p_last", cells=cells, store=place)
    return place


def problems(store: Path, sample: int = 2) -> list[str]:
    return [
        problem for verdict in verify_store(store, sample=sample) for problem in verdict.problems
    ]


def group_of(store: Path) -> zarr.Group:
    return zarr.open_group(store, mode="r+", path=f"{NAME}/{list_runs(store)[0].run}")


def test_a_store_that_is_right_is_called_right(store: Path) -> None:
    (verdict,) = verify_store(store)
    assert (verdict.problems, verdict.n_recomputed) == ((), 2)


def test_a_number_that_was_changed_is_found(store: Path) -> None:
    kl = group_of(store)["kl"]
    assert isinstance(kl, zarr.Array)
    values = np.asarray(kl[0, 3])
    kl[0, 3] = values + 0.01
    assert problems(store) == ["'kl' of yoda/policy is not what is computed anew."]
    assert problems(store, sample=0) == []


def test_a_complete_cell_without_numbers_is_found(store: Path) -> None:
    kl = group_of(store)["kl"]
    assert isinstance(kl, zarr.Array)
    kl[0, 3] = np.nan
    assert problems(store) == ["'kl' is NaN throughout a complete cell."]


def test_a_damaged_chunk_and_a_missing_array_are_found(store: Path) -> None:
    run = store / NAME / list_runs(store)[0].run
    (run / "kl" / "c.0.3.0.0").write_bytes(b"?")
    assert "cannot be read" in problems(store)[0]
    (run / "kl" / "zarr.json").unlink()
    assert "lacks the arrays kl" in problems(store)[0]


def test_provenance_that_was_changed_is_found(store: Path) -> None:
    file = store / NAME / list_runs(store)[0].run / "zarr.json"
    original = json.loads(file.read_text())
    for name, value, sentence in (
        ("personas", {**original["attributes"]["personas"], "yoda": "a Jedi"}, "grid_digest"),
        ("protocol_version", "0", "because protocol_version is not what it was"),
        ("model_source", "nobody/nothing", "nobody/nothing"),
    ):
        changed = {**original["attributes"], name: value}
        if name == "protocol_version":
            changed["identity"] = "0" * 64
        file.write_text(json.dumps({**original, "attributes": changed}))
        assert sentence in problems(store)[0]
    del original["attributes"]["grid_digest"]
    file.write_text(json.dumps(original))
    assert "provenance lacks grid_digest" in problems(store)[0]


def test_published_numbers_are_checked_and_not_computed() -> None:
    verdicts = list(verify_store(published_store()))
    assert len(verdicts) == 7
    assert [verdict.problems for verdict in verdicts] == [()] * 7
    assert {verdict.n_recomputed for verdict in verdicts} == {0}
