"""Small random models of every supported architecture."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

GOLDEN = Path(__file__).parent / "golden"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
N_LAYERS = 5
WINDOW = 16  # of the architectures with sliding attention; every prompt of the tests is longer

_SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_SLIDING = {**_GROUPED, "head_dim": 8, "sliding_window": WINDOW}
_GEMMA = {
    **_SLIDING,
    "query_pre_attn_scalar": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
}

# Configuration class and parameters of the ten supported architectures.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3": ("Gemma3TextConfig", _GEMMA),
    "mistral": ("MistralConfig", _SLIDING),
    "phi3": ("Phi3Config", _GROUPED),
    "olmo2": ("Olmo2Config", _GROUPED),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": 1024,
            "n_embd": 32,
            "n_layer": N_LAYERS,
            "n_head": 4,
            "n_positions": 512,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", _SIZES),
}


def random_config(architecture: str, **changes: Any) -> PreTrainedConfig:
    """Configuration of a small model whose logits vary (wide initial weights)."""
    name, parameters = ARCHITECTURES[architecture]
    return getattr(transformers, name)(**{"initializer_range": 0.2, **parameters, **changes})


def copy_tokenizer(folder: Path) -> Path:
    """Put the golden models' tokenizer (1024 tokens, with a chat template) into a folder."""
    for name in TOKENIZER_FILES:
        shutil.copy(GOLDEN / "qwen2" / name, folder / name)
    return folder


def save_random_model(
    folder: Path, architecture: str, *, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Write a random model with a tokenizer; the same weights whenever it is called."""
    torch.manual_seed(20260101)
    model = AutoModelForCausalLM.from_config(random_config(architecture, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases, which start as ones and zeros
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return copy_tokenizer(folder)


def crossed(*telling: str, among: Iterable[str] = ARCHITECTURES) -> list[Any]:
    """Architectures as parameters of a test.

    `make test` runs the telling ones alone, those with a path of their own through what is
    tested; `make test-slow` runs the others.
    """
    return [pytest.param(name, marks=() if name in telling else pytest.mark.slow) for name in among]


def architectures(*telling: str) -> Any:
    """A fixture of the `crossed` architectures, for a test file to call ``architecture``."""

    @pytest.fixture(scope="session", params=crossed(*telling))
    def architecture(request: pytest.FixtureRequest) -> str:
        return request.param

    return architecture
