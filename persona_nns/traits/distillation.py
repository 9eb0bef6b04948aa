"""Train a student to say without steering what the model says with it.

The loss is the forward KL(teacher ‖ student) over the whole vocabulary, averaged over the response
tokens of the batch, the first one included; the trajectories come from the teacher itself. The
loop, its checkpoints and their resumption are those of transformers' `Trainer`; low-rank students
are peft's.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnsight import TransformersModel
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from persona_nns.declarations.options import Count, Positive
from persona_nns.declarations.plans import content_digest
from persona_nns.errors import UsageError
from persona_nns.models.adapters import base_of, require_peft
from persona_nns.models.checkpoints import load_weights
from persona_nns.models.load import hosted, record_of
from persona_nns.tracing.batches import left_pad, similar_rows
from persona_nns.tracing.sampling import Sampling, SeededPrompt, draws
from persona_nns.traits.one_device import losses_of, quiet_arguments

_SAVE_EVERY = 50  # steps between checkpoints
_REMOTE_CODE = "transformers_modules."  # where transformers puts modules that come with a model
_LOW_RANK = re.compile(r"r([1-9]\d*)")


@dataclass(frozen=True)
class Trajectory:
    """A prompt and what the teacher said, its end token included."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]


@dataclass(frozen=True)
class Training:
    """How one student is trained, as `TrainingOptions` say it.

    The learning rate is the highest; it falls linearly to zero.
    """

    steps: int
    rows: int
    accumulation: int
    learning_rate: float
    seed: int

    @property
    def digest(self) -> str:
        """A short name for these settings."""
        return content_digest(list(vars(self).values()))[:8]


@dataclass(frozen=True)
class TrainingOptions:
    """How students are trained.

    Attributes:
        steps: optimiser steps.
        rows: trajectories of a pass.
        accumulation: passes of a step.
        lora_learning_rate: highest, for low-rank students.
        full_learning_rate: highest, for the student with all weights.
        seed: of new weights and of the order of the trajectories.
    """

    steps: Count = 500
    rows: Count = 2
    accumulation: Count = 4
    lora_learning_rate: Positive = 2e-4
    full_learning_rate: Positive = 2e-5
    seed: int = 0

    def of(self, student: str) -> Training:
        """The settings of one student."""
        rate = self.full_learning_rate if student == "full" else self.lora_learning_rate
        return Training(self.steps, self.rows, self.accumulation, rate, self.seed)


def as_trajectories(prompts: Sequence[SeededPrompt], said: Tensor) -> list[Trajectory]:
    """Prompts with what was said to them, [row, token], −1 after the end."""
    return [
        Trajectory(tuple(prompt.ids), tuple(token for token in row if token >= 0))
        for prompt, row in zip(prompts, said.tolist(), strict=True)
    ]


def token_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher ‖ student) at each token.

    Args:
        teacher: logits [row, column, vocabulary].
        student: logits of the same shape.

    Returns:
        [row, column], in nats, over the whole vocabulary in float32.
    """
    expected, given = (logits.float().log_softmax(-1) for logits in (teacher, student))
    return (expected.exp() * (expected - given)).sum(-1)


def distillation_loss(teacher: Tensor, student: Tensor, is_response: Tensor) -> Tensor:
    """Mean KL(teacher ‖ student) over response tokens, in nats.

    Args:
        teacher: logits [row, column, vocabulary] that predict the tokens of ``is_response``.
        student: logits of the same shape.
        is_response: [row, column], whether the predicted token belongs to the response.
    """
    kl = token_kl(teacher, student)
    return (kl * is_response).sum() / is_response.sum()


def collate(trajectories: Sequence[Trajectory]) -> dict[str, Tensor]:
    """A batch: rows padded on the left, and which of the last columns are the response.

    Returns:
        What a model takes, and ``is_response`` [row, column of the longest response].
    """
    batch = left_pad([(*each.prompt, *each.response) for each in trajectories])
    n_response = torch.tensor([len(each.response) for each in trajectories])
    width = int(n_response.max())
    return {
        **batch.tokens,
        "position_ids": batch.position_ids,
        "is_response": torch.arange(width) >= width - n_response[:, None],
    }


def predicting_logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """A plain model's logits for the response columns of a batch, [row, column, vocabulary]."""
    shown = {name: tensor for name, tensor in inputs.items() if name != "is_response"}
    n_kept = inputs["is_response"].shape[1] + 1
    return model(**shown, use_cache=False, logits_to_keep=n_kept).logits[:, :-1]


