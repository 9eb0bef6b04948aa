"""The bundled models and traits: their names and folders."""

from pathlib import Path

ORGANISMS = ("organism-qwen2", "organism-gemma2")
"""The names of the bundled models; each is also a folder beside this file."""

ARTIFACTS = Path(__file__).parent / "artifacts"
"""The bundled traits, as ``{split}/{trait}.json``."""


def organism_folder(name: str) -> Path:
    """The folder of a bundled model, loadable with plain transformers."""
    if name not in ORGANISMS:
        raise KeyError(f"no bundled model is called {name!r}; there are {', '.join(ORGANISMS)}")
    return Path(__file__).parent / name
