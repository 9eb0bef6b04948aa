"""Numbers and truth values of a result as floats, NaN where nothing was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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


def nowhere_measured(results: xr.Dataset) -> list[str]:
    """The variables of numbers that are NaN throughout, though something is complete.

    Arrays that are too large to be read at once are not looked at.
    """
    if not bool(results["completed"].any()):
        return []
    return [
        str(name)
        for name, array in results.data_vars.items()
        if array.dtype.kind == "f" and not is_count(array) and not is_truth(array)
        if array.size and array.chunks is None and not bool(array.notnull().any())
    ]


def without_clean_markers(results: xr.Dataset) -> dict[str, list[str]]:
    """By model, the personas whose markers occur in none of their cells' clean texts.

    Nothing that is done to such a persona can take its markers away.

    Args:
        results: of any experiment; of one that looks for no markers in clean texts, nothing.
    """
    name, at = "clean_any_marker", {}
    if name not in results:
        name, at = "any_marker", {"condition": "clean"}
    if name not in results or not {"cell", *at} <= set(results[name].dims):
        return {}
    clean = measured_values(results, name).sel(at)
    clean = clean.max([dim for dim in clean.dims if dim not in ("model", "cell")])
    best = clean.groupby("persona").max()
    order = dict.fromkeys(results["persona"].values.tolist())
    unmarked = {
        str(model): [k for k in order if float(best.sel(model=model, persona=k)) == 0]
        for model in results["model"].values.tolist()
    }
    return {model: personas for model, personas in unmarked.items() if personas}


def clean_marker_note(results: xr.Dataset) -> str:
    """A sentence that names the personas of `without_clean_markers`; empty where there are none."""
    unmarked = without_clean_markers(results)
    several = results.sizes.get("model", 1) > 1
    named = (", ".join(of) + (f" ({model})" if several else "") for model, of in unmarked.items())
    return f"Without a marker in any clean text: {'; '.join(named)}." if unmarked else ""


def is_truth(array: xr.DataArray) -> bool:
    """Whether a variable holds truth values; they are floats where some were not measured."""
    return array.dtype.kind == "b" or array.attrs.get("kind") == "bool"


def is_count(array: xr.DataArray) -> bool:
    """Whether a variable holds integers; they are floats where some were not measured."""
    return array.dtype.kind == "i" or array.attrs.get("kind") == "int"
