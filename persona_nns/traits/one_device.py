"""Training on the device that was asked for, and on no other.

A `Trainer` takes the first accelerator that it finds, and spreads batches over all of them with
``nn.DataParallel``. The teacher is on one device, so its students are trained there too.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

# Where accelerate, which moves models and batches for a `Trainer`, reads its device.
_VARIABLE = "ACCELERATE_TORCH_DEVICE"


@dataclass
class OneDeviceArguments(TrainingArguments):
    """Arguments of a `Trainer` that trains on ``one_device``, such as ``cuda:1``."""

    one_device: str = "cpu"

    @cached_property
    def _setup_devices(self) -> torch.device:
        """What ``device`` is; transformers asks for it once, when the arguments are made."""
        device = torch.device(self.one_device)
        with _read_by_accelerate(device):
            TrainingArguments._setup_devices.func(self)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # it had chosen the first
        self._n_gpu = int(device.type != "cpu")
        return device


def quiet_arguments(folder: Path, device: torch.device, **own: Any) -> OneDeviceArguments:
    """Arguments of a training that says nothing, logs every step and keeps its last checkpoint.

    Args:
        folder: where checkpoints go.
        device: where to train.
        **own: what else a `TrainingArguments` takes.
    """
    return OneDeviceArguments(
        one_device=str(device),
        output_dir=str(folder),
        use_cpu=device.type == "cpu",
        logging_steps=1,
        save_strategy="steps",
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        label_names=[],
        **own,
    )


def losses_of(trainer: Trainer, checkpoint: str | None) -> list[float]:
    """Train, from a checkpoint on if there is one; the loss of each step, in nats."""
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=checkpoint)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@contextmanager
def _read_by_accelerate(device: torch.device) -> Iterator[None]:
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = str(device)
    try:
        yield
    finally:
        del os.environ[_VARIABLE]
        if before is not None:
            os.environ[_VARIABLE] = before
