"""Bootstrap intervals of what is reported over cells: medians, means and rates."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

CONFIDENCE = 0.95
_N_RESAMPLES = 9999

Statistic = Callable[..., Any]


def interval(*samples: NDArray[Any], statistic: Statistic = np.median) -> tuple[float, float]:
    """The 95 % percentile-bootstrap interval of a statistic over cells.

    Cells are resampled, several samples of the same cells together. The interval says how much
    the number hangs on which cells were asked; it knows nothing of personas or tasks that cells
    share. Percentiles rather than a corrected method, which is not defined where all cells agree
    (a rate of 0 or 1); there the interval is a point and too narrow: 0 of 24 cells is compatible
    with a rate of 12 %. The seed is fixed: the same numbers give the same interval.

    Args:
        *samples: [cell], without NaN.
        statistic: function of the samples that takes an ``axis``.

    Returns:
        The bounds; NaN for fewer than two cells.
    """
    if len(samples[0]) < 2:
        return float("nan"), float("nan")
    result = bootstrap(
        samples,
        statistic,
        paired=len(samples) > 1,
        vectorized=True,
        n_resamples=_N_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
