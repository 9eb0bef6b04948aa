"""MMLU's development questions out of a package: fetched once, checked, or read where it lies."""

import hashlib
import importlib.util
import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from persona_nns.errors import PersonaError
from persona_nns.prompts import fetched_questions, fetching
from persona_nns.prompts.questions import load_questions, name_questions

FOLDER = "lm_eval/tasks/mmlu/flan_cot_fewshot"
ANATOMY = """
dataset_name: anatomy
fewshot_config:
  samples:
  - question: 'Which bone?

      (A) the ulna (B) the {curly} one (C) none (D) all'
    target: Let's think step by step. The answer is (B).
  - question: 'How many lines?

      (A) 4 (B) 3 (C) 6 (D) 24 (E) 8'
    target: Eight. The answer is (E).
"""
LAW = """
dataset_name: law
fewshot_config:
  samples:
  - question: "Step 1:\\n Step 2:\\n(A) one\\n  two\\n(B) 2\\n(C) 3\\n(D) 4"
    target: "It is said. The answer is (A)."
"""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index of one small wheel, known by its digest; and a cache folder."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "lm_eval-0.4.13-py3-none-any.whl"
    about = "lm_eval-0.4.13.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{FOLDER}/mmlu_law.yaml", LAW)
        archive.writestr(f"{FOLDER}/mmlu_anatomy.yaml", ANATOMY)
        archive.writestr(f"{FOLDER}/_mmlu.yaml", "group: all")
        archive.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: lm-eval\nVersion: 0.4.13"
        )
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
        archive.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PERSONA_NNS_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(fetched_questions, "WHEEL", replace(fetched_questions.WHEEL, sha256=digest))
    monkeypatch.setattr(fetched_questions, "_N_QUESTIONS", 2)
    return folder


@pytest.mark.usefixtures("index")
def test_the_questions_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bone, law = load_questions("mmlu-dev")
    assert (bone.question, bone.subject, bone.answer) == ("Which bone?", "anatomy", 1)
    assert bone.choices == ("the ulna", "the {curly} one", "none", "all")
    assert (law.question, law.choices[0]) == ("Step 1:\n Step 2:", "one\n  two")
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.name == "mmlu-dev-lm-eval-0.4.13.jsonl"
    monkeypatch.setattr(fetched_questions, "fetch_wheels", None)
    assert load_questions("mmlu-dev") == (bone, law)
    kept.write_text(json.dumps({"question": "another"}))
    with pytest.raises(PersonaError, match=r"holds 1 questions, not 2: .*delete it"):
        load_questions("mmlu-dev")
    assert name_questions("mmlu-dev") == "mmlu-dev"


@pytest.mark.usefixtures("index")
def test_another_wheel_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    another = replace(fetched_questions.WHEEL, sha256="0" * 64)
    monkeypatch.setattr(fetched_questions, "WHEEL", another)
    with pytest.raises(PersonaError, match=r"lm-eval 0.4.13 .* is another than"):
        load_questions("mmlu-dev")
    assert not (tmp_path / "cache").exists()


def test_without_network_or_pip_it_says_so(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    next(index.iterdir()).unlink()
    with pytest.raises(
        PersonaError, match=r"could not be fetched \(No matching distribution"
    ) as told:
        load_questions("mmlu-dev")
    assert "\n" not in str(told.value)
    monkeypatch.setattr(fetching, "find_spec", lambda _: None)
    with pytest.raises(PersonaError, match=r"this Python .* has no pip; .* ensurepip"):
        load_questions("mmlu-dev")
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("index")
def test_a_cache_that_cannot_be_written_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PERSONA_NNS_CACHE", str(tmp_path / "file"))
    with pytest.raises(PersonaError, match=r"cannot be kept in .*; make room there, or set PERSON"):
        load_questions("mmlu-dev")
    monkeypatch.setenv("PERSONA_NNS_CACHE", str(tmp_path / "cache"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(PersonaError, match=r"cannot be kept in .*: No space left on device"):
        load_questions("mmlu-dev")
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_installed_package_is_read_and_not_imported(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(next(index.iterdir())) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "site" / "lm_eval" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    importlib.invalidate_caches()
    monkeypatch.setattr(fetched_questions, "fetch_wheels", None)
    assert [question.subject for question in load_questions("mmlu-dev")] == ["anatomy", "law"]
    assert "lm_eval" not in sys.modules
    assert not (tmp_path / "cache").exists()


def test_the_cache_is_the_users_own_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PERSONA_NNS_CACHE", raising=False)
    assert fetching.cache_folder().name == "persona-nns"
    monkeypatch.setenv("PERSONA_NNS_CACHE", "~/elsewhere")
    assert fetching.cache_folder() == Path.home() / "elsewhere"
