"""Training on the device that was asked for, and on no other.

A `Trainer` takes the first accelerator that it finds, and spreads batches over all of them with
``nn.DataParallel``. The teacher is on one device, so its students are trained there too.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import TrainingArguments

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
