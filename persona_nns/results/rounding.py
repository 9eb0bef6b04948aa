"""Whether numbers that were measured twice are the same."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Results of other batches, devices and versions of torch differ by rounding.
_RTOL, _ATOL = 1e-3, 1e-4


def same_but_for_rounding(kept: NDArray[Any], anew: NDArray[Any], *, exact: bool) -> bool:
    """Whether two arrays hold the same.

    Args:
        kept: numbers, truth values or texts.
        anew: the same, measured again.
        exact: they are no measurements: counts, say, of which each has to be the same.
    """
    if kept.shape != anew.shape:
        return False
    if kept.dtype.kind not in "fiub":
        return kept.tolist() == anew.tolist()
    if exact:
        return np.array_equal(kept, anew, equal_nan=kept.dtype.kind == "f")
    return np.allclose(kept, anew, rtol=_RTOL, atol=_ATOL, equal_nan=True)
