"""What an installation without extras says when a feature needs one, and what it can do."""

import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from nnsight import TransformersModel

import persona_nns as pn
from persona_nns.models.load import load_model
from persona_nns.traits.distillation import new_student
from persona_nns.traits.judging import JudgeOptions
from persona_nns.traits.vectors import write_vector


@pytest.fixture(scope="module")
def model() -> TransformersModel:
    return load_model("organism-qwen2")


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda package: monkeypatch.setitem(sys.modules, package, None)


def sentence(need: str, extra: str) -> str:
    return rf"^{need}, which is not installed: pip install 'persona-nns\[{extra}\]'\.$"


def test_low_rank_students_need_peft_and_it_is_said_before_anything_runs(
    model: TransformersModel, hide: Any, tmp_path: Path
) -> None:
    write_vector(torch.ones(9, 128), tmp_path / "v.npy")
    options = {"vector": str(tmp_path / "v.npy"), "layer": 1, "students": "full"}
    hide("peft")
    needed = sentence("Low-rank adapters need peft", "distill")
    with pytest.raises(pn.UsageError, match=needed):
        pn.run("trait_distillation", model, store=tmp_path / "s", **options)  # the curve's are r16
    assert not (tmp_path / "s").exists()
    with pytest.raises(pn.UsageError, match=needed):
        new_student("organism-qwen2", "r2", "float32", 0)
    assert new_student("organism-qwen2", "full", "float32", 0) is not None


def test_an_adapter_needs_peft_to_be_loaded(hide: Any, tmp_path: Path) -> None:
    student = new_student("organism-qwen2", "r2", "float32", 0)
    student.save_pretrained(tmp_path)
    hide("peft")
    with pytest.raises(pn.UsageError, match=sentence("Low-rank adapters need peft", "distill")):
        load_model(tmp_path)


def test_a_judge_behind_an_endpoint_needs_openai(
    model: TransformersModel, hide: Any, tmp_path: Path
) -> None:
    hide("openai")
    needed = sentence("A judge behind an endpoint needs openai", "judge")
    with pytest.raises(pn.UsageError, match=needed):
        pn.run("trait_responses", model, judge="http://localhost:1/v1", store=tmp_path / "s")
    assert not (tmp_path / "s").exists()
    with pytest.raises(
        pn.UsageError, match=r"has to be 'lexicon', 'none', the URL .*Unknown model 'gpt'"
    ):
        JudgeOptions("gpt").check("terse")
    JudgeOptions("lexicon").check("terse")


@pytest.mark.parametrize("package", ["uvicorn", "starlette", "websockets", "python_multipart"])
def test_the_simulated_server_is_not_started_without_its_packages(
    package: str, hide: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    hide(package)
    needed = sentence(f"The backend 'simulate' needs {package}", "simulate")
    with pytest.raises(pn.UsageError, match=needed):
        load_model("organism-qwen2", backend="simulate")
