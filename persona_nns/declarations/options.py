"""The options of an experiment: keyword arguments of its functions, alone or in groups.

A group is a dataclass that a function takes as one keyword argument; each of its fields is an
option like any other. An option that says how or where and changes no number, as ``reuse`` does for
every experiment, is marked: ``output: Annotated[str, EXECUTION]``. It is not in a run's identity.
Of files that are marked as `CONTENT`, what they hold is.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, Field

# What an option may be, beside plain types: pydantic words what is wrong with a value.
Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


def some_of(what: str, known: Sequence[str]) -> AfterValidator:
    """What an option of labels with commas between them may be: some of those known, in one order.

    Args:
        what: one of them is called.
        known: all there are.
    """

    def choose(asked: str) -> str:
        labels = [label.strip() for label in asked.split(",")]
        if unknown := [label for label in labels if label not in known]:
            raise ValueError(f"there is no {what} {', '.join(unknown)!r}; use {', '.join(known)}")
        return ",".join(label for label in known if label in labels)

    return AfterValidator(choose)


class Execution:
    """What marks an option that changes no number."""


EXECUTION = Execution()


def changes_numbers(option: Parameter) -> bool:
    """Whether an option belongs to a run's identity."""
    return EXECUTION not in getattr(option.annotation, "__metadata__", ())


class Later:
    """What marks an option that came when there were runs already: its default is what they did.

    At its default it is not in a run's identity, as it was not in theirs.
    """


LATER = Later()


def is_as_before(option: Parameter | None, value: Any) -> bool:
    """Whether a value is that of before an option was there."""
    marks = getattr(option.annotation, "__metadata__", ()) if option is not None else ()
    return option is not None and LATER in marks and value == option.default


class Content:
    """What marks an option that names files: a run is known by what they hold, not by their paths.

    It may have no value, or a list of paths.
    """


CONTENT = Content()


def is_content(option: Parameter) -> bool:
    """Whether what the files of an option hold belongs to a run's identity, and not their paths."""
    return CONTENT in getattr(option.annotation, "__metadata__", ())


@dataclass(frozen=True)
class NamesFile:
    """What marks an option whose text may be the path of a file or folder.

    Attributes:
        words: what is no path whatever lies in this folder, as ``plain`` of a template.
        made: it need not be there yet.
    """

    words: tuple[str, ...] = ()
    made: bool = False


#: Text that is a path where there is a file or folder of that name.
FileName = Annotated[str, NamesFile()]
#: Where something is put; no number depends on it.
OutputFolder = Annotated[str, EXECUTION, NamesFile(made=True)]


def absolute(parameters: Mapping[str, Parameter], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of options as another folder has to be told them: those that are paths, absolute.

    Args:
        parameters: the options; `Path`, and text that is marked with `NamesFile`, may be paths.
        values: of some of them, and of others, which stay.
    """
    return {
        name: _absolute(parameters[name].annotation, value) if name in parameters else value
        for name, value in values.items()
    }


def _absolute(annotation: Any, value: Any) -> Any:
    if isinstance(value, Path):
        return value.expanduser().absolute()
    if isinstance(value, list | tuple):
        return type(value)(_absolute(annotation, each) for each in value)
    mark = next((part for part in _parts(annotation) if isinstance(part, NamesFile)), None)
    if mark is None or not isinstance(value, str) or value in mark.words or "://" in value:
        return value
    try:
        path = Path(value).expanduser().absolute()
        if mark.made or path.exists():
            return str(path)
        file, named, part = value.rpartition("#")  # a part of a file, by name
        return f"{_absolute(annotation, file)}#{part}" if named else value
    except (OSError, RuntimeError):  # no path at all
        return value


def _parts(annotation: Any) -> list[Any]:
    """What an annotation is made of, at any depth."""
    inner = [*get_args(annotation), *getattr(annotation, "__metadata__", ())]
    return [annotation, *(part for each in inner for part in _parts(each))]


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
