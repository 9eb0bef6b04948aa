"""How a function becomes an experiment: one in a notebook's cell, say.

Its name is the experiment's, and the first line of its docstring what it is about. The code that
its numbers come from is part of a run's identity (`function_code`): the function edited measures
anew, and the same one again goes on.
"""

import inspect
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from persona_nns.declarations.catalog import (
    Experiment,
    bundled_experiments,
    experiment_of,
    load_experiment,
)
from persona_nns.declarations.function_code import FunctionCode
from persona_nns.declarations.variables import Variable
from persona_nns.errors import UsageError


def as_experiment(
    measure: Callable[..., Any],
    variables: Mapping[str, Variable],
    *,
    finish: Callable[..., Any] | None = None,
    version: str | int | None = None,
) -> Experiment:
    """Make an experiment of a function: `run` takes it, as it takes the function itself.

    Args:
        measure: ``measure(model, cells, *, layers, positions, …)`` with a trace in it, as in an
            experiment's file; under any name, which is the experiment's. Its keyword arguments are
            options of `run`.
        variables: what it returns, by name.
        finish: ``finish(tokenizer, cells, measured, *, …)``, which makes the variables of what
            ``measure`` returned, where the run was asked for, whatever machine it was measured on.
        version: stands for the code in the identity of a run, and is yours to raise whenever an
            edit changes numbers; by default every such edit counts as another version.

    Raises:
        UsageError: it is no function, its source is not to be had, or it uses something of which
            it cannot be told what it holds.
        PersonaError: a variable or an option is not as it has to be.
    """
    function = inspect.unwrap(measure)
    name = getattr(function, "__name__", "")
    if not isinstance(function, types.FunctionType) or not name.isidentifier():
        raise UsageError(
            f"An experiment is a function with a name (def …), and not {measure!r}; what would be "
            "given to it beforehand can be a keyword argument, and so an option of the run."
        )
    if name in bundled_experiments():
        raise UsageError(f"{name!r} is a bundled experiment; give the function another name.")
    named = isinstance(variables, Mapping) and all(
        isinstance(each, Variable) for each in variables.values()
    )
    if not variables or not named:
        raise UsageError(
            f"What {name}() returns has to be said: variables={{'…': pn.Variable('cell …', '…')}}, "
            "by name."
        )
    declared = {each: _determining(variable) for each, variable in variables.items()}
    code = FunctionCode(function, {"variables": declared, "finish": finish})
    experiment = experiment_of(
        SimpleNamespace(measure=measure, variables=dict(variables), finish=finish),
        name,
        source=f"{name}() ({code.place})",
        summary=(inspect.getdoc(function) or "").partition("\n")[0],
        version=code.digest if version is None else str(version),
        code=code,
    )
    code.read_traces_anew()
    return experiment


def _determining(variable: Variable) -> list[Any]:
    """What of a variable numbers depend on, and not how it is called."""
    return [variable.axes, variable.kind, variable.every_layer, variable.coords]


def the_experiment(
    asked: str | Path | Experiment | Callable[..., Any],
    variables: Mapping[str, Variable] | None = None,
) -> Experiment:
    """The experiment that was asked for by its name, its file or its function.

    Args:
        asked: any of these, or a loaded one.
        variables: of a function, what it returns.

    Raises:
        UsageError: there is none, or none is made of what was given.
        PersonaError: it is not as it has to be.
    """
    if callable(asked):
        return as_experiment(asked, variables or {})
    if variables is not None:
        raise UsageError("Variables are given with a function; an experiment has its own.")
    return asked if isinstance(asked, Experiment) else load_experiment(asked)
