"""Accuracy by persona, and patching of those questions alone that the neutral persona solves."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnsight import TransformersModel
from typer.testing import CliRunner

import persona_nns as pn
from persona_nns.cli.commands import app
from persona_nns.declarations.catalog import load_experiment
from persona_nns.errors import UsageError
from persona_nns.models.load import load_model
from persona_nns.prompts.identities import PERSONA, ask, ask_alone
from persona_nns.prompts.questions import choose_questions, load_questions
from persona_nns.results.attributes import read_attribute
from persona_nns.results.reading import list_runs

N = 9


@pytest.fixture(scope="module")
def organism() -> TransformersModel:
    return load_model("organism-qwen2")


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("identities") / "two.txt"
    file.write_text("bad\nred\n")
    return str(file)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, identities: str) -> dict[str, Any]:
    """A store, and what both experiments are asked."""
    store = tmp_path_factory.mktemp("stores") / "s.zarr"
    return {"n_questions": N, "identities": identities, "store": store, "progress": False}


@pytest.fixture(scope="module")
def solved(organism: TransformersModel, settings: dict[str, Any]) -> Any:
    own = {"layers": "1", "heads": False, "solved_by_baseline": True}
    return pn.run("persona_patching", organism, **settings, **own)


def test_letters_are_those_of_a_plain_pass(
    organism: TransformersModel, settings: dict[str, Any]
) -> None:
    ds = pn.run("persona_accuracy", organism, **settings)
    assert ds.persona.values.tolist() == ["bare", "average", "bad", "red"]
    tokenizer, plain = organism.tokenizer, organism._module
    for k, question in enumerate(load_questions("bundled")[:N]):
        asked = [ask(tokenizer, PERSONA, word, question) for word in ("average", "bad", "red")]
        for p, row in enumerate([ask_alone(tokenizer, question), *asked]):
            with torch.inference_mode():
                logits = plain(torch.tensor([row.ids])).logits[0, -1, list(row.letters)].numpy()
            np.testing.assert_allclose(ds.logits[0, k, p], logits, rtol=1e-4, atol=1e-4)
            assert bool(ds.correct[0, k, p]) == (logits.argmax() == question.answer)


def test_only_what_the_neutral_persona_solves_is_patched(
    organism: TransformersModel, settings: dict[str, Any], solved: Any
) -> None:
    said = pn.open_results(settings["store"], "persona_accuracy", run=_alone(settings["store"]))
    right = said.question.values[said.correct.sel(persona="average")[0]]
    assert solved.question.values.tolist() == right.tolist()
    assert 0 < len(right) < N
    assert read_attribute(solved, "inputs")["solved_by_baseline"] == right.tolist()
    assert read_attribute(solved, "plan_options")["solved"] == ",".join(map(str, right))
    asked = load_questions("bundled")
    assert solved.answer.values.tolist() == [asked[k].answer for k in right]
    own = {"layers": "1", "heads": False}
    every = pn.run("persona_patching", organism, **settings, **own)
    assert every.attrs["identity"] != solved.attrs["identity"]
    np.testing.assert_allclose(solved.ld, every.ld.isel(question=right), rtol=1e-4, atol=1e-4)
    again = pn.run("persona_patching", organism, **settings, **own, solved_by_baseline=True)
    assert again.attrs["run"] == solved.attrs["run"]
    fewer = pn.run(
        "persona_patching",
        organism,
        **settings,
        **own,
        solved_by_baseline=True,
        solved=str(right[0]),
    )
    assert fewer.attrs["identity"] != solved.attrs["identity"]


@pytest.mark.slow
def test_a_server_gives_the_same_selection(
    settings: dict[str, Any], solved: Any, tmp_path: Path
) -> None:
    there = load_model("organism-qwen2", backend="simulate")
    own = {"layers": "1", "heads": False, "solved_by_baseline": True}
    ds = pn.run("persona_patching", there, **{**settings, "store": tmp_path / "s.zarr"}, **own)
    assert ds.question.values.tolist() == solved.question.values.tolist()
    np.testing.assert_allclose(ds.ld, solved.ld, rtol=1e-4, atol=1e-4)


def _alone(store: Path) -> str:
    """The run that asks the neutral persona alone."""
    runs = list_runs(store, "persona_accuracy")
    return next(each.run for each in runs if each.attrs["plan_options"]["identities"] == "none")


def test_without_the_selection_nothing_is_asked_first(
    organism: TransformersModel, identities: str, tmp_path: Path
) -> None:
    own = {"n_questions": 1, "layers": "1", "heads": False, "identities": identities}
    ds = pn.run("persona_patching", organism, store=tmp_path / "s.zarr", progress=False, **own)
    assert {run.experiment for run in list_runs(tmp_path / "s.zarr")} == {"persona_patching"}
    assert "solved_by_baseline" not in read_attribute(ds, "inputs")


@pytest.mark.parametrize(
    ("solved", "asked", "sentence"),
    [
        ("0,2", False, "'0,2'.* add --solved-by-baseline"),
        ("", True, "answers none of the 3 questions of 'bundled' right"),
        ("0,3", True, "no question '3' in 'bundled'; .* 0 to 2"),
        ("0,x", True, "no question 'x'"),
    ],
)
def test_a_selection_that_is_none_says_why(solved: str, asked: bool, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        choose_questions("bundled", 3, solved, asked)
    assert list(choose_questions("bundled", 3, "2, 0", solved_alone=True)) == [0, 2]


def test_workers_and_several_models_are_refused_only_where_questions_are_asked_first() -> None:
    command = ["run", "persona_patching", "--model", "organism-qwen2", "--solved-by-baseline"]
    for more, sentence in (
        (["--workers", "2"], "prepares its inputs in one process"),
        (["--model", "organism-gemma2"], "give one --model at a time"),
    ):
        raised = CliRunner().invoke(app, [*command, *more]).exception
        assert isinstance(raised, UsageError)
        assert sentence in str(raised)
    module = sys.modules[load_experiment("persona_patching").measure.__module__]
    assert not module.prepares({"solved_by_baseline": False})


def test_an_identity_is_not_called_bare(organism: TransformersModel, tmp_path: Path) -> None:
    (tmp_path / "i.txt").write_text("bare\nred\n")
    with pytest.raises(UsageError, match="cannot be called 'bare'"):
        pn.run(
            "persona_accuracy", organism, store=tmp_path / "s", identities=str(tmp_path / "i.txt")
        )
