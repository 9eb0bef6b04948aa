"""Where in a result something was measured.

Joining models puts NaN where one of them lacks a layer or a layer set, but integers, truth values
and texts have no NaN: there stand −1, False and "" (`declarations.variables.FILL`). A False that
only fills would count as measured in a rate.
"""

import xarray as xr

from persona_nns.declarations.variables import FILL


def measured_values(results: xr.Dataset, name: str) -> xr.DataArray:
    """A variable of numbers or truth values as floats, NaN where nothing was measured.

    A truth value counts as measured where every number beside it, of the same dimensions, was.

    Args:
        results: of one experiment, with ``completed``.
        name: the variable.
    """
    array = results[name]
    completed = results["completed"]
    # Variables of some of the units' dimensions have been blanked where their unit is missing.
    values = array.where(completed) if set(completed.dims) <= set(array.dims) else array
    if array.dtype.kind == "b":
        values = values.astype(float)
        for other in results.data_vars.values():
            if other.dims == array.dims and other.dtype.kind in "fi":
                values = values.where(_is_there(other))
    elif array.dtype.kind == "i":
        values = values.where(_is_there(array))
    return values.assign_attrs(array.attrs)


def _is_there(array: xr.DataArray) -> xr.DataArray:
    return array != FILL["int"] if array.dtype.kind == "i" else array.notnull()
