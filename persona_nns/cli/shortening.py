"""Tables that a terminal has room for: of very many bands of layers, some at even distances."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import xarray as xr

_MOST_BANDS = 12
_SHARES = (0.25, 0.5, 0.75)


def shorten(results: xr.Dataset) -> tuple[xr.Dataset, str]:
    """Leave out bands of layers where there are too many to be read.

    Returns:
        What to show, and a sentence that says what is left out and how to see it; empty where
        nothing is.
    """
    if results.sizes.get("layer_band", 0) <= _MOST_BANDS:
        return results, ""
    bands = [str(band) for band in results.layer_band.values]
    chosen = some_of(bands)
    note = (
        f"{len(chosen)} of {len(bands)} layer bands are shown; --every-band shows all of them, and "
        "--bands of `run` measures no more than are asked for."
    )
    return results.sel(layer_band=chosen), note


def some_of(bands: list[str]) -> list[str]:
    """Bands that stand for many: all layers, and of each kind those at a few depths."""
    single = [band for band in bands if band.isdigit()]
    first = [band for band in bands if band.startswith("0:")]
    last = [band for band in bands if ":" in band and band not in first]
    ends = [single[0], single[-1]] if single else []
    chosen = {"all", *ends}
    for kind in (single, first, last):
        chosen |= {kind[round(share * (len(kind) - 1))] for share in _SHARES if kind}
    return [band for band in bands if band in chosen]
