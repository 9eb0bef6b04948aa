"""Budgets: how many of a network's parts are used, the best ones first.

Parts (heads, keys and values, tokens) are ranked by a score, largest first, and equal scores by
their place. The first k of them are kept, for a row of budgets k: the labels of the dimension
``budget``. Which score is the right one is the question: `agreement` compares it with the effect.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

ALL = "all"


def budget_labels(count: int) -> list[str]:
    """The budgets of so many parts: 0 and the powers of two below their number, then ``all``."""
    return ["0", *(str(2**k) for k in range(count.bit_length()) if 2**k < count), ALL]


def budget_sizes(labels: Sequence[str], count: int) -> list[int]:
    """How many parts each budget keeps; one larger than their number keeps all."""
    return [count if label == ALL else min(int(label), count) for label in labels]


def random_scores(seed: int, label: str, count: int) -> np.ndarray:
    """Scores that rank parts at random: minus the place of each, [part].

    Args:
        seed: of the run.
        label: of the cell; each has an order of its own.
        count: how many parts there are.
    """
    order = np.random.default_rng([seed, *label.encode()]).permutation(count)
    scores = np.empty(count, dtype=np.float32)
    scores[order] = -np.arange(count)
    return scores


def agreement(scores: Any, effects: Any) -> float:
    """Spearman's rank correlation of a ranking's scores with the effects, each [part].

    Returns:
        NaN where either is not known of every part, or is the same for all.
    """
    one, other = np.asarray(scores, dtype=float).ravel(), np.asarray(effects, dtype=float).ravel()
    if np.isnan(one).any() or np.isnan(other).any():
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return float(np.asarray(stats.spearmanr(one, other))[0])
