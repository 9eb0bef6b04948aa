"""The tensors of a GGUF file as transformers has them: names, layout and values in float32."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig

from persona_nns.errors import PersonaError
from persona_nns.models.gguf_config import ROTATION
from persona_nns.models.gguf_file import GGUFFile

_SHARD = 2**31
_KINDS = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}


def write_weights(file: GGUFFile, config: PreTrainedConfig, folder: Path) -> None:
    """Write the weights as safetensors in float32, with a bar on stderr.

    Args:
        file: where they are.
        config: of its model; told the model's class and precision.
        folder: where to write.

    Raises:
        PersonaError: tensors are missing, of another shape, or have no place in the architecture.
    """
    names = _names(file, config)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        told = f"Dequantising {file.path.name}"
        for name in track([*names], told, console=Console(stderr=True)):
            values = _as_in_transformers(file.values(name), name, file.architecture, config)
            yield names[name], torch.from_numpy(values)

    _write_shards(tensors(), folder)


def _names(file: GGUFFile, config: PreTrainedConfig) -> dict[str, str]:
    """Names of a file's tensors → those of transformers.

    Raises:
        PersonaError: as in `write_weights`.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    config.architectures, config.dtype = [type(model).__name__], torch.float32
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    # gguf has no name for Mistral: llama.cpp takes it for a Llama.
    kind = _KINDS.get(file.architecture, MODEL_ARCH.LLAMA)
    table = get_tensor_name_map(kind, config.num_hidden_layers)
    names: dict[str, str] = {}
    for name in wanted:
        stem, _, suffix = name.rpartition(".")
        names[f"{table.get_name(stem)}.{suffix}"] = name
    shapes = {name: each.shape for name, each in file.tensors.items() if name != ROTATION}
    other = [name for name in names if shapes.get(name, wanted[names[name]]) != wanted[names[name]]]
    for what, which in (
        ("lacks weights of its architecture", set(names) - set(shapes)),
        ("holds weights that have no place in its architecture", set(shapes) - set(names)),
        ("holds weights of another shape than its metadata say", other),
    ):
        if which:
            raise PersonaError(
                f"The GGUF file {file.path.name!r} {what}: {len(which)}, such as {min(which)}."
            )
    return names


def _as_in_transformers(
    values: np.ndarray, name: str, architecture: str, config: PreTrainedConfig
) -> np.ndarray:
    """A tensor with rows and values as transformers has them.

    llama.cpp interleaves the two halves that Llama's positions rotate, and its Gemma's norms have
    the one in them that transformers' code adds.
    """
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    part = name.split(".")[-2]
    if architecture == "llama" and part in heads:
        pairs = values.reshape(heads[part], values.shape[0] // heads[part] // 2, 2, -1)
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return values - 1
    return values


def _write_shards(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Write tensors as they come into files of about 2 GiB, as transformers names them."""
    homes: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    size, total, count = 0, 0, 0

    def flush() -> None:
        nonlocal shard, size, total, count
        count, total = count + 1, total + size
        file = f"model-{count:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        homes.update(dict.fromkeys(shard, file))
        shard, size = {}, 0

    for name, tensor in tensors:
        shard[name] = tensor
        size += tensor.nbytes
        if size >= _SHARD:
            flush()
    if shard:
        flush()
    if count == 1:
        (folder / "model-00001.safetensors").rename(folder / "model.safetensors")
        return
    index = {"metadata": {"total_size": total}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
