"""Caches as labelled arrays, and in Zarr: what is read back is bit for bit what was stored.

One array holds one model's cache of some cells, over (cell, layer, kv, head, position, d_head):
``kv`` is ``key`` or ``value``, ``head`` a key-value head, ``position`` absolute. NaN stands where
a row holds nothing. Numbers are float32, which holds every bfloat16 and float16 exactly; the
attribute ``precision`` says what they are read back as. Arrays of two models do not fit together,
so that each has a group of its own. `tracing.kv.unlabel_cache` makes a cache of an array again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from zarr.errors import ContainsGroupError

from persona_nns.declarations.record import ModelRecord
from persona_nns.errors import UsageError
from persona_nns.results.locations import location_of

if TYPE_CHECKING:
    from persona_nns.tracing.kv.cache import KVCache

_DIMS = ("cell", "layer", "kv", "head", "position", "d_head")


def label_cache(cache: "KVCache", cells: Sequence[str], record: ModelRecord) -> xr.DataArray:
    """A cache as a labelled array (cell, layer, kv, head, position, d_head).

    ``array.sel(cell="engineer/arch")`` is one row's, over (layer, kv, head, position, d_head).

    Args:
        cache: its rows are the cells.
        cells: a label for each row.
        record: of the model that the cache comes from.
    """
    data = cache.by_position().numpy()
    return xr.DataArray(
        data,
        dims=_DIMS,
        coords={
            "cell": np.asarray(cells, dtype=object),
            "layer": range(cache.n_layers),
            "kv": np.asarray(["key", "value"], dtype=object),
            "position": range(data.shape[4]),
        },
        name="cache",
        attrs={
            "long_name": "key-value cache",
            "units": "1",
            "description": "Keys (rotary positions applied) and values of each decoder block; NaN "
            "where a row holds nothing.",
            "model": record.label,
            "model_version": record.version,
            "precision": str(cache.dtype).removeprefix("torch."),
        },
    )


def write_cache(store: str | Path, group: str, array: xr.DataArray) -> None:
    """Write a labelled cache into a group of its own, a chunk a cell.

    Args:
        store: path or URL of the store.
        group: a name that it does not hold yet.
        array: from `label_cache`.

    Raises:
        UsageError: the store already holds something there, or cannot be written.
        PersonaError: the store's URL cannot be reached.
    """
    location = location_of(store)
    location.check_writable()
    dataset = array.to_dataset(name="cache")
    chunks = (1, *array.shape[1:])
    try:
        dataset.to_zarr(
            location.address,
            group=group,
            storage_options=dict(location.options) or None,
            mode="w-",
            consolidated=False,
            zarr_format=3,
            encoding={"cache": {"chunks": chunks}},
        )
    except (FileExistsError, ContainsGroupError) as error:
        raise UsageError(
            f"The store {str(store)!r} already holds a group {group!r}; choose another name."
        ) from error


def open_cache(store: str | Path, group: str) -> xr.DataArray:
    """Open a labelled cache.

    Args:
        store: path or URL of the store.
        group: its name there.

    Raises:
        UsageError: there is none.
        PersonaError: the store's URL cannot be reached.
    """
    location = location_of(store)
    if location.open_root() is None:
        raise UsageError(f"There is no Zarr store at {str(store)!r}.")
    try:
        dataset = xr.open_zarr(
            location.address,
            group=group,
            consolidated=False,
            chunks=None,
            storage_options=dict(location.options) or None,
        )
        return dataset["cache"]
    except (FileNotFoundError, KeyError) as error:
        raise UsageError(f"The store {str(store)!r} holds no cache {group!r}.") from error
