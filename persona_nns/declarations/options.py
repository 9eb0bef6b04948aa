"""The options of an experiment: keyword arguments of its functions, alone or in groups.

A group is a dataclass that a function takes as one keyword argument; each of its fields is an
option like any other.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from inspect import Parameter
from typing import Annotated, Any

from pydantic import Field

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


def options_of(function: Callable[..., Any], n_given: int) -> dict[str, Parameter]:
    """The options of a function by name, each field of a group in the group's place.

    Args:
        function: `plan`, `measure` or `finish` of an experiment.
        n_given: how many of its first arguments are no options.
    """
    options: dict[str, Parameter] = {}
    for name, parameter in list(_parameters(function).items())[n_given:]:
        if not _is_group(parameter):
            options[name] = parameter
            continue
        for field, of_field in _parameters(parameter.annotation).items():
            default = getattr(parameter.default, field, of_field.default)
            options[field] = of_field.replace(default=default)
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
            group = parameter.annotation
            fields = [field for field in _parameters(group) if field in options]
            arguments[name] = group(**{field: options[field] for field in fields})
        elif name in options:
            arguments[name] = options[name]
    return arguments


def groups_of(function: Callable[..., Any]) -> list[type]:
    """The dataclasses whose fields are options of a function."""
    return [each.annotation for each in _parameters(function).values() if _is_group(each)]


def _parameters(function: Callable[..., Any]) -> Mapping[str, Parameter]:
    return inspect.signature(function, eval_str=True).parameters


def _is_group(parameter: Parameter) -> bool:
    annotation = parameter.annotation
    keyword = parameter.kind is Parameter.KEYWORD_ONLY
    return keyword and isinstance(annotation, type) and is_dataclass(annotation)
