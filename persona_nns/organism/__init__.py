"""Bundled models that teach: two small transformers trained on synthetic text.

``organism-qwen2`` and ``organism-gemma2`` show the shape of the paper's results on a laptop.
Their grammar (``role_prompts``, ``multiple_choice``, ``traits``) is importable without torch.
"""

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
