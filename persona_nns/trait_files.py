"""Trait vectors in files of other tools: ``.npy``, ``.pt`` and ``.safetensors``.

A vector is [n_layers + 1, d_model]: a row for the residual stream entering each block, and one for
the stream after the final norm. A ``.pt`` is read with ``weights_only``, so it cannot run code.
"""

import pickle
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from persona_nns.errors import UsageError, one_line

SUFFIXES = (".npy", ".pt", ".safetensors")
# What the readers raise for files that are damaged, or that hold something else.
_UNREADABLE = (
    *(OSError, ValueError, RuntimeError, EOFError, LookupError, AttributeError, TypeError),
    *(pickle.UnpicklingError, struct.error, SafetensorError),
)


def read_vector(file: str | Path) -> Tensor:
    """Read one vector, [layer, d_model] in float32.

    Raises:
        UsageError: the file cannot be read, or holds something else.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise UsageError(f"The vector {str(file)!r} does not exist.")
    readers = {".npy": _read_npy, ".pt": _read_pt, ".safetensors": _read_safetensors}
    if path.suffix not in readers:
        raise UsageError(f"The vector {str(file)!r} ends in none of {', '.join(SUFFIXES)}.")
    try:
        tensor = readers[path.suffix](path)
    except _UNREADABLE as error:
        raise UsageError(f"The vector {str(file)!r} cannot be read: {_reason(error)}.") from error
    if not isinstance(tensor, Tensor) or tensor.dim() != 2 or not tensor.is_floating_point():
        shape = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise UsageError(
            f"The vector {str(file)!r} holds {shape}; it has to be numbers of shape "
            "[n_layers + 1, d_model]."
        )
    if not bool(torch.isfinite(tensor).all()):
        raise UsageError(f"The vector {str(file)!r} holds numbers that are not finite.")
    return tensor.float()


def write_vector(vector: Tensor, file: str | Path) -> None:
    """Write one vector [layer, d_model]; the suffix chooses the format.

    Raises:
        UsageError: no such format or folder.
    """
    path = Path(file).expanduser()
    if not path.parent.is_dir():
        raise UsageError(f"The folder of {str(file)!r} does not exist.")
    vector = vector.detach().cpu().float().contiguous()
    if path.suffix == ".npy":
        np.save(path, vector.numpy())
    elif path.suffix == ".pt":
        torch.save(vector, path)
    elif path.suffix == ".safetensors":
        save_file({"vector": vector}, path)
    else:
        raise UsageError(f"{str(file)!r} ends in none of {', '.join(SUFFIXES)}.")


def _read_npy(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path, allow_pickle=False))


def _reason(error: Exception) -> str:
    """What is wrong with a file, without its reader's advice to load it unsafely."""
    if isinstance(error, pickle.UnpicklingError) or "pickle" in str(error):
        return "it holds more than a tensor, or is damaged (no pickle is ever loaded)"
    return one_line(error).rstrip(".")


def _read_pt(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on what cannot be read; the error says it
        return torch.load(path, weights_only=True, map_location="cpu")


def _read_safetensors(path: Path) -> Tensor:
    tensors = load_file(path)
    if len(tensors) != 1:
        raise ValueError(f"it holds {len(tensors)} tensors ({', '.join(tensors)}), not one")
    return next(iter(tensors.values()))
