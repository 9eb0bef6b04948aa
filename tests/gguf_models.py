"""Random models as GGUF files, written as llama.cpp's converter writes them."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

Q8_0 = gguf.GGMLQuantizationType.Q8_0
F32 = gguf.GGMLQuantizationType.F32
# Blocks of a quantised row are of 32 numbers: narrower models than these cannot be quantised.
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_NAMES = {"gemma3_text": "gemma3", "mistral": "llama"}


def write_gguf(
    folder: Path,
    file: Path,
    kind: gguf.GGMLQuantizationType = F32,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    architecture: str | None = None,
    template: str | None = TEMPLATE,
) -> Path:
    """Write the model of a folder as a GGUF file.

    Args:
        folder: of the model.
        file: the file to write.
        kind: of the matrices; everything else is in float32.
        metadata: more keys, which go before the usual ones; None leaves one out.
        tensors: more tensors.
        architecture: in place of the model's own.
        template: the chat template; None writes none.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config: PreTrainedConfig = model.config
    named = _NAMES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(file, architecture or named)
    values = {
        **_metadata(config, architecture or named),
        **_vocabulary(config.vocab_size),
        **({"tokenizer.chat_template": template} if template else {}),
        **(metadata or {}),
    }
    for key, value in values.items():
        if value is not None:
            _add(writer, key, value)
    table = gguf.get_tensor_name_map(_kind(named), config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        as_there = f"{table.get_name(stem)}.{suffix}"
        numbers = _as_llama_cpp(weight.numpy(), as_there, named, config)
        of = kind if numbers.ndim > 1 else F32
        stored = gguf.quants.quantize(numbers, of) if of is not F32 else numbers
        writer.add_tensor(as_there, stored, raw_dtype=of)
    for name, numbers in (tensors or {}).items():
        writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _kind(named: str) -> gguf.MODEL_ARCH:
    return next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == named)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _metadata(config: PreTrainedConfig, named: str) -> dict[str, Any]:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope: Any = config.rope_parameters
    said: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": head,
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
    }
    if named in ("llama", "phi3"):
        said["rope.dimension_count"] = int(head * rope.get("partial_rotary_factor", 1.0))
    name = "a mistral" if config.model_type == "mistral" else f"a {named}"
    return {
        "general.name": name,
        **{f"{named}.{key}": value for key, value in said.items() if value is not None},
    }


def _vocabulary(size: int) -> dict[str, Any]:
    """Bytes, and control tokens; the rest is never used."""
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
    alphabet = [*bytes_to_unicode().values(), "th", "an"]
    unused = [f"unused{number}" for number in range(size - len(special) - len(alphabet))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*special, *alphabet, *unused],
        "tokenizer.ggml.token_type": [3] * len(special) + [1] * (size - len(special)),
        "tokenizer.ggml.merges": ["t h", "a n"],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    }


def _as_llama_cpp(
    numbers: np.ndarray, name: str, named: str, config: PreTrainedConfig
) -> np.ndarray:
    """As `LlamaModel.permute` and Gemma's `modify_tensors` of llama.cpp's converter have it."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    part = name.split(".")[-2]
    if named == "llama" and part in heads:
        halves = numbers.reshape(heads[part], 2, numbers.shape[0] // heads[part] // 2, -1)
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(numbers.shape)
    if named.startswith("gemma") and name.endswith("norm.weight"):
        return numbers + 1
    return numbers
