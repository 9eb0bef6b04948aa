"""Small random models of every supported architecture, built once and never downloaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# One thread a process, also in those that tests start: the models are far too small for more.
os.environ["OMP_NUM_THREADS"] = "1"

import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
import xarray as xr
from hypothesis import settings
from nnsight import TransformersModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from persona_nns.declarations.catalog import load_experiment
from persona_nns.figures.tables import measured, result_table
from persona_nns.models.load import load_model
from persona_nns.prompts.grids import Grid

torch.set_num_threads(1)

# Property tests try the same examples everywhere, and leave no folder behind.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")

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


def printed(results: xr.Dataset, width: int = 200) -> str:
    """The tables of every variable, as the command line prints them."""
    console = Console(width=width)
    with console.capture() as capture:
        for name in measured(results):
            console.print(result_table(results, name))
    return capture.get()


@pytest.fixture(scope="session", params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of an architecture → folder of its random model."""
    root = tmp_path_factory.mktemp("models")
    return cache(lambda name: save_random_model(root / name, name))


@pytest.fixture(scope="session")
def random_model(random_folder: Callable[[str], Path]) -> Callable[[str], TransformersModel]:
    """Name of an architecture → its random model as the library loads it."""
    return cache(lambda name: load_model(random_folder(name)))


@pytest.fixture(scope="session")
def plain_model(random_folder: Callable[[str], Path]) -> Callable[[str], PreTrainedModel]:
    """Name of an architecture → the same weights in plain transformers, for independent checks."""

    @cache
    def load(name: str) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(
            random_folder(name), dtype=torch.float32, attn_implementation="eager"
        )
        return model.eval().requires_grad_(False)

    return load


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`save_random_model` into a new folder: ``make_folder("qwen2", dtype=torch.bfloat16)``."""

    def make(architecture: str, **settings: Any) -> Path:
        return save_random_model(tmp_path_factory.mktemp(architecture), architecture, **settings)

    return make


@pytest.fixture(scope="session")
def golden_model() -> Callable[[str], TransformersModel]:
    """``qwen2`` or ``gemma2`` → the trained golden model as the library loads it."""
    return cache(lambda name: load_model(GOLDEN / name))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The golden models' tokenizer with its chat template. Copy it before changing it."""
    return AutoTokenizer.from_pretrained(GOLDEN / "qwen2")


@pytest.fixture(scope="session")
def small_grid() -> Grid:
    """Two personas and two tasks; all eight role prompts differ in length."""
    return Grid(
        name="small",
        personas={
            "baseline": "a thoughtful person",
            "chef": "a head chef who builds menus around seasonal ingredients",
            "yoda": "Yoda",
        },
        tasks={
            "baseline": "Give advice to someone facing a difficult decision.",
            "haiku": "Write a haiku about Monday mornings.",
            "policy": "Comment on whether universal basic income is a good policy, and say why.",
        },
    )


@pytest.fixture(scope="session")
def localized_positions() -> ModuleType:
    """The experiment's module, whose functions a test may replace."""
    return sys.modules[load_experiment("localized_positions").measure.__module__]


@pytest.fixture(scope="session")
def behavioral_markers() -> ModuleType:
    return sys.modules[load_experiment("behavioral_markers").measure.__module__]


@pytest.fixture(scope="session")
def host_injection() -> ModuleType:
    return sys.modules[load_experiment("host_injection").measure.__module__]
