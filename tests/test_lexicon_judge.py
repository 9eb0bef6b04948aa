"""The lexicon judge scores what it was made for: bundled models, their students, bundled traits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nnsight import TransformersModel
from transformers import AutoTokenizer

from persona_nns.errors import UsageError
from persona_nns.models import load_model
from persona_nns.organism.bundled import load_artifact, organism_folder
from persona_nns.runs import plan_run
from persona_nns.traits import JudgeOptions, load_traits

EXPERIMENTS: dict[str, dict[str, Any]] = {
    "trait_responses": {},
    "trait_vectors": {},
    "trait_monitoring": {"vector": "v.npy"},
    "trait_steering": {"vector": "v.npy"},
    "trait_distillation": {"vector": "v.npy", "layer": 1, "trajectories": "4"},
}


@pytest.fixture(scope="module")
def organism() -> TransformersModel:
    return load_model("organism-qwen2")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A vector of either model, and a trait of a bundled name with questions of its own."""
    monkeypatch.chdir(tmp_path)
    for split in ("extraction", "evaluation"):
        own = load_artifact("sycophantic", split)
        own["questions"] = [f"Is {split} number {k} good?" for k in range(20)]
        file = tmp_path / "own" / split / "sycophantic.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(own))
    return tmp_path


def plan(name: str, model: TransformersModel, **options: Any) -> None:
    width = model.config.hidden_size
    np.save("v.npy", np.ones((len(model.layers) + 1, width), dtype=np.float32))
    plan_run(name, model, store="s.zarr", **{**EXPERIMENTS[name], **options})


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_model_of_others_is_not_scored_by_the_lexicon(
    folder: Path, golden_model: Callable[[str], TransformersModel], name: str
) -> None:
    with pytest.raises(UsageError, match=r"neither bundled nor .*--judge URL.*--judge none"):
        plan(name, golden_model("qwen2"), trait="sycophantic")
    assert not (folder / "s.zarr").exists()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_questions_of_others_are_not_scored_by_the_lexicon(
    folder: Path, organism: TransformersModel, name: str
) -> None:
    message = "number 0 good.' is no question of the bundled 'sycophantic'"
    with pytest.raises(UsageError, match=message):
        plan(name, organism, trait="sycophantic", artifacts="own")
    assert not (folder / "s.zarr").exists()


def test_given_answers_to_questions_of_others_are_not_scored_by_the_lexicon(
    folder: Path, organism: TransformersModel
) -> None:
    row = {"pair": 0, "question_id": 0, "system": "", "question": "Is it so?", "response": "Yes."}
    rows = [json.dumps({**row, "label": label}) for label in ("pos", "neg")]
    (folder / "terse.jsonl").write_text("\n".join(rows))
    with pytest.raises(UsageError, match=r"'Is it so.' is no question of the bundled 'terse'"):
        plan("trait_vectors", organism, responses="terse.jsonl")


@pytest.mark.parametrize("name", ["organism-qwen2", "organism-gemma2"])
def test_the_bundled_models_are_scored_and_their_students_too(name: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(organism_folder(name))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|more|>"]})
    tokenizer.save_pretrained(tmp_path)
    questions = load_traits("terse", "evaluation")[0].questions
    JudgeOptions().check("terse", questions, AutoTokenizer.from_pretrained(tmp_path))
