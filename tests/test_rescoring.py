"""Answers that nobody judged: what is printed of them, and scores that come later."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnsight import TransformersModel

import persona_nns as pn
from persona_nns.cli import rescoring
from persona_nns.cli.commands import main
from persona_nns.cli.rescoring import rescore
from persona_nns.errors import PersonaError, UsageError
from persona_nns.figures.drawing import draw
from persona_nns.models import load_model
from persona_nns.organism.bundled import load_artifact
from persona_nns.results.reading import RunInfo
from persona_nns.runs import verify_store
from persona_nns.traits import JudgeOptions
from persona_nns.traits.judges import LexiconJudge
from persona_nns.traits.rows import rows_of_store
from persona_nns.traits.vectors import write_vector

LEXICON = JudgeOptions("lexicon")
SHORT = {"max_new_tokens": 2, "temperature": 0, "trait": "terse"}
VECTOR = {**SHORT, "vector": "v.npy", "batch_size": 20}
ASKED: dict[str, dict[str, Any]] = {
    "trait_responses": {**SHORT, "batch_size": 20},
    "trait_monitoring": {**VECTOR, "n_samples": 2},
    "trait_steering": {
        **SHORT,
        "vector": "v.npy",
        "layers": "1,3",
        "alphas": "0,1",
        "batch_size": 20,
    },
}


@pytest.fixture(scope="module")
def model() -> TransformersModel:
    return load_model("organism-qwen2")


@pytest.fixture
def loaded(model: TransformersModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring does not load the model once more."""
    monkeypatch.setattr("persona_nns.cli.rescoring.load_model", lambda *_, **__: model)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    write_vector(torch.randn(9, 128, generator=generator), "v.npy")
    return tmp_path


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["persona-nns", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("name", ASKED)
def test_scores_that_come_later_are_those_from_the_start(
    model: TransformersModel, name: str
) -> None:
    unjudged = pn.run(name, model, store="s.zarr", judge="none", **ASKED[name])
    assert not bool(unjudged.score.notnull().any())
    with pytest.raises(UsageError, match=r"Nobody judged these answers.*persona-nns rescore"):
        draw(unjudged, name)
    scored = rescore("s.zarr", name, LEXICON)
    later = pn.open_results("s.zarr", name, run=scored)
    assert later.attrs["answers_of"] == unjudged.attrs["run"]
    start = pn.run(name, model, store="t.zarr", judge="lexicon", **ASKED[name])
    assert later.attrs["run"] == start.attrs["run"]
    assert later.attrs["identity"] == start.attrs["identity"]
    for each in set(start.data_vars) - {"seconds"}:
        np.testing.assert_array_equal(later[each].values, start[each].values, err_msg=str(each))
    assert bool(later.score.notnull().all())
    assert bool(later.completed.all())
    assert draw(later, name)
    again = pn.run(name, model, store="s.zarr", judge="lexicon", **ASKED[name])  # nothing to do
    assert again.attrs["answers_of"] == unjudged.attrs["run"]
    assert len(pn.list_runs("s.zarr")) == 2
    with pytest.raises(UsageError, match="scored by this judge already"):
        rescore("s.zarr", name, LEXICON, run=scored)


def test_what_is_scored_is_kept_when_the_judge_fails(
    model: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pn.run("trait_responses", model, store="s.zarr", judge="none", **ASKED["trait_responses"])
    plainly, calls = LexiconJudge.scores, []

    def fails(judge: LexiconJudge, *given: Any) -> Any:
        calls.append(len(given[1]))
        if len(calls) == 3:
            raise PersonaError("The judge is tired.")
        return plainly(judge, *given)

    monkeypatch.setattr(LexiconJudge, "scores", fails)
    with pytest.raises(PersonaError, match="tired"):
        rescore("s.zarr", "trait_responses", LEXICON)
    run = rescore("s.zarr", "trait_responses", LEXICON)
    assert bool(pn.open_results("s.zarr", "trait_responses", run=run).completed.all())
    assert len(calls) == 6  # five batches, one of them twice
    (verdict,) = [each for each in verify_store("s.zarr", sample=1) if each.info.run == run]
    assert (verdict.problems, verdict.n_recomputed) == ((), 1)


def test_the_weights_of_a_hosted_model_are_not_loaded(
    model: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        "persona_nns.cli.rescoring.load_model", lambda *_, **how: asked.update(how) or model
    )
    attrs: dict[str, Any] = {
        "model_version": "hosted 0abc",
        "model_source": "org/large",
        "model": "org/large",
        "precision": "bfloat16",
        "template": model.tokenizer.chat_template,
    }
    group: Any = None
    rescoring._load(RunInfo("trait_responses", "r", attrs, group))
    assert asked == {"label": "org/large", "backend": "ndif"}


def test_a_run_without_scores_says_what_was_made(
    model: TransformersModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("persona_nns.models.load.load_model", lambda **_: model)
    asked = [f"--{key.replace('_', '-')}={value}" for key, value in SHORT.items()]
    run = ["run", "trait_responses", "--model=organism-qwen2", "--judge=none", "--store=s.zarr"]
    assert command(monkeypatch, *run, *asked) == 0
    said = capsys.readouterr().out
    assert "200 of 200" in said
    assert "trait score" not in said
    assert "persona-nns rescore s.zarr trait_responses --judge" in said
    assert command(monkeypatch, "show", "s.zarr", "trait_responses") == 0
    assert "200 of 200" in capsys.readouterr().out
    assert command(monkeypatch, "show", "s.zarr", "trait_responses", "--variable=score") == 0
    assert "score: nothing was measured." in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"Nobody has judged .*rescore s.zarr trait_responses"):
        rows_of_store("s.zarr", "terse", "organism-qwen2", None)
    assert command(monkeypatch, "rescore", "s.zarr", "trait_responses", "--judge=lexicon") == 0
    assert "score: trait score" in capsys.readouterr().out


@pytest.mark.usefixtures("loaded")
def test_what_cannot_be_scored_is_refused(model: TransformersModel) -> None:
    own = Path("own/extraction/terse.json")
    own.parent.mkdir(parents=True)
    own.write_text(json.dumps(load_artifact("terse", "extraction")))
    asked: dict[str, Any] = {**SHORT, "artifacts": "own", "store": "s.zarr", "batch_size": 20}
    run = pn.run("trait_responses", model, judge="none", **asked).attrs["run"]
    pn.run("trait_responses", model, judge="lexicon", **asked)
    for name, judge, which, message in (
        ("trait_responses", "none", None, "scored by a judge"),
        ("trait_responses", "gpt", None, "has to be 'lexicon', 'none', the URL"),
        ("trait_responses", "lexicon", "gone", "No such run was found; choose one with --run"),
        ("trait_vectors", "lexicon", None, "no answers of 'trait_vectors'"),
    ):
        with pytest.raises(UsageError, match=message):
            rescore("s.zarr", name, JudgeOptions(judge), which)
    trait = load_artifact("terse", "extraction")
    own.write_text(json.dumps({**trait, "questions": trait["questions"][::-1]}))
    with pytest.raises(PersonaError, match=r"cannot be scored: .*are not what they were"):
        rescore("s.zarr", "trait_responses", LEXICON, run)
    assert len(pn.list_runs("s.zarr")) == 2