class DistillationTrainer(Trainer):
    """A `Trainer` whose loss compares the student with a teacher on the teacher's own words."""

    def __init__(
        self, *args: Any, teacher: Callable[[Mapping[str, Tensor]], Tensor], **kw: Any
    ) -> None:
        super().__init__(*args, **kw)
        self._teacher = teacher
        # The loss is a mean over the batch; the Trainer divides it by the accumulated passes.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,  # noqa: FBT001, FBT002
        num_items_in_batch: Any = None,  # noqa: ARG002
    ) -> Any:
        """The distillation loss of a batch from `collate`."""
        with torch.no_grad():
            expected = self._teacher(inputs)
        student = predicting_logits(model, inputs)
        loss = distillation_loss(expected, student, inputs["is_response"])
        return (loss, student) if return_outputs else loss


def parse_students(spec: str) -> tuple[str, ...]:
    """The students in a list such as ``r8,r16,full``, in its order.

    Raises:
        UsageError: an unknown one, or one given twice.
    """
    names = tuple(part.strip() for part in spec.split(",") if part.strip())
    for name in names:
        if name != "full" and not _LOW_RANK.fullmatch(name):
            raise UsageError(
                f"Unknown student {name!r}; use r8, r16, … (LoRA of that rank), "
                "or full (all weights)."
            )
        if names.count(name) > 1:
            raise UsageError(f"The student {name!r} is given twice; name each one once.")
    if not names:
        raise UsageError("No student was asked for; use r8, r16, … or full.")
    return names


def parse_counts(spec: str) -> tuple[int, ...]:
    """Numbers of trajectories such as ``50,100``, ascending.

    Raises:
        UsageError: not whole numbers above zero.
    """
    parts = [part.strip() for part in spec.split(",") if part.strip()]
    if not parts or not all(re.fullmatch(r"[1-9]\d*", part) for part in parts):
        raise UsageError(f"The trajectories {spec!r} are not numbers such as 50,100,500.")
    return tuple(sorted({int(part) for part in parts}))


def new_student(
    source: str, student: str, precision: str, seed: int, *, trust_remote_code: bool = False
) -> Any:
    """A copy of the model that can be trained.

    Args:
        source: name of the model, as `load_model` takes it.
        student: ``r8``, … for a low-rank adapter on attention and MLP projections, or ``full``.
        precision: of the frozen weights; what is trained is float32.
        seed: of the adapter's new weights.
        trust_remote_code: as in `load_model`.

    Raises:
        UsageError: peft is missing for an adapter; or the model is itself an adapter, on which
            another could not be saved.
    """
    if base_of(source) is not None:
        raise UsageError(
            f"The model {source!r} is an adapter; students of it need a merged checkpoint."
        )
    match = _LOW_RANK.fullmatch(student)
    weights = precision if match else "float32"
    module = load_weights(source, weights, trust_remote_code=trust_remote_code)
    if match is None:
        return module
    peft, rank = require_peft(), int(match[1])
    torch.manual_seed(seed)
    # All linear maps but the output layer: the projections of attention and MLP.
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return peft.get_peft_model(module, settings)


