"""Attributes of results: what a NetCDF file takes, and what several models have of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import xarray as xr

# What a group says of its arrays, and they themselves say in a Dataset. (A NetCDF writer takes an
# attribute "variables" for its own.)
_OF_ARRAYS = ("variables", "every_layer", "unmeasured")


def plain_attributes(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as numbers and texts; lists and mappings as JSON, truth values as 0 and 1.

    Args:
        attrs: JSON-able values.
    """
    return {name: _plain(value) for name, value in attrs.items()}


def _plain(value: Any) -> str | int | float:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str | int | float):
        return value
    return json.dumps(value, ensure_ascii=False)


def join_attributes(models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Attributes of several models: what they agree in, or the list of what each has.

    Args:
        models: the attributes of each, as they are stored.

    Returns:
        Plain ones; in a list, None where a model has none of that name.
    """
    joined: dict[str, Any] = {}
    for name in dict.fromkeys(name for attrs in models for name in attrs):
        if name in _OF_ARRAYS:
            continue
        values = [attrs.get(name) for attrs in models]
        joined[name] = values[0] if all(value == values[0] for value in values) else values
    return plain_attributes(joined)


def read_attribute(results: xr.Dataset, name: str, default: Any = None) -> Any:
    """An attribute as it was noted: of what is stored as JSON, the list or mapping itself.

    Args:
        results: from `open_results`.
        name: such as ``parameters``, ``markers`` or ``session``.
        default: where there is no such attribute.
    """
    value = results.attrs.get(name, default)
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:  # a text, such as a chat template, that only begins like that
            return value
    return value
