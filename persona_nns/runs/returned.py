"""What an experiment returned, as arrays of the shapes that it declared."""

from collections.abc import Mapping, Set
from typing import Any

import numpy as np
import torch

from persona_nns.declarations.variables import FILL, Kind
from persona_nns.errors import PersonaError
from persona_nns.runs.request import Request

# Kinds of numpy arrays that a variable of each kind may be returned as.
_KINDS: dict[Kind, str] = {"float": "fiu", "int": "iu", "bool": "b", "text": "O"}


def declared_arrays(
    request: Request, measured: Mapping[str, Any], n_units: int
) -> dict[str, np.ndarray[Any, Any]]:
    """What `measure` returned, as arrays of the declared shapes.

    Args:
        request: with the declarations.
        measured: by variable; the leading axis is the unit, in place of the dimensions that
            units have a place on.
        n_units: units of the batch.

    Raises:
        PersonaError: `measure` did not return what its file declares.
    """
    check_named(request, measured)
    declared = dict(request.block.variables)
    if request.residuals is not None:
        declared |= request.residuals.variables
    if set(measured) != set(declared):
        raise PersonaError(
            f"{request.experiment.called} returned {sorted(measured)}, but its variables are "
            f"{sorted(declared)}."
        )
    placed = request.plan.placed_axes
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for name, variable in declared.items():
        value = measured[name]
        array = (
            value.detach().float().numpy()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else np.asarray(value, dtype=object if variable.kind == "text" else None)
        )
        if array.dtype.kind not in _KINDS[variable.kind]:
            raise PersonaError(
                f"{request.experiment.called} returned {name!r} as {array.dtype}; its kind is "
                f"{variable.kind!r}."
            )
        array = _spread_layers(request, name, array, placed)
        own = [axis for axis in variable.axes if axis not in placed]
        shape = (n_units, *(len(request.block.labels(variable, axis)) for axis in own))
        if array.shape != shape:
            raise PersonaError(
                f"{request.experiment.called} returned {name!r} of shape {array.shape}; its dims "
                f"({variable.dims}) need {shape}."
            )
        arrays[name] = array
    return arrays


def on_host(measured: Mapping[str, Any]) -> dict[str, Any]:
    """The same with its tensors in main memory: copied side by side, and waited for once."""
    tensors = [value for value in measured.values() if isinstance(value, torch.Tensor)]
    # Only of CUDA is it known that the copy lies in pinned memory and that there is one to wait
    # for.
    devices = {each.device for each in tensors if each.device.type == "cuda"}
    copied = {
        name: value.detach().to("cpu", non_blocking=value.device.type == "cuda")
        if isinstance(value, torch.Tensor)
        else value
        for name, value in measured.items()
    }
    for device in devices:
        torch.cuda.synchronize(device)
    return copied


def check_named(request: Request, measured: Any) -> None:
    """See that `measure` returned arrays by name.

    Raises:
        PersonaError: it returned something else.
    """
    if not isinstance(measured, Mapping):
        hint = "; does it end without a return?" if measured is None else "."
        raise PersonaError(
            f"{request.experiment.called} returned {type(measured).__name__} in place "
            f"of its arrays by name{hint}"
        )


def unmistakable(request: Request, n_units: int, batch_size: int) -> int:
    """The largest batch size in which no array has the same shape when it is transposed.

    A batch of as many units as another dimension has labels would hide that a user's file gives
    the dimensions in another order.
    """
    block, placed = request.block, request.plan.placed_axes
    sizes = {
        len(block.labels(variable, axis))
        for variable in block.variables.values()
        for axis in variable.axes
        if axis not in placed
    } | {len(request.arguments.get("layers", ()))}
    fits = (
        size
        for size in range(min(batch_size, n_units), 1, -1)
        if size not in sizes and n_units % size not in sizes - {0}
    )
    return next(fits, 1)


def _spread_layers(
    request: Request, name: str, array: np.ndarray[Any, Any], placed: Set[str]
) -> np.ndarray[Any, Any]:
    """Put an array over the layers asked for onto the layer axis of the block."""
    variable = request.experiment.variables[name]
    if not variable.has_asked_layers:
        return array
    own = ["unit", *(axis for axis in variable.axes if axis not in placed)]
    axis, asked = own.index("layer"), request.arguments["layers"]
    if array.ndim <= axis or array.shape[axis] != len(asked):
        return array
    labels = list(request.block.layers)
    if labels == asked:
        return array
    wide = list(array.shape)
    wide[axis] = len(labels)
    spread = np.full(wide, FILL[variable.kind], dtype=array.dtype)
    spread[(slice(None),) * axis + ([labels.index(layer) for layer in asked],)] = array
    return spread
