"""Bands of layers: the labels of the ``layer_band`` dimension and what they stand for.

Labels are end-exclusive, as Python's slices: ``all``, a single layer ``3``, the first layers
``0:3`` (layers 0, 1, 2), the last layers ``3:8`` of a model with 8.
"""

import re

from persona_nns.errors import UsageError

EVERY_BAND = "every"


def band_labels(n_layers: int) -> list[str]:
    """Every band of a model: all layers, each single one, the first ones, the last ones.

    ``0:1`` and ``n-1:n`` are the single layers 0 and n-1, ``0:n`` is ``all``: each band has one
    label.
    """
    return [
        "all",
        *(str(layer) for layer in range(n_layers)),
        *(f"0:{stop}" for stop in range(2, n_layers)),
        *(f"{start}:{n_layers}" for start in range(1, n_layers - 1)),
    ]


def band_layers(label: str, n_layers: int) -> range:
    """The layers of a band."""
    if label == "all":
        return range(n_layers)
    start, _, stop = label.partition(":")
    return range(int(start), int(stop) if stop else int(start) + 1)


def bands_of(n_layers: int, bands: str = EVERY_BAND) -> list[range]:
    """The layers of the bands that are asked for, in the order of `choose_bands`."""
    return [band_layers(label, n_layers) for label in choose_bands(bands, n_layers)]


def check_bands(bands: str) -> str:
    """A request for bands, written in one way; which layers a model has is seen later."""
    asked = [label.strip() for label in bands.split(",") if label.strip()]
    if not asked or asked == [EVERY_BAND]:
        return EVERY_BAND
    if wrong := [label for label in asked if not re.fullmatch(r"all|\d+(:\d+)?", label)]:
        raise ValueError(
            f"{', '.join(wrong)} is no band of layers; use every, or some of all, 3 (a layer), "
            "0:3 (layers 0, 1 and 2)"
        )
    return ",".join(dict.fromkeys(asked))


def choose_bands(bands: str, n_layers: int) -> list[str]:
    """The labels of the bands that are asked for, in their order behind ``all``.

    Args:
        bands: ``every``, or labels such as ``0:4,6``, end-exclusive; ``all`` is always among them.
        n_layers: number of decoder blocks.

    Raises:
        UsageError: the model has no such layers.
    """
    if bands == EVERY_BAND:
        return band_labels(n_layers)
    chosen = ["all"]
    for asked in bands.split(","):
        layers = band_layers(asked, n_layers)
        if not layers or layers.stop > n_layers:
            raise UsageError(
                f"There is no band {asked!r}: the model has layers 0 to {n_layers - 1}, and a "
                f"band's end is not in it, as 0:{n_layers}."
            )
        if len(layers) == n_layers:
            label = "all"
        else:
            label = str(layers.start) if len(layers) == 1 else f"{layers.start}:{layers.stop}"
        chosen.append(label)
    return list(dict.fromkeys(chosen))
