import json
import os
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from nnsight import TransformersModel
from peft import PeftModel
from random_models import architectures
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer

from persona_nns.errors import PersonaError, UsageError
from persona_nns.models.load import load_model, record_of
from persona_nns.traits.distillation import (
    DistillationTrainer,
    Training,
    Trajectory,
    collate,
    distil,
    distillation_loss,
    new_student,
    parse_counts,
    parse_students,
    predicting_logits,
    token_kl,
    train,
    trained_parameters,
)
from persona_nns.traits.one_device import OneDeviceArguments
from persona_nns.traits.students import keep_trajectories

TRAJECTORIES = [
    Trajectory((5, 6, 7), (8, 9, 10, 11)),
    Trajectory((5, 6, 7, 12, 13), (14,)),
    Trajectory((15, 16), (17, 18)),
    Trajectory((19, 20, 21, 22), (23, 24, 25)),
]
architecture = architectures("qwen2", "gpt2", "phi3")
TRAINING = Training(steps=6, rows=2, accumulation=2, learning_rate=1e-3, seed=3)


def plain_kl(teacher: Tensor, student: Tensor) -> float:
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    return float((p * (p.log() - q.log())).sum())


def test_the_loss_is_the_mean_kl_over_response_tokens_the_first_included(
    random_folder: Any,
) -> None:
    """Each row by itself, unpadded, token by token, against the padded batch."""
    student = AutoModelForCausalLM.from_pretrained(random_folder("qwen2")).eval()
    teacher = AutoModelForCausalLM.from_pretrained(random_folder("qwen2")).eval()
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.add_(0.03 * torch.randn_like(weight))
        batch = collate(TRAJECTORIES)
        expected, given = (predicting_logits(model, batch) for model in (teacher, student))
        ours = float(distillation_loss(expected, given, batch["is_response"]))
        total, tokens = 0.0, 0
        for row, (kl, each) in enumerate(zip(token_kl(expected, given), TRAJECTORIES, strict=True)):
            ids = torch.tensor([[*each.prompt, *each.response]])
            logits = [model(ids).logits[0] for model in (teacher, student)]
            for k in range(len(each.response)):
                place = len(each.prompt) - 1 + k  # what predicts response token k, k = 0 included
                one = plain_kl(logits[0][place], logits[1][place])
                column = kl.shape[0] - len(each.response) + k
                assert float(kl[column]) == pytest.approx(one, abs=1e-6), (row, k)
                total, tokens = total + one, tokens + 1
    assert tokens == 10
    assert ours == pytest.approx(total / tokens, abs=1e-6)
    assert ours > 1e-3


def test_what_is_not_response_has_no_gradient() -> None:
    logits = torch.randn(1, 4, 7, requires_grad=True)
    is_response = torch.tensor([[False, False, True, True]])
    distillation_loss(torch.randn(1, 4, 7), logits, is_response).backward()
    assert logits.grad is not None
    assert bool((logits.grad[:, :2] == 0).all())
    assert bool((logits.grad[:, 2:] != 0).any())


@pytest.fixture
def teacher(random_folder: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(random_folder("qwen2")).eval()
    model.requires_grad_(False)
    model.lm_head.weight.mul_(0.5)
    return lambda inputs: predicting_logits(model, inputs)


def run_training(folder: Path, source: Path, teacher: Any) -> tuple[Any, list[float]]:
    student = new_student(str(source), "r4", "float32", TRAINING.seed)
    losses = train(student, TRAJECTORIES, teacher, TRAINING, folder, device=torch.device("cpu"))
    return student, losses


def test_training_that_was_interrupted_goes_on_where_it_stopped(
    random_folder: Any, tmp_path: Path, teacher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persona_nns.traits.distillation._SAVE_EVERY", 2)
    source = random_folder("qwen2")
    whole, losses = run_training(tmp_path / "whole", source, teacher)
    assert len(losses) == TRAINING.steps
    assert losses[-1] < losses[0]

    passes = 0

    def counted(inputs: Mapping[str, Tensor]) -> Tensor:
        nonlocal passes
        passes += 1
        if passes == 10:  # in the fifth step, two passes a step
            raise KeyboardInterrupt
        return teacher(inputs)

    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "cut", source, counted)
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {"checkpoint-4"}
    passes = 100
    resumed, again = run_training(tmp_path / "cut", source, counted)
    assert passes == 104  # the two steps that were missing
    assert again == pytest.approx(losses, rel=1e-4)
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    passes = 200
    run_training(tmp_path / "cut", source, counted)
    assert passes == 200  # finished: nothing is done again


def test_an_adapter_opens_in_peft_and_in_the_library(
    random_folder: Any, tmp_path: Path, teacher: Any
) -> None:
    source = shutil.copytree(random_folder("qwen2"), tmp_path / "base")
    student, _ = run_training(tmp_path / "checkpoints", source, teacher)
    assert trained_parameters(student) < sum(p.numel() for p in student.parameters())
    folder = tmp_path / "student"
    student.save_pretrained(folder)
    plain = load_model(source)
    plain.tokenizer.save_pretrained(folder)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    expected = student(ids).logits
    in_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), folder)
    torch.testing.assert_close(in_peft(ids).logits, expected)
    loaded = load_model(folder)
    with loaded.trace(ids):
        logits = loaded.output.logits.save()
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert float((expected - plain._module(ids).logits).detach().abs().max()) > 1e-2
    with pytest.raises(UsageError, match="is an adapter"):
        new_student(str(folder), "r4", "float32", 0)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(PersonaError, match="does not say which model"):
        load_model(folder)


