"""Which parts of a network a budget keeps. Runs inside tracing contexts: torch only."""

from collections.abc import Sequence

import torch
from torch import Tensor


def best_first(scores: Tensor) -> Tensor:
    """Parts from the largest score to the smallest, equal ones by their place, [..., part]."""
    return scores.argsort(dim=-1, descending=True, stable=True)


def within_budget(scores: Tensor, sizes: Sequence[int]) -> Tensor:
    """Which parts each budget keeps, [..., budget, part].

    Args:
        scores: [..., part], none of them NaN.
        sizes: how many parts each budget keeps.
    """
    place = best_first(scores).argsort(dim=-1)
    return place[..., None, :] < torch.tensor(sizes, device=scores.device)[:, None]
