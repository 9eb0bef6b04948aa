"""The tensors of a GGUF file as transformers has them: names, layout and values in float32."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map
from gguf.quants import dequantize
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.gguf.reader import GgufHeader, TensorInfo

from persona_nns.errors import PersonaError

#: A tensor that is no weight: what Llama-3's rotary frequencies are divided by.
ROTATION = "rope_freqs.weight"
_SHARD = 2**31
_KINDS = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
_PLAIN = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}


def write_weights(
    header: GgufHeader, architecture: str, config: PreTrainedConfig, folder: Path, shown: str
) -> None:
    """Write the weights as safetensors in float32, with a bar on stderr.

    Args:
        header: the file's table.
        architecture: as the file calls it.
        config: of its model; told the model's class and precision.
        folder: where to write.
        shown: how to call the file in a message.

    Raises:
        PersonaError: tensors are missing, of another shape, or have no place in the architecture.
    """
    names = _names(header, architecture, config, shown)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        infos = [info for info in header.tensors if info.name in names]
        for info in track(infos, f"Dequantising {shown}", console=Console(stderr=True)):
            values = _as_in_transformers(_values(header, info), info.name, architecture, config)
            yield names[info.name], torch.from_numpy(values)

    _write_shards(tensors(), folder)


def rotation_factors(header: GgufHeader) -> np.ndarray:
    """What the rotary frequencies of a file are divided by, `[head_dim / 2]`."""
    return next(_values(header, info) for info in header.tensors if info.name == ROTATION)


def _names(
    header: GgufHeader, architecture: str, config: PreTrainedConfig, shown: str
) -> dict[str, str]:
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
    kind = _KINDS.get(architecture, MODEL_ARCH.LLAMA)
    table = get_tensor_name_map(kind, config.num_hidden_layers)
    names: dict[str, str] = {}
    for name in wanted:
        stem, _, suffix = name.rpartition(".")
        names[f"{table.get_name(stem)}.{suffix}"] = name
    shapes = {info.name: info.shape for info in header.tensors if info.name != ROTATION}
    other = [name for name in names if shapes.get(name, wanted[names[name]]) != wanted[names[name]]]
    for what, which in (
        ("lacks weights of its architecture", set(names) - set(shapes)),
        ("holds weights that have no place in its architecture", set(shapes) - set(names)),
        ("holds weights of another shape than its metadata say", other),
    ):
        if which:
            raise PersonaError(
                f"The GGUF file {shown!r} {what}: {len(which)}, such as {min(which)}."
            )
    return names


def _values(header: GgufHeader, info: TensorInfo) -> np.ndarray:
    """A tensor of a file in float32."""
    data = np.memmap(header.path, mode="r", dtype=np.uint8)
    start = header.data_start + info.offset
    raw = np.array(data[start : start + info.nbytes]).reshape(*info.shape[:-1], -1)
    kind = GGMLQuantizationType(info.ggml_type)
    return dequantize(raw.view(_PLAIN.get(kind, np.uint8)), kind).astype(np.float32, copy=False)


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
