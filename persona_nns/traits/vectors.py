"""Directions in files: ``.npy``, ``.pt``, ``.safetensors`` and control vectors in ``.gguf``.

A direction is [n_layers + 1, d_model]: a row for the residual stream entering each block, and one
for the stream after the final norm. A ``.pt`` is read with ``weights_only``, so it cannot run code.
What is known of a direction in words travels in the formats that have a place for it
(``.safetensors``, ``.gguf``).
"""

import pickle
import struct
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from persona_nns.errors import UsageError, one_line
from persona_nns.traits.control_vectors import read_control_vector, write_control_vector

#: What a direction in a file of a format is, with what the file says of it.
_Read = tuple[Any, dict[str, str]]
# What the readers raise for files that are damaged, or that hold something else.
_UNREADABLE = (
    *(OSError, ValueError, RuntimeError, EOFError, LookupError, AttributeError, TypeError),
    *(pickle.UnpicklingError, struct.error, SafetensorError),
)


def read_vector(file: str | Path) -> Tensor:
    """Read one direction, [layer, d_model] in float32.

    Raises:
        UsageError: the file cannot be read, or holds something else.
    """
    return read_described(file)[0]


def read_described(file: str | Path) -> tuple[Tensor, dict[str, str]]:
    """Read one direction, [layer, d_model] in float32, and what its file says of it.

    Raises:
        UsageError: the file cannot be read, or holds something else.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise UsageError(f"The vector {str(file)!r} does not exist.")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"The vector {str(file)!r} ends in none of {', '.join(SUFFIXES)}.")
    try:
        tensor, about = reader(path)
        plain = _plain(tensor)
        finite = plain is None or bool(torch.isfinite(plain).all())
    except _UNREADABLE as error:
        raise UsageError(f"The vector {str(file)!r} cannot be read: {_reason(error)}.") from error
    if plain is None:
        raise UsageError(
            f"The vector {str(file)!r} holds {_described(tensor)}; it has to be numbers of shape "
            "[n_layers + 1, d_model]."
        )
    if not finite:
        raise UsageError(f"The vector {str(file)!r} holds numbers that are not finite.")
    return plain, about


def _plain(tensor: Any) -> Tensor | None:
    """The same in float32, without zeros left out or gradients; None where it is no matrix."""
    if not isinstance(tensor, Tensor) or tensor.is_meta or not tensor.is_floating_point():
        return None
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return tensor.detach().float() if tensor.dim() == 2 else None


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return "a tensor without numbers (meta)" if value.is_meta else str(list(value.shape))


def write_vector(vector: Tensor, file: str | Path, about: Mapping[str, str] | None = None) -> None:
    """Write one direction [layer, d_model]; the suffix chooses the format.

    Args:
        vector: what is written, in float32.
        file: where.
        about: what is known of it in words, for the formats that have a place for it.

    Raises:
        UsageError: no such format or folder.
    """
    path = Path(file).expanduser()
    if not path.parent.is_dir():
        raise UsageError(f"The folder of {str(file)!r} does not exist.")
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        raise UsageError(f"{str(file)!r} ends in none of {', '.join(SUFFIXES)}.")
    writer(vector.detach().cpu().float().contiguous(), path, about or {})


def _reason(error: Exception) -> str:
    """What is wrong with a file, without its reader's advice to load it unsafely."""
    if isinstance(error, pickle.UnpicklingError) or "pickle" in str(error):
        return "it holds more than a tensor, or is damaged (no pickle is ever loaded)"
    return one_line(error).rstrip(".")


def _read_npy(path: Path) -> _Read:
    return torch.from_numpy(np.load(path, allow_pickle=False)), {}


def _read_pt(path: Path) -> _Read:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on what cannot be read; the error says it
        return torch.load(path, weights_only=True, map_location="cpu"), {}


def _read_safetensors(path: Path) -> _Read:
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        if len(names) != 1:
            raise ValueError(f"it holds {len(names)} tensors ({', '.join(names)}), not one")
        return file.get_tensor(names[0]), dict(file.metadata() or {})


def _write_npy(vector: Tensor, path: Path, _about: Mapping[str, str]) -> None:
    with path.open("wb") as stream:  # by its path, numpy would add an ending to V.NPY
        np.save(stream, vector.numpy())


def _write_pt(vector: Tensor, path: Path, _about: Mapping[str, str]) -> None:
    torch.save(vector, path)


def _write_safetensors(vector: Tensor, path: Path, about: Mapping[str, str]) -> None:
    save_file({"vector": vector}, path, {"format": "pt", **about})


_READERS: dict[str, Callable[[Path], _Read]] = {
    ".npy": _read_npy,
    ".pt": _read_pt,
    ".safetensors": _read_safetensors,
    ".gguf": read_control_vector,
}
_WRITERS: dict[str, Callable[[Tensor, Path, Mapping[str, str]], None]] = {
    ".npy": _write_npy,
    ".pt": _write_pt,
    ".safetensors": _write_safetensors,
    ".gguf": write_control_vector,
}
SUFFIXES = tuple(_READERS)