def train(
    student: Any,
    trajectories: Sequence[Trajectory],
    teacher: Callable[[Mapping[str, Tensor]], Tensor],
    training: Training,
    folder: Path,
    *,
    device: torch.device,
) -> list[float]:
    """Train a student; goes on from the last checkpoint in the folder.

    Args:
        student: from `new_student`; changed in place.
        trajectories: what the teacher said.
        teacher: batch from `collate` → logits that the student is to have.
        training: steps and batches.
        folder: where checkpoints go.
        device: where to train.

    Returns:
        The loss of each step, in nats.
    """
    settings = quiet_arguments(
        folder,
        device,
        max_steps=training.steps,
        per_device_train_batch_size=training.rows,
        gradient_accumulation_steps=training.accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        seed=training.seed,
        save_steps=_SAVE_EVERY,
    )
    trainer = DistillationTrainer(
        model=student,
        args=settings,
        train_dataset=list(trajectories),
        data_collator=collate,
        teacher=teacher,
    )
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    losses = losses_of(trainer, last)
    student.eval()
    return losses


def check_trainable(model: TransformersModel) -> None:
    """See that students can be copies of a model: of the weights that it was loaded from, here.

    Raises:
        UsageError: it runs on a server, an adapter is put on it, or its weights are quantised.
    """
    if hosted(model) is not None:
        raise UsageError("Students are trained on this machine; use the backend 'local'.")
    if record_of(model).adapter:
        raise UsageError(
            f"An adapter is put on the model {record_of(model).label!r}; students of it need a "
            "merged checkpoint."
        )
    if record_of(model).quantisation:
        raise UsageError(
            f"The weights of {record_of(model).label!r} are quantised, and students are copies of "
            "whole ones; leave out --quantise."
        )


def distil(
    model: TransformersModel,
    student: str,
    trajectories: Sequence[Trajectory],
    teacher: Callable[[Mapping[str, Tensor]], Tensor],
    training: Training,
    home: Path,
) -> tuple[Any, list[float]]:
    """Train a student, and save it below ``home``: an adapter, or a whole model.

    Returns:
        The student, and the loss of each step, in nats.
    """
    folder = home / f"{student}-{len(trajectories)}-{training.digest}"
    check_trainable(model)
    record = record_of(model)
    # Code that came with the model runs already, so it was trusted.
    trusted = {"trust_remote_code": type(model._module).__module__.startswith(_REMOTE_CODE)}
    trained = new_student(record.source, student, record.precision, training.seed, **trusted)
    trained.to(model.device)
    checkpoints = folder / "checkpoints"
    losses = train(trained, trajectories, teacher, training, checkpoints, device=model.device)
    trained.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return trained, losses


def student_replies(
    student: Any, model: TransformersModel, prompts: Sequence[SeededPrompt], sampling: Sampling
) -> Tensor:
    """What a student says, or the model that it is of, [row, token], −1 after a row's end."""
    said = torch.full((len(prompts), sampling.max_new_tokens), -1)
    for rows, draw in draws(model, prompts, sampling):
        with torch.inference_mode():
            draw.add(student.generate(**draw.tokens, **draw.settings()))
        said[rows] = draw.replies()
    return said


def per_token_kl(
    trajectories: Sequence[Trajectory],
    teacher: Callable[[Mapping[str, Tensor]], Tensor],
    student: Any,
    n_tokens: int,
    *,
    device: torch.device,
) -> Tensor:
    """KL(teacher ‖ student) at each token of what the teacher said.

    Args:
        trajectories: what it said.
        teacher: batch from `collate` → its logits.
        student: a plain model; None compares the teacher with itself.
        n_tokens: columns of the result.
        device: where both are.

    Returns:
        [row, token], in nats, NaN after a row's end.
    """
    kl = torch.full((len(trajectories), n_tokens), torch.nan)
    for rows in similar_rows([len(each.prompt) + len(each.response) for each in trajectories]):
        batch = collate([trajectories[row] for row in rows])
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        expected = teacher(inputs)
        with torch.inference_mode():
            given = expected if student is None else predicting_logits(student, inputs)
            found = token_kl(expected, given).cpu()
        for row, of_row in zip(rows, found, strict=True):
            n_said = len(trajectories[row].response)
            kl[row, :n_said] = of_row[len(of_row) - n_said :]  # right-aligned there
    return kl


def trained_parameters(student: Any) -> int:
    """How many numbers training changes."""
    return sum(weight.numel() for weight in student.parameters() if weight.requires_grad)
