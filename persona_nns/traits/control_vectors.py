"""Directions as control vectors: the GGUF files that llama.cpp and repeng steer with.

A tensor ``direction.N`` is what llama.cpp adds to the output of its block N, counted from 0
(``common_control_vector_load`` stores it at place N − 1, and ``llama_adapter_cvec::apply`` gives
place N − 1 to block N), and repeng does the same. The output of block N enters block N + 1, so
``direction.N`` is our layer N + 1. Three of our layers have no place in such a file: 0 and 1,
because the format begins at ``direction.1``; and the last, n_layers, because the stream after the
final norm is not what llama.cpp adds to (``direction.{n_layers − 1}`` of another tool is added
before that norm, where no layer of ours is, and is left out).

llama.cpp refuses tensors of other names but reads no metadata, so the three layers travel as
metadata, ``persona_nns.layer.L``: what was written here is read back whole. In a file of another
tool they are zero.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFWriter
from torch import Tensor

from persona_nns.errors import UsageError
from persona_nns.models.gguf_file import GGUFFile, read_gguf

_ARCHITECTURE = "controlvector"
_OURS = "persona_nns"
_FIRST = 2  # our layer of direction.1
_MOST = 2000  # layers: more are a damaged number, and not to be made room for


def read_control_vector(path: Path) -> tuple[Tensor, dict[str, str]]:
    """Read a control vector, [n_layers + 1, d_model] in float32, and what the file says of it.

    The number of layers is what the file says where it was written here; else ``layer_count``, or
    one more than its last N, whichever is more.

    Raises:
        UsageError: it is no GGUF file, or no control vector.
        ValueError: its directions are named or shaped otherwise.
    """
    file = read_gguf(path)
    if file.architecture != _ARCHITECTURE:
        raise UsageError(
            f"The GGUF file {path.name!r} is of the architecture {file.architecture!r}; a control "
            f"vector is of {_ARCHITECTURE!r}."
        )
    numbers = {name: _number(name) for name in file.tensors}
    shapes = {tensor.shape for tensor in file.tensors.values()}
    if len(shapes) != 1 or len(shape := next(iter(shapes))) != 1:
        raise ValueError(f"its directions have to be of one width, and are of {sorted(shapes)}")
    counted = int(file.metadata.get(f"{_ARCHITECTURE}.layer_count", 0))
    n_layers = int(file.metadata.get(f"{_OURS}.n_layers", 0))
    n_layers = n_layers or max(counted, max(numbers.values()) + 1)
    if not 0 < n_layers <= _MOST:
        raise ValueError(f"it counts {n_layers:,} layers")
    vectors = np.zeros((n_layers + 1, *shape), np.float32)
    for name, number in numbers.items():
        if number < n_layers - 1:
            vectors[number + 1] = file.values(name)
    for layer in _apart(n_layers):
        kept = file.metadata.get(f"{_OURS}.layer.{layer}")
        if kept is not None:
            vectors[layer] = kept
    return torch.from_numpy(vectors), _said(file)


def _number(name: str) -> int:
    match = re.fullmatch(r"direction\.([1-9]\d*)", name)
    if match is None:
        raise ValueError(f"it holds {name!r}, and not directions alone (direction.1, …)")
    return int(match[1])


def _said(file: GGUFFile) -> dict[str, str]:
    """What a file says in words of its direction."""
    of_ours = {
        key.removeprefix(f"{_OURS}."): value
        for key, value in file.metadata.items()
        if key.startswith(f"{_OURS}.") and isinstance(value, str)
    }
    name = file.metadata.get("general.name")
    return of_ours | ({"name": name} if isinstance(name, str) else {})


def _apart(n_layers: int) -> list[int]:
    """Our layers that have no tensor."""
    return [0, 1, n_layers]


def write_control_vector(vectors: Tensor, path: Path, about: Mapping[str, str]) -> None:
    """Write a control vector.

    Args:
        vectors: [n_layers + 1, d_model] in float32.
        path: where.
        about: what is known of it in words; ``name`` and ``architecture`` (the class of a model,
            whose beginning is the ``model_hint``) in llama.cpp's own places.

    Raises:
        UsageError: the model has too few blocks for the format.
    """
    n_layers = len(vectors) - 1
    if n_layers <= _FIRST:
        raise UsageError(
            f"A control vector (.gguf) begins at layer {_FIRST}, and a model of {n_layers} blocks "
            "has none there; write a .safetensors file."
        )
    writer = GGUFWriter(path, _ARCHITECTURE)
    writer.add_string(f"{_ARCHITECTURE}.model_hint", _hint(about.get("architecture", "")))
    writer.add_uint32(f"{_ARCHITECTURE}.layer_count", n_layers - _FIRST)
    writer.add_string("general.name", about.get("name", ""))
    writer.add_uint32(f"{_OURS}.n_layers", n_layers)
    for layer in _apart(n_layers):
        writer.add_array(f"{_OURS}.layer.{layer}", vectors[layer].tolist())
    for key, value in about.items():
        if key != "name":
            writer.add_string(f"{_OURS}.{key}", value)
    for layer in range(_FIRST, n_layers):
        writer.add_tensor(f"direction.{layer - 1}", vectors[layer].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _hint(architecture: str) -> str:
    """The name that llama.cpp has for a model of a class, as near as the class tells it."""
    return re.sub(r"(ForCausalLM|LMHeadModel)$", "", architecture).lower()
