"""Whether what an experiment declares is such that the store and the command line can take it."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from persona_nns.declarations.options import options_of
from persona_nns.declarations.variables import Variable
from persona_nns.errors import PersonaError

_RESERVED_VARIABLES = {
    *("model", "cell", "layer", "position", "persona", "task", "depth", "n_layers"),
    *("precision", "seconds", "completed"),
}
_RESERVED_OPTIONS = {
    *("experiment", "model", "grid", "tasks", "frame", "cells", "backend", "dtype", "device"),
    *(
        "template",
        "as_",
        "store",
        "batch_size",
        "cells_per_chunk",
        "allow_float16",
        "progress",
        "deadline",
    ),
    *("verbose", "workers", "ray_address", "trust_remote_code", "name", "threads", "attention"),
    *("variables", "device_map", "quantise"),
}


def check_finish(source: str, finish: Callable[..., Any], known: Mapping[str, Any]) -> None:
    """See that `finish` takes options of `plan` and `measure`, or what has a default.

    Raises:
        PersonaError: it needs something else.
    """
    for name, parameter in options_of(finish, 3).items():
        if name not in known and parameter.default is inspect.Parameter.empty:
            raise PersonaError(
                f"finish() of {source} takes {name!r}, "
                "which is an option of neither plan() nor measure()."
            )


def site_axes_of(parameters: Mapping[str, inspect.Parameter]) -> set[str]:
    """Dimensions whose labels come with the request, or with the model."""
    return {"d_model"} | {dim for dim in ("layer", "position") if f"{dim}s" in parameters}


def check_axes(name: str, variable: Variable, source: str, known: Iterable[str]) -> None:
    """See that all of a variable's dimensions have labels.

    Args:
        name: what the variable is called.
        variable: the variable.
        source: the experiment, for the message.
        known: the dimensions that get labels from elsewhere.

    Raises:
        PersonaError: one has none.
    """
    for axis in variable.axes:
        if axis not in {*known, *variable.coords}:
            raise PersonaError(
                f"The variable {name!r} of {source} has a dimension {axis!r} without "
                "labels: give them in its coords (layer and position get theirs from "
                "measure's arguments 'layers' and 'positions')."
            )


def check_declarations(
    source: str,
    variables: Mapping[str, Any],
    parameters: Mapping[str, inspect.Parameter],
    *,
    on_grid: bool,
    labelled: bool,
) -> None:
    """See that variables and options are such that the store and the command line can take them.

    Args:
        source: the experiment, for messages.
        variables: as it declares them.
        parameters: its options, and what `measure` asks for.
        on_grid: its units are cells.
        labelled: no dimension gets its labels from a plan.

    Raises:
        PersonaError: one of them is not.
    """
    for name, variable in variables.items():
        if not isinstance(variable, Variable):
            raise PersonaError(f"The variable {name!r} of {source} has to be a Variable.")
        if on_grid and variable.axes[:1] != ("cell",):
            raise PersonaError(
                f"The variable {name!r} of {source} has to be a Variable whose dims begin "
                "with 'cell'."
            )
        if name in _RESERVED_VARIABLES:
            raise PersonaError(f"{source} cannot call a variable {name!r}: the store does.")
        if labelled:
            check_axes(name, variable, source, {"cell", *site_axes_of(parameters)})
    for option in parameters:
        if option in _RESERVED_OPTIONS and (on_grid or option != "grid"):
            raise PersonaError(
                f"{source} cannot call an option of measure {option!r}: every run has it."
            )
