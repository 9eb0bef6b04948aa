"""Bands of layers: the labels of the ``layer_band`` dimension and what they stand for.

Labels are end-exclusive, as Python's slices: ``all``, a single layer ``3``, the first layers
``0:3`` (layers 0, 1, 2), the last layers ``3:8`` of a model with 8.
"""


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


def bands_of(n_layers: int) -> list[range]:
    """The layers of every band of a model, in the order of their labels."""
    return [band_layers(label, n_layers) for label in band_labels(n_layers)]
