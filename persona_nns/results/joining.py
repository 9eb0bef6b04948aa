"""Results of several models as one Dataset."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from persona_nns.declarations.bands import band_labels, band_layers
from persona_nns.declarations.variables import FILL
from persona_nns.results.attributes import join_attributes


def join_models(datasets: Sequence[xr.Dataset], experiment: str) -> xr.Dataset:
    """Put models along one dimension; what one lacks is NaN (of texts, "").

    Args:
        datasets: of one experiment, a model each, with their attributes as they are stored.
        experiment: its name.
    """
    attrs = join_attributes([dataset.attrs for dataset in datasets])
    if len(datasets) > 1:
        datasets = [dataset.drop_dims("d_model", errors="ignore") for dataset in datasets]
    datasets = _with_room_for_nan(datasets)
    joined = xr.concat(
        datasets,
        dim="model",
        data_vars="minimal",
        coords="minimal",
        compat="equals",
        join="outer" if len(datasets) > 1 else "exact",
        fill_value={name: _fill(array) for name, array in datasets[0].data_vars.items()},
        combine_attrs="drop_conflicts",
    )
    # Joining may sort; labels keep the order of the plan, variables that of the experiment.
    several = len(datasets) > 1
    order = {
        dim: list(dict.fromkeys(label for ds in datasets for label in ds[dim].values.tolist()))
        for dim in map(str, joined.dims)
        if several and joined[dim].dtype.kind == "O"
    }
    joined = joined.sel(order)[list(datasets[0].data_vars)]
    if "layer_band" in joined.dims and "n_layers" in joined.coords:
        joined = joined.assign_coords(_band_bounds(joined))
    named = {"experiment": experiment, "grid": datasets[0].attrs["grid"]}
    return joined.drop_attrs(deep=False).assign_attrs({**attrs, **named})


def _fill(array: xr.DataArray) -> Any:
    return FILL[{"b": "bool", "i": "int", "f": "float"}.get(array.dtype.kind, "text")]  # type: ignore[index]


def _with_room_for_nan(datasets: Sequence[xr.Dataset]) -> list[xr.Dataset]:
    """Integers and truth values as floats where some model has them so, or lacks labels."""
    if len(datasets) == 1:
        return list(datasets)
    floats = [
        name
        for name, array in datasets[0].data_vars.items()
        if "kind" in array.attrs
        and any(
            dataset[name].dtype.kind == "f" or _labels(dataset[name]) != _labels(array)
            for dataset in datasets
        )
    ]
    return [
        dataset.assign({name: dataset[name].astype(float) for name in floats})
        for dataset in datasets
    ]


def _labels(array: xr.DataArray) -> dict[str, set[Any]]:
    return {str(dim): set(array[dim].values.tolist()) for dim in array.dims if dim != "model"}


def _band_bounds(results: xr.Dataset) -> dict[str, xr.DataArray]:
    """First layer, and the one after the last, of each band.

    Over ``layer_band``; where models are of different depth also over ``model``, with NaN for the
    bands that a model does not have.
    """
    labels = results.layer_band.values.tolist()
    depths = results.n_layers.values.tolist()
    bounds = np.full((2, len(depths), len(labels)), np.nan)
    for row, n_layers in enumerate(depths):
        known = set(band_labels(n_layers))
        for column, label in enumerate(labels):
            if label in known:
                band = band_layers(label, n_layers)
                bounds[:, row, column] = band.start, band.stop
    dims = ("model", "layer_band")
    if len(set(depths)) == 1:
        bounds, dims = bounds[:, 0], dims[1:]
    if not np.isnan(bounds).any():
        bounds = bounds.astype(int)
    said = ("first layer of the band", "layer after the last of the band")
    return {
        name: xr.DataArray(values, dims=dims, attrs={"long_name": long_name, "units": "1"})
        for name, values, long_name in zip(("band_start", "band_stop"), bounds, said, strict=True)
    }
