"""The bundled models and traits: their names, folders and files."""

import json
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

ORGANISMS = ("organism-qwen2", "organism-gemma2")
"""The names of the bundled models; each is also a folder beside this file."""

ARTIFACTS = Path(__file__).parent / "artifacts"
"""The bundled traits, as ``{split}/{trait}.json``."""


def load_artifact(trait: str, split: str) -> dict[str, Any]:
    """The file of a bundled trait: instruction pairs, 20 questions, the judge's prompt."""
    return json.loads((ARTIFACTS / split / f"{trait}.json").read_text("utf-8"))


@cache
def bundled_vocabulary() -> Mapping[str, int]:
    """The tokens of the bundled models, which share a tokenizer, and their ids."""
    file = Path(__file__).parent / ORGANISMS[0] / "tokenizer.json"
    tokenizer = json.loads(file.read_text("utf-8"))
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    return {**tokenizer["model"]["vocab"], **added}


def corpus_texts(name: str) -> dict[str, Any]:
    """The words that a part of the corpus is made of, ``texts/{name}.toml``, in their order."""
    return _frozen(
        tomllib.loads((Path(__file__).parent / "texts" / f"{name}.toml").read_text("utf-8"))
    )


def _frozen(value: Any) -> Any:
    """The same with tuples for lists."""
    if isinstance(value, dict):
        return {name: _frozen(each) for name, each in value.items()}
    return tuple(value) if isinstance(value, list) else value


def organism_folder(name: str) -> Path:
    """The folder of a bundled model, loadable with plain transformers."""
    if name not in ORGANISMS:
        raise KeyError(f"no bundled model is called {name!r}; there are {', '.join(ORGANISMS)}")
    return Path(__file__).parent / name
