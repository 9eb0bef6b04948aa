"""The card, the driver and the versions; and how fast the card multiplies and reads."""

import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

_PACKAGES = ("torch", "transformers", "nnsight", "accelerate", "safetensors", "persona-nns")


def exact_float32() -> None:
    """Multiply float32 in float32: TF32 keeps ten bits of a factor."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def tell_machine(device: torch.device) -> dict[str, Any]:
    """What computes here."""
    told: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "card": platform.processor() or platform.machine(),
        "nvidia_smi": "left out: there is no nvidia-smi",
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        told |= {"card": card.name, "card_bytes": card.total_memory}
        told |= {"capability": f"{card.major}.{card.minor}", "cards": torch.cuda.device_count()}
    if shutil.which("nvidia-smi"):
        said = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False)
        told["nvidia_smi"] = said.stdout or said.stderr
    return told


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, call: Callable[[], Any]) -> float:
    """Seconds of a call, what it leaves to the device included."""
    synchronise(device)
    started = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - started


def multiply_rate(device: torch.device, dtype: torch.dtype, width: int, n_rows: int) -> float:
    """Multiply-adds a second of products of a model's shape, each with a weight of its own."""
    made = {"device": device, "dtype": dtype}
    weights = [torch.randn(4 * width, width, **made) for _ in range(8)]
    rows = torch.randn(n_rows, width, **made)

    def pass_over() -> None:
        for weight in weights:
            torch.nn.functional.linear(rows, weight)

    pass_over()
    seconds = statistics.median(timed(device, pass_over) for _ in range(7))
    return len(weights) * rows.numel() * 4 * width / seconds


def read_rate(device: torch.device, n_bytes: int) -> float:
    """Bytes a second that memory gives and takes: a copy reads each byte, and writes it."""
    source = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    into = torch.empty_like(source)
    into.copy_(source)
    seconds = statistics.median(timed(device, lambda: into.copy_(source)) for _ in range(7))
    return 2 * n_bytes / seconds
