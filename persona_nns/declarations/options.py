"""The options of an experiment: keyword arguments of its functions, alone or in groups.

A group is a dataclass that a function takes as one keyword argument; each of its fields is an
option like any other. An option that says how or where and changes no number, as ``reuse`` does for
every experiment, is marked: ``output: Annotated[str, EXECUTION]``. It is not in a run's identity.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from inspect import Parameter
from typing import Annotated, Any

from pydantic import Field

# What an option may be, beside plain types: pydantic words what is wrong with a value.
Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class Execution:
    """What marks an option that changes no number."""


EXECUTION = Execution()


def changes_numbers(option: Parameter) -> bool:
    """Whether an option belongs to a run's identity."""
    return EXECUTION not in getattr(option.annotation, "__metadata__", ())


def options_of(function: Callable[..., Any], n_given: int) -> dict[str, Parameter]:
    """The options of a function by name, each field of a group in the group's place.

    Args:
        function: `plan`, `measure` or `finish` of an experiment.
        n_given: how many of its first arguments are no options.
    """
    options: dict[str, Parameter] = {}
    for name, parameter in list(_parameters(function).items())[n_given:]:
        options |= _fields(parameter) if _is_group(parameter) else {name: parameter}
    return options


def arguments_of(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a function: those options that it takes, its groups made of theirs.

    Args:
        function: `plan`, `measure` or `finish` of an experiment.
        options: at least all of its own that have no default.
    """
    arguments: dict[str, Any] = {}
    for name, parameter in _parameters(function).items():
        if _is_group(parameter):
            given = {f: options.get(f, own.default) for f, own in _fields(parameter).items()}
            arguments[name] = parameter.annotation(**given)
        elif name in options:
            arguments[name] = options[name]
    return arguments


def groups_of(function: Callable[..., Any]) -> list[type]:
    """The dataclasses whose fields are options of a function."""
    return [each.annotation for each in _parameters(function).values() if _is_group(each)]


def _parameters(function: Callable[..., Any]) -> Mapping[str, Parameter]:
    return inspect.signature(function, eval_str=True).parameters


def _fields(group: Parameter) -> dict[str, Parameter]:
    """The fields of a group by name; a default of the whole group holds for each of them."""
    return {
        name: field.replace(default=getattr(group.default, name, field.default))
        for name, field in _parameters(group.annotation).items()
    }


def _is_group(parameter: Parameter) -> bool:
    annotation = parameter.annotation
    keyword = parameter.kind is Parameter.KEYWORD_ONLY
    return keyword and isinstance(annotation, type) and is_dataclass(annotation)
