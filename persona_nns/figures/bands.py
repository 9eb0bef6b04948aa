"""Where bands of layers stand in a figure."""

from collections.abc import Iterator

import pandas as pd
import xarray as xr

from persona_nns.declarations.bands import band_labels, band_layers

#: Kinds of bands, as a legend says them.
FAMILIES = ("layer k alone", "layers before k (0:k)", "layers from k on (k:n)")
_ALONE, _BEFORE, _FROM = FAMILIES


def by_band(values: xr.DataArray) -> pd.DataFrame:
    """A row a number of one model and a place of its band.

    Args:
        values: over ``layer_band`` and any other dimensions, of one model.

    Returns:
        The labels of the number, itself as ``value``, the family of its band in ``layers`` and
        where it stands in it as ``layer k``. ``0`` is in two families, ``all`` in the last two.
    """
    n_layers = int(values.n_layers)
    places = pd.DataFrame(
        [(label, *place) for label in band_labels(n_layers) for place in _places(label, n_layers)],
        columns=["layer_band", "layers", "layer k"],
    )
    places["layers"] = pd.Categorical(places["layers"], FAMILIES, ordered=True)
    frame = values.rename("value").to_dataframe().reset_index()
    return frame.merge(places, on="layer_band")


def _places(label: str, n_layers: int) -> Iterator[tuple[str, int]]:
    layers = band_layers(label, n_layers)
    if len(layers) == 1:
        yield _ALONE, layers.start
    if layers.start == 0:
        yield _BEFORE, layers.stop
    if layers.stop == n_layers:
        yield _FROM, layers.start
