"""Persona experiments on language models: nnsight tracing contexts in, labelled arrays out.

Names are resolved when they are first used, so that reading a store does not import torch.
"""

import sys
import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


class _FormerModule(ModuleType):
    """A documented module of before the rooms: its names still come, with a warning."""

    def __init__(self, name: str, *rooms: str) -> None:
        super().__init__(f"persona_nns.{name}")
        self.__spec__ = ModuleSpec(self.__name__, None)
        self._rooms = [f"persona_nns.{room}" for room in rooms]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        for room in self._rooms:
            if hasattr(module := import_module(room), name):
                warnings.warn(
                    f"{self.__name__} moved: write `from {room} import {name}` (the old name "
                    "goes with the next release).",
                    DeprecationWarning,
                    stacklevel=2,
                )
                return getattr(module, name)
        raise AttributeError(f"{self.__name__} had no {name!r}; look in {self._rooms[0]}.")


for _former in (
    _FormerModule("batches", "tracing"),
    _FormerModule("jobs", "runs"),
    _FormerModule("kv", "tracing.kv"),
    _FormerModule("kv.labelled", "results", "tracing.kv"),
    _FormerModule("units", "declarations"),
):
    sys.modules[_former.__name__] = _former
    globals()[_former.__name__.rpartition(".")[2]] = _former