@pytest.mark.parametrize("name", ["r2", "full"])
def test_every_architecture_has_students(
    random_model: Any, architecture: str, name: str, tmp_path: Path
) -> None:
    model: TransformersModel = random_model(architecture)
    student = new_student(record_of(model).source, name, "float32", 0)
    batch = collate(TRAJECTORIES)
    with torch.no_grad():
        start = predicting_logits(student, batch)
        torch.testing.assert_close(start, predicting_logits(model._module, batch))
    names = {path for path, weight in student.named_parameters() if weight.requires_grad}
    if name == "full":
        assert len(names) == len(list(student.parameters()))
        return
    assert not any("lm_head" in path or "embed_out" in path for path in names)
    per_layer = {"phi3": 4, "gpt2": 4, "gpt_neox": 4}.get(architecture, 7)
    assert len(names) == 2 * per_layer * 5  # A and B of each projection of attention and MLP
    width = collate(TRAJECTORIES[:2])["is_response"].shape[1]
    target = (start + torch.randn_like(start))[:2, -width:]
    train(
        student,
        TRAJECTORIES[:2],
        lambda inputs: target[: len(inputs["input_ids"])],
        Training(1, 2, 1, 1e-2, 0),
        tmp_path / "c",
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        assert float((predicting_logits(student, batch) - start).abs().max()) > 1e-4


@pytest.mark.parametrize("device", ["cuda:0", "cuda:2", "cpu"])
def test_training_gets_the_teachers_device_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """With four devices, of which a `Trainer` takes the first, or all of them."""
    chosen: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    arguments = OneDeviceArguments(
        output_dir=str(tmp_path), one_device=device, use_cpu=device == "cpu"
    )
    assert arguments.device == torch.device(device)
    assert arguments.n_gpu == (device != "cpu")
    assert arguments.train_batch_size == arguments.per_device_train_batch_size
    assert PartialState().device == torch.device(device)  # where accelerate moves things
    assert chosen[-1:] == ([torch.device(device)] if device != "cpu" else [])
    assert "ACCELERATE_TORCH_DEVICE" not in os.environ
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_trainer_of_a_student_is_on_its_device(
    random_folder: Any, tmp_path: Path, teacher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Stop(Exception):  # noqa: N818
        pass

    def note(trainer: DistillationTrainer, **_: Any) -> None:
        seen.append(trainer.args)
        raise Stop

    monkeypatch.setattr(DistillationTrainer, "train", note)
    monkeypatch.setattr(DistillationTrainer, "_move_model_to_device", lambda *_: None)
    monkeypatch.setattr("torch.cuda.set_device", lambda _: None)
    student = new_student(str(random_folder("qwen2")), "r4", "float32", 0)
    device = torch.device("cuda", 3)
    with pytest.raises(Stop):
        train(student, TRAJECTORIES, teacher, TRAINING, tmp_path, device=device)
    assert (seen[0].device, seen[0].n_gpu, seen[0].use_cpu) == (device, 1, False)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_students_of_a_model_with_code_of_its_own_run_that_code(
    make_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder("qwen2")
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    config |= {"model_type": "mine", "auto_map": code, "architectures": ["MineForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(
        "from transformers import Qwen2Config, Qwen2ForCausalLM\n"
        "class MineConfig(Qwen2Config):\n    model_type = 'mine'\n"
        "class MineForCausalLM(Qwen2ForCausalLM):\n    config_class = MineConfig\n"
    )
    model = load_model(folder, trust_remote_code=True)
    given: list[Any] = []
    monkeypatch.setattr(
        "persona_nns.traits.distillation.train", lambda *args, **_: given.append(args) or []
    )
    for name in ("r2", "full"):
        student, _ = distil(model, name, TRAJECTORIES, lambda _: given[0], TRAINING, tmp_path)
        assert "MineForCausalLM" in {type(module).__name__ for module in student.modules()}
    with pytest.raises(PersonaError):
        new_student(str(folder), "r2", "float32", 0)  # not where nobody has trusted it


def test_processes_that_keep_trajectories_at_once_do_not_meet(tmp_path: Path) -> None:
    file = tmp_path / "students" / "trajectories.jsonl"
    others: list[int] = [6, 3]

    def sample(numbers: range) -> list[Trajectory]:
        """Another process starts, and ends, while this one samples."""
        if others:
            keep_trajectories(file, others.pop(), sample)
        return [Trajectory((k,), (k + 1, k + 2)) for k in numbers]

    kept = keep_trajectories(file, 4, sample)
    assert kept == [Trajectory((k,), (k + 1, k + 2)) for k in range(4)]
    assert [path.name for path in file.parent.iterdir()] == ["trajectories.jsonl"]
    assert len(file.read_text().splitlines()) == 6  # the longest that was kept
    at_once = threading.Barrier(4)

    def together(numbers: range) -> list[Trajectory]:
        at_once.wait(timeout=10)
        return sample(numbers)

    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(keep_trajectories, file, 500, together) for _ in range(4)]
        assert all(len(each.result()) == 500 for each in done)
    assert [path.name for path in file.parent.iterdir()] == ["trajectories.jsonl"]
    assert len(file.read_text().splitlines()) == 500


def test_lists_of_students_and_counts() -> None:
    assert parse_students("r8, full") == ("r8", "full")
    assert parse_counts("200,50,50") == (50, 200)
    for bad in ("r0", "8", "lora", "", "r8,r8"):
        with pytest.raises(UsageError):
            parse_students(bad)
    for bad in ("0", "-5", "many", ""):
        with pytest.raises(UsageError):
            parse_counts(bad)


def test_the_trainer_is_the_librarys() -> None:
    assert issubclass(DistillationTrainer, Trainer)
