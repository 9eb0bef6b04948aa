"""Caches as labelled arrays, and in Zarr: what is read back is bit for bit what was stored.

One array holds one model's cache of some cells, over (cell, layer, kv, head, position, d_head):
``kv`` is ``key`` or ``value``, ``head`` a key-value head, ``position`` absolute. NaN stands where
a row holds nothing. Numbers are float32, which holds every bfloat16 and float16 exactly; the
attribute ``precision`` says what they are read back as. Arrays of two models do not fit together,
so that each has a group of its own.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from zarr.errors import ContainsGroupError

from persona_nns.errors import PersonaError, UsageError
from persona_nns.kv.cache import KVCache
from persona_nns.models import ModelRecord

_DIMS = ("cell", "layer", "kv", "head", "position", "d_head")


def label_cache(cache: KVCache, cells: Sequence[str], record: ModelRecord) -> xr.DataArray:
    """A cache as a labelled array (cell, layer, kv, head, position, d_head).

    ``array.sel(cell="engineer/arch")`` is one row's, over (layer, kv, head, position, d_head).

    Args:
        cache: its rows are the cells.
        cells: a label for each row.
        record: of the model that the cache comes from.
    """
    held = cache.attention_mask > 0
    n_positions = int(cache.position_ids[held].max()) + 1
    _, heads, _, d_head = cache.keys[0].shape
    shape = (held.shape[0], cache.n_layers, 2, heads, n_positions, d_head)
    data = torch.full(shape, torch.nan)
    for row, columns in enumerate(held):
        position = cache.position_ids[row, columns].cpu()
        for layer in range(cache.n_layers):
            for kv, tensors in enumerate((cache.keys, cache.values)):
                data[row, layer, kv, :, position] = tensors[layer][row][:, columns].cpu().float()
    return xr.DataArray(
        data.numpy(),
        dims=_DIMS,
        coords={
            "cell": np.asarray(cells, dtype=object),
            "layer": range(cache.n_layers),
            "kv": np.asarray(["key", "value"], dtype=object),
            "position": range(n_positions),
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


def unlabel_cache(array: xr.DataArray, record: ModelRecord, device: str = "cpu") -> KVCache:
    """The cache that an array holds, for the model that it came from.

    Args:
        array: from `label_cache`, whole or some of its cells.
        record: of the model that is to go on from it.
        device: where the cache goes.

    Raises:
        UsageError: the array comes from another model, or from the model in another precision.
        PersonaError: a layer lacks positions that another one has.
    """
    own = (array.attrs.get("model_version"), array.attrs.get("precision"))
    if own != (record.version, record.precision):
        raise UsageError(
            f"This cache is of the model {array.attrs.get('model')!r} in {own[1]}, not of "
            f"{record.label!r} in {record.precision} (or of other weights); read the model's own."
        )
    whole = array.expand_dims("cell") if "cell" not in array.dims else array
    data = torch.from_numpy(whole.transpose(*_DIMS).values.copy())
    present = ~data.isnan().any(dim=5).any(dim=3).any(dim=2)  # [cell, layer, position]
    for layer in range(present.shape[1]):
        if not torch.equal(present[:, layer], present[:, 0]):
            raise PersonaError(f"Layer {layer} of this cache lacks positions that layer 0 has.")
    positions = torch.tensor(whole.position.values)
    rows = [span.nonzero()[:, 0] for span in present[:, 0]]
    places = [torch.arange(int(row.min()), int(row.max()) + 1) for row in rows]
    width = max(map(len, places))

    def pad(tensor: Tensor) -> Tensor:  # the columns, last but one
        return torch.nn.functional.pad(tensor, (0, 0, width - tensor.shape[-2], 0))

    held = [present[row, 0, place] for row, place in enumerate(places)]
    dtype = getattr(torch, record.precision)
    columns = torch.stack(
        [pad(data[row][..., place, :].nan_to_num()) for row, place in enumerate(places)], dim=1
    ).to(device, dtype)  # [layer, row, kv, head, column, d_head]
    return KVCache(
        tuple(columns[:, :, 0]),
        tuple(columns[:, :, 1]),
        torch.cat([pad(mask.long()[None, :, None])[..., 0] for mask in held]).to(device),
        torch.cat([pad(positions[place][None, :, None])[..., 0] for place in places]).to(device),
    )


def write_cache(store: str | Path, group: str, array: xr.DataArray) -> None:
    """Write a labelled cache into a group of its own, a chunk a cell.

    Raises:
        UsageError: the store already holds something there.
    """
    dataset = array.to_dataset(name="cache")
    chunks = (1, *array.shape[1:])
    try:
        dataset.to_zarr(
            str(store),
            group=group,
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

    Raises:
        UsageError: there is none.
    """
    try:
        dataset = xr.open_zarr(str(store), group=group, consolidated=False, chunks=None)
        return dataset["cache"]
    except (FileNotFoundError, KeyError) as error:
        raise UsageError(f"The store {str(store)!r} holds no cache {group!r}.") from error
