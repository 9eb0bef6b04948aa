"""Train keys and values in a slot of a cache, and nothing else.

The loop, its checkpoints and their resumption are those of transformers' `Trainer`, as for students
(`distillation`); the optimiser is Adam, whose rate climbs, and then falls linearly to a tenth.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from nnsight import TransformersModel
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from persona_nns.declarations.options import Count, Positive
from persona_nns.declarations.plans import content_digest
from persona_nns.declarations.record import ModelRecord
from persona_nns.errors import UsageError
from persona_nns.models.cartridges import load_cartridge, save_cartridge
from persona_nns.models.load import hosted, record_of
from persona_nns.tracing.kv.cartridge import Cartridge, Form
from persona_nns.tracing.kv.gap import HostGap
from persona_nns.traits.one_device import losses_of, quiet_arguments

_SAVE_EVERY = 20  # steps between checkpoints
_WARM_UP = 10  # steps in which the rate climbs
_LAST_RATE = 0.1  # of the highest

#: What keys and values, [layer, kv_head, slot, d_head] each, cost, in nats.
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class CartridgeTraining:
    """How cartridges are trained.

    Attributes:
        steps: optimiser steps.
        learning_rate: highest, after 10 steps; it falls linearly to a tenth.
        seed: of what tells slots apart that begin as the same token.
    """

    steps: Count = 100
    learning_rate: Positive = 0.02
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0 on, as a share of the highest."""
        if step < _WARM_UP:
            return (step + 1) / _WARM_UP
        falling = (step - _WARM_UP + 1) / max(self.steps - _WARM_UP, 1)
        return 1 - (1 - _LAST_RATE) * min(falling, 1.0)


class Slots(torch.nn.Module):
    """Keys and values as what is trained; in float32, whatever the model's precision."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys = torch.nn.Parameter(keys.float().clone())
        self.values = torch.nn.Parameter(values.float().clone())

    def cartridge(
        self, record: ModelRecord, gap: HostGap, form: Form, seed: int, losses: Sequence[float]
    ) -> Cartridge:
        """What has been trained, in the model's precision.

        Args:
            record: of the model.
            gap: what it was trained on.
            form: what stood behind the slot.
            seed: of the training.
            losses: of its steps.
        """
        precision = getattr(torch, record.precision)
        keys, values = (each.detach().to(precision) for each in (self.keys, self.values))
        return Cartridge(
            keys=keys,
            values=values,
            model=record.label,
            model_version=record.version,
            precision=record.precision,
            persona=gap.cells[0].persona,
            persona_text=gap.cells[0].persona_text,
            form=form,
            start=gap.start,
            tasks=tuple(cell.task for cell in gap.cells),
            seed=seed,
            losses=tuple(losses),
        )


class SlotTrainer(Trainer):
    """A `Trainer` whose loss is a function of keys and values; it has no data but these."""

    def __init__(self, *args: Any, loss: Loss, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self._loss = loss
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: Any,
        inputs: Any,  # noqa: ARG002
        return_outputs: bool = False,  # noqa: FBT001, FBT002
        num_items_in_batch: Any = None,  # noqa: ARG002
    ) -> Any:
        """The loss of a step."""
        loss = self._loss(model.keys, model.values)
        return (loss, None) if return_outputs else loss


def train_slots(
    slots: Slots, loss: Loss, training: CartridgeTraining, folder: Path, *, device: torch.device
) -> list[float]:
    """Train slots; goes on from the last checkpoint in the folder.

    Args:
        slots: changed in place.
        loss: what they are to make small.
        training: how.
        folder: where checkpoints go.
        device: where to train.

    Returns:
        The loss before each step, in nats.
    """
    settings = quiet_arguments(
        folder,
        device,
        max_steps=training.steps,
        per_device_train_batch_size=1,
        max_grad_norm=0.0,
        seed=training.seed,
        logging_nan_inf_filter=False,
        save_steps=_SAVE_EVERY,
    )
    adam = torch.optim.Adam(slots.to(device).parameters(), lr=training.learning_rate)
    trainer = SlotTrainer(
        model=slots,
        args=settings,
        train_dataset=[{"step": torch.tensor(step)} for step in range(training.steps)],
        optimizers=(adam, LambdaLR(adam, training.rate)),
        loss=loss,
    )
    return losses_of(trainer, _last_whole(folder))


def _last_whole(folder: Path) -> str | None:
    """The last checkpoint that was written to its end: the trainer's state comes last."""
    steps = [
        int(state.parent.name.rpartition("-")[2])
        for state in folder.glob("checkpoint-*/trainer_state.json")
    ]
    return str(folder / f"checkpoint-{max(steps)}") if steps else None


def train_once(file: Path, train: Callable[[Path], Cartridge]) -> Cartridge:
    """A cartridge from its file, or trained and written there.

    Several processes may ask for it at the same moment: one trains, the others wait for its file.

    Args:
        file: whose name tells all that determines the cartridge.
        train: makes it, with checkpoints in the folder that it is given.
    """
    checkpoints = file.parent / "checkpoints" / file.stem
    checkpoints.mkdir(parents=True, exist_ok=True)
    with FileLock(checkpoints.with_suffix(".lock")):
        if not file.is_file():
            save_cartridge(train(checkpoints), file)
        shutil.rmtree(checkpoints, ignore_errors=True)
    return load_cartridge(file)


def cartridge_file(
    output: str | Path, model: TransformersModel, name: str, determining: Any
) -> Path:
    """Where a cartridge goes, by the JSON-able value that determines it beside the model."""
    record = record_of(model)
    known = [record.version, record.precision, record.attn_implementation, determining]
    label = record.label.replace("/", "--")
    return Path(output) / label / f"{name}-{content_digest(known)[:10]}.safetensors"


def check_trains_slots(model: TransformersModel) -> None:
    """See that a model gives gradients: that it is on this machine.

    Raises:
        UsageError: it runs on a server.
    """
    if hosted(model) is not None:
        raise UsageError("Cartridges are trained on this machine; use the backend 'local'.")
