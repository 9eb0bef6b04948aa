"""Bands of layers: every single one, and cumulative ones from below and from above."""


def layer_bands(n_layers: int) -> dict[str, range]:
    """The bands of a model by label, end-exclusive.

    ``all``; single layers ``0`` … ``n-1``; from below ``0:k`` (k = 2 … n−1); from above ``k:n``
    (k = 1 … n−2, n as a number). Bands of one layer and of all have one label each.
    """
    bands = {"all": range(n_layers)}
    bands |= {str(layer): range(layer, layer + 1) for layer in range(n_layers)}
    bands |= {f"0:{k}": range(k) for k in range(2, n_layers)}
    bands |= {f"{k}:{n_layers}": range(k, n_layers) for k in range(1, n_layers - 1)}
    return bands
