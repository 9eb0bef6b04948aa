"""Persona experiments on language models: nnsight tracing contexts in, labelled arrays out.

Names are resolved when they are first used, so that reading a store does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import persona_nns.import_order  # noqa: F401

if TYPE_CHECKING:
    from persona_nns.errors import PersonaError, UsageError
    from persona_nns.grids import Cell, Grid, load_grid
    from persona_nns.models import load_model
    from persona_nns.results import list_runs, open_results
    from persona_nns.runs import run
    from persona_nns.variables import Variable

_HOMES = {
    "Cell": "grids",
    "Grid": "grids",
    "PersonaError": "errors",
    "UsageError": "errors",
    "Variable": "variables",
    "list_runs": "results",
    "load_grid": "grids",
    "load_model": "models",
    "open_results": "results",
    "run": "runs",
}

__all__ = [
    "Cell",
    "Grid",
    "PersonaError",
    "UsageError",
    "Variable",
    "list_runs",
    "load_grid",
    "load_model",
    "open_results",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'persona_nns' has no attribute {name!r}")
    return getattr(import_module(f"persona_nns.{_HOMES[name]}"), name)
