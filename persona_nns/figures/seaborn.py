"""Seaborn, imported when something is drawn.

It takes half of scipy with it, as long as a fifth of all that a run imports, and no run draws.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seaborn import *  # noqa: F403  # pyright: ignore[reportWildcardImportFromLibrary]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):  # what looks through all modules does not draw
        raise AttributeError(name)
    return getattr(import_module("seaborn"), name)
