"""Numbers and truth values of a result as floats, NaN where nothing was measured."""

import xarray as xr


def measured_values(results: xr.Dataset, name: str) -> xr.DataArray:
    """A variable of numbers or truth values as floats, NaN where nothing was measured.

    Args:
        results: of one experiment, with ``completed``.
        name: the variable.
    """
    array = results[name]
    completed = results["completed"]
    # Variables of some of the units' dimensions have been blanked where their unit is missing.
    values = array.where(completed) if set(completed.dims) <= set(array.dims) else array
    return values.astype(float).assign_attrs(array.attrs)


def is_truth(array: xr.DataArray) -> bool:
    """Whether a variable holds truth values; they are floats where some were not measured."""
    return array.dtype.kind == "b" or array.attrs.get("kind") == "bool"


def is_count(array: xr.DataArray) -> bool:
    """Whether a variable holds integers; they are floats where some were not measured."""
    return array.dtype.kind == "i" or array.attrs.get("kind") == "int"
