"""`verify` finds what is wrong with a store, and nothing where nothing is."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from nnsight import TransformersModel
from readme_example import EXAMPLE

import persona_nns as pn
from persona_nns.cli.commands import main
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
        ("template", "{{ messages }}", "template_digest"),
    ):
        changed = {**original["attributes"], name: value}
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


def change(store: Path, **attributes: Any) -> None:
    """What the one run of a store says of itself."""
    group_of(store).attrs.update(attributes)


def state(store: Path, **settings: Any) -> tuple[str, str]:
    """The answer about the one run of a store, and why it was not checked."""
    (verdict,) = verify_store(store, **settings)
    assert verdict.problems == ()
    return verdict.state, verdict.not_checked


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"protocol_version": "0"}, "It was made by version 0 of 'localized_positions'"),
        ({"model_source": "nobody/nothing"}, "nobody/nothing"),
        ({"model_version": "0" * 64, "identity": "0" * 64}, "model_version is not what it was"),
        ({"identity": "0" * 64}, "What is computed anew is what is stored, but"),
    ],
)
def test_what_cannot_be_computed_anew_is_not_called_wrong(
    store: Path, attributes: dict[str, str], reason: str
) -> None:
    change(store, **attributes)
    answer, why = state(store)
    assert answer == "not checked"
    assert reason in why
    assert state(store, sample=0) == ("right", "")


def test_a_run_made_on_a_server_is_left_alone(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(store, model_source="meta/huge", model_version="hosted 0123456789abcdef")

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a hosted model was loaded")

    monkeypatch.setattr("persona_nns.models.load.load_model", load)
    answer, why = state(store)
    assert answer == "not checked"
    assert "hosted model 'meta/huge'" in why
    assert "--backend" in why
    with pytest.raises(pn.UsageError, match="not on 'local'"):
        state(store, backend="local")


def test_an_experiment_that_must_not_be_computed_anew_says_why(store: Path) -> None:
    change(store, unverifiable="it would cost money")
    assert state(store) == ("not checked", "It is not computed anew: it would cost money.")
    assert state(store, sample=0) == ("right", "")


def test_experiments_of_ones_own_are_checked_with_their_file_and_not_without(
    tmp_path: Path, golden_model: Callable[[str], TransformersModel], small_grid: Grid
) -> None:
    own, store = tmp_path / "norms.py", tmp_path / "s.zarr"
    own.write_text(EXAMPLE)
    pn.run(own, golden_model("qwen2"), small_grid, cells="chef/haiku", store=store)
    answer, why = state(store)
    assert answer == "not checked"
    assert "--experiment norms.py" in why
    assert state(store, experiments=[own]) == ("right", "")
    own.write_text(EXAMPLE + "\n\nX = 1\n")
    assert state(store, experiments=[own]) == ("right", "")
    assert "def measure" in EXAMPLE
    own.write_text(EXAMPLE.replace("def measure", "print()\n\ndef measure"))
    answer, why = state(store, experiments=[own])
    assert answer == "not checked"
    assert "It was made by version" in why
    with pytest.raises(pn.UsageError, match=r"gone\.py"):
        state(store, experiments=[tmp_path / "gone.py"])


def test_a_model_is_loaded_once_for_a_store(
    tmp_path: Path,
    random_folder: Callable[[str], Path],
    small_grid: Grid,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from persona_nns.models import load

    folders = [random_folder(name) for name in ("qwen2", "llama")]
    loaded: list[Path] = []
    original = load.load_model

    def counted(name: Path, **settings: Any) -> TransformersModel:
        loaded.append(name)
        return original(name, **settings)

    request: dict[str, Any] = {"cells": "chef/haiku", "store": tmp_path / "s.zarr"}
    for layers in ("1", "2"):
        for folder in folders:
            pn.run(NAME, folder, small_grid, layers=layers, **request)
    monkeypatch.setattr(load, "load_model", counted)
    verdicts = list(verify_store(tmp_path / "s.zarr", sample=1))
    assert [(verdict.state, verdict.n_recomputed) for verdict in verdicts] == [("right", 1)] * 4
    assert loaded == list(map(str, folders))


def test_a_model_that_has_moved_is_known_by_its_contents(
    tmp_path: Path, make_folder: Callable[..., Path], small_grid: Grid
) -> None:
    folder, store = make_folder("llama"), tmp_path / "s.zarr"
    pn.run(NAME, folder, small_grid, layers="1", cells="chef/haiku", store=store)
    moved = folder.rename(tmp_path / "moved")
    answer, why = state(store)
    assert answer == "not checked"
    assert str(folder) in why
    assert state(store, models=[str(moved)]) == ("right", "")


def test_code_of_a_model_is_run_only_when_asked(
    tmp_path: Path, make_folder: Callable[..., Path], small_grid: Grid
) -> None:
    folder, store = make_folder("qwen2"), tmp_path / "s.zarr"
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    config |= {"model_type": "mine", "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(
        "from transformers import Qwen2Config, Qwen2ForCausalLM\n"
        "class MineConfig(Qwen2Config):\n    model_type = 'mine'\n"
        "class MineForCausalLM(Qwen2ForCausalLM):\n    config_class = MineConfig\n"
    )
    model = pn.load_model(folder, trust_remote_code=True)
    pn.run(NAME, model, small_grid, layers="1", cells="chef/haiku", store=store)
    answer, why = state(store)
    assert answer == "not checked"
    assert "--trust-remote-code" in why
    assert state(store, trust_remote_code=True) == ("right", "")


def test_exit_codes_tell_right_from_wrong_from_not_checked(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def code(*options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["persona-nns", "verify", str(store), *options])
        with pytest.raises(SystemExit) as stop:
            main()
        assert isinstance(stop.value.code, int)
        return stop.value.code

    assert code("--sample", "0") == 0
    version = list_runs(store)[0].attrs["protocol_version"]
    change(store, protocol_version="0")
    assert code() == 3
    printed = capsys.readouterr()
    assert "\nnot checked  localized_positions/" in printed.out
    assert "1 of 1 runs are not checked" in printed.err
    change(store, protocol_version=version, grid_digest="0")
    assert code() == 1
    assert code("--backend", "elsewhere") == 2
