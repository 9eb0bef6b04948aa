"""The cache that a labelled array holds (`results.caches` makes such arrays, and stores them)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from persona_nns.declarations.record import ModelRecord
from persona_nns.errors import PersonaError, UsageError
from persona_nns.tracing.kv.cache import KVCache

if TYPE_CHECKING:
    import xarray as xr

_DIMS = ("cell", "layer", "kv", "head", "position", "d_head")


def unlabel_cache(array: "xr.DataArray", record: ModelRecord, device: str = "cpu") -> KVCache:
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
