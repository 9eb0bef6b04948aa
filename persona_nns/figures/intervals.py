"""Intervals of what is reported over cells: bootstrap of medians and means, Wilson's of rates."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
_N_RESAMPLES = 9999

Statistic = Callable[..., Any]


def interval(*samples: NDArray[Any], statistic: Statistic = np.median) -> tuple[float, float]:
    """The 95 % percentile-bootstrap interval of a statistic over cells.

    Cells are resampled, several samples of the same cells together. The interval says how much
    the number hangs on which cells were asked; it knows nothing of personas or tasks that cells
    share. Where all cells agree it is a point: rates, which often are 0 or 1, have
    `share_interval`. The seed is fixed: the same numbers give the same interval.

    Args:
        *samples: [cell], without NaN.
        statistic: function of the samples that takes an ``axis``.

    Returns:
        The bounds; NaN for fewer than two cells.
    """
    if len(samples[0]) < 2:
        return float("nan"), float("nan")
    from scipy.stats import bootstrap  # takes as long to import as all the rest

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


def share_interval(found: float, of: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share: 0 of 6 is compatible with up to 39 %.

    Args:
        found: of how many it is true.
        of: how many there are.

    Returns:
        The bounds, from 0 to 1; NaN of none.
    """
    from scipy.stats import binomtest  # as above

    if not of:
        return float("nan"), float("nan")
    bounds = binomtest(round(found), of).proportion_ci(CONFIDENCE, "wilson")
    return float(bounds.low), float(bounds.high)
