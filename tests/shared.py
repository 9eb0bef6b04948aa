"""What tests share: models built once in a process and never downloaded, and a small grid."""

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import xarray as xr
from hypothesis import settings
from nnsight import TransformersModel
from random_models import ARCHITECTURES, GOLDEN, architectures, save_random_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from persona_nns.declarations.catalog import load_experiment
from persona_nns.figures.tables import measured, result_table
from persona_nns.models.load import load_model
from persona_nns.prompts.grids import Grid

torch.set_num_threads(1)

# Property tests try the same examples everywhere, and leave no folder behind.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")


def printed(results: xr.Dataset, width: int = 200) -> str:
    """The tables of every variable, as the command line prints them."""
    console = Console(width=width)
    with console.capture() as capture:
        for name in measured(results):
            console.print(result_table(results, name))
    return capture.get()


architecture = architectures(*ARCHITECTURES)


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
