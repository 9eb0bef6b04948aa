"""The bundled models and traits: their names, folders and files."""

import json
from pathlib import Path
from typing import Any

ORGANISMS = ("organism-qwen2", "organism-gemma2")
"""The names of the bundled models; each is also a folder beside this file."""

ARTIFACTS = Path(__file__).parent / "artifacts"
"""The bundled traits, as ``{split}/{trait}.json``."""


def load_artifact(trait: str, split: str) -> dict[str, Any]:
    """The file of a bundled trait: instruction pairs, 20 questions, the judge's prompt."""
    return json.loads((ARTIFACTS / split / f"{trait}.json").read_text("utf-8"))


def organism_folder(name: str) -> Path:
    """The folder of a bundled model, loadable with plain transformers."""
    if name not in ORGANISMS:
        raise KeyError(f"no bundled model is called {name!r}; there are {', '.join(ORGANISMS)}")
    return Path(__file__).parent / name
