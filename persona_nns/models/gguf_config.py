"""What a GGUF file says of its model, as a configuration of transformers.

transformers' own reading leaves out what its table has no place for (scaled rotary frequencies, the
width of a head, caps of logits) and takes a default instead; here it is read too, or refused.
"""

import copy
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from persona_nns.errors import UsageError
from persona_nns.models.gguf_file import GGUFFile

#: A tensor that is no weight: what Llama-3's rotary frequencies are divided by.
ROTATION = "rope_freqs.weight"
#: Architectures of files, and what transformers calls them.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
}
_SPECIAL = {"bos": "bos", "eos": "eos", "padding": "pad"}
# Layers of the models whose attention is scaled by another width than that of a head.
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}
# Llama-3's frequencies: a file holds what they are divided by, not how that was computed.
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config_of(file: GGUFFile) -> PreTrainedConfig:
    """The configuration of a file's model.

    Raises:
        UsageError: its architecture, or its rotary frequencies, are not supported, or it does not
            say what it should.
    """
    shown, named = file.path.name, file.architecture
    if named not in ARCHITECTURES:
        raise UsageError(
            f"The file {shown!r} holds a model of the architecture {named!r}; GGUF files are read "
            f"of {', '.join(ARCHITECTURES)}."
        )
    # llama.cpp has no name of its own for Mistral.
    is_mistral = named == "llama" and "mistral" in str(file.metadata.get("general.name")).lower()
    try:
        config = _read(file, "mistral" if is_mistral else named)
    except KeyError as error:
        raise UsageError(f"The GGUF file {shown!r} does not hold {error.args[0]!r}.") from error
    if ROTATION in file.tensors:
        config.rope_parameters = _divided(file.values(ROTATION), config, shown)
    return config


def _read(file: GGUFFile, architecture: str) -> PreTrainedConfig:
    """The configuration, but for frequencies that are divided; KeyError where it is not said."""
    beginning, tensors = f"{file.architecture}.", file.tensors
    said = {
        key.removeprefix(beginning): value
        for key, value in file.metadata.items()
        if key.startswith(beginning)
    }
    names = GGUF_CONFIG_MAPPING[architecture]
    read = {names[key]: value for key, value in said.items() if names.get(key) is not None}
    read |= {
        f"{of}_token_id": file.metadata.get(f"tokenizer.ggml.{kind}_token_id")
        for kind, of in _SPECIAL.items()
    }
    read["vocab_size"] = tensors["token_embd.weight"].shape[0]
    read["tie_word_embeddings"] = "output.weight" not in tensors
    read |= _attention(architecture, said, tensors)
    read |= _rotation(architecture, said, read, file.path.name)
    return AutoConfig.for_model(ARCHITECTURES[architecture], **read)


def _attention(
    architecture: str, said: Mapping[str, Any], tensors: Collection[str]
) -> dict[str, Any]:
    """Widths, windows, caps and biases of attention."""
    heads = said["attention.head_count"]
    width = said.get("attention.key_length") or said["embedding_length"] // heads
    read: dict[str, Any] = {}
    if architecture not in ("qwen2", "phi3"):
        read["head_dim"] = width
    if architecture in ("llama", "qwen3"):
        read["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if architecture in ("mistral", "phi3"):
        read["sliding_window"] = said.get("attention.sliding_window") or None
    if architecture == "gemma2":
        caps = {"attn_logit_softcapping", "final_logit_softcapping"}
        read |= {name: said[name] for name in caps & set(said)}
    if architecture in _LARGEST_GEMMA:
        is_largest = said["block_count"] == _LARGEST_GEMMA[architecture]
        read["query_pre_attn_scalar"] = said["embedding_length"] // heads if is_largest else width
    return read


def _rotation(
    architecture: str, said: Mapping[str, Any], read: Mapping[str, Any], shown: str
) -> dict[str, Any]:
    """How positions are rotated, where it is not by the plain frequencies.

    Raises:
        UsageError: in a way that is not supported.
    """
    kind = said.get("rope.scaling.type", "none")
    if "rope.scaling.type" not in said and said.get("rope.scaling.factor", 1.0) != 1.0:
        kind = "linear"
    if kind not in ("none", "linear"):
        raise UsageError(
            f"The file {shown!r} scales its rotary frequencies by the method {kind!r}; of GGUF "
            "files only linear scaling and Llama-3's are read."
        )
    if architecture == "phi3":
        width = read["hidden_size"] // read["num_attention_heads"]
        return {"partial_rotary_factor": said.get("rope.dimension_count", width) / width}
    if kind == "none":
        return {}
    base = read.get("rope_theta", 10000.0)
    scaled = {"rope_type": "linear", "factor": said["rope.scaling.factor"], "rope_theta": base}
    if architecture != "gemma3":
        return {"rope_parameters": scaled}
    near = {"rope_type": "default", "rope_theta": 10000.0}
    return {"rope_parameters": {"full_attention": scaled, "sliding_attention": near}}


def _divided(factors: np.ndarray, config: PreTrainedConfig, shown: str) -> dict[str, Any]:
    """The ``rope_parameters`` that divide the rotary frequencies as a file says.

    Args:
        factors: what each is divided by, `[head_dim / 2]`.
        config: the model's configuration, with the frequencies' base.
        shown: how to call the file in a message.

    Raises:
        UsageError: they are not those of Llama-3.1 and 3.2.
    """
    base = config.rope_parameters["rope_theta"]
    parameters = {**_LLAMA3, "factor": float(factors.max()), "rope_theta": base}
    tried = copy.deepcopy(config)
    tried.rope_parameters = parameters
    scaled = ROPE_INIT_FUNCTIONS["llama3"](tried, torch.device("cpu"))[0].numpy()
    plain = base ** -(np.arange(len(factors)) / len(factors))
    if scaled.shape != factors.shape or not np.allclose(scaled, plain / factors, rtol=1e-3):
        raise UsageError(
            f"The file {shown!r} divides its rotary frequencies by factors of its own, which are "
            "not Llama-3's; of GGUF files only linear scaling and Llama-3's are read."
        )
    return parameters
