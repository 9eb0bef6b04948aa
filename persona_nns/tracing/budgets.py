"""Which parts of a network a budget keeps. Runs inside tracing contexts: torch only."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from persona_nns.declarations.budgets import random_scores


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


def each_once(measure: Callable[[Tensor], Tensor], kept: Tensor) -> Tensor:
    """What is measured of every choice of parts; those that are the same are measured once.

    Args:
        measure: gives [choice, cell] of [choice, cell, part].
        kept: [choice, cell, part], truth values.

    Returns:
        [choice, cell].
    """
    distinct, place = kept.unique(dim=0, return_inverse=True)
    return measure(distinct)[place]


def spend(
    measure: Callable[[Tensor], Tensor],
    scores: Tensor,
    exists: Tensor,
    sizes: Sequence[Sequence[int]],
) -> Tensor:
    """What is measured with the best parts of every ranking, within every budget.

    Args:
        measure: gives [choice, cell] of the parts that are kept, [choice, cell, part].
        scores: [cell, ranking, part].
        exists: [cell, part].
        sizes: of each cell, how many parts each budget keeps.

    Returns:
        [cell, ranking, budget]; NaN where the score of a part is not known.
    """
    known = (scores.isfinite() | ~exists[:, None]).all(-1)
    ranked = scores.nan_to_num(0.0).where(exists[:, None], -torch.inf)
    each = zip(ranked, sizes, strict=True)
    kept = torch.stack([within_budget(of, size) for of, size in each], dim=2)
    measured = each_once(measure, kept.flatten(0, 1)).unflatten(0, kept.shape[:2])
    return measured.movedim(2, 0).where(known[..., None], torch.nan)


def shuffled(seed: int, labels: Sequence[str], exists: Tensor) -> Tensor:
    """Scores that rank the parts of each cell at random, [cell, part]; NaN of those it lacks.

    Args:
        seed: of the run.
        labels: of the cells; each has an order of its own.
        exists: [cell, part], the first ones of a cell.
    """
    scores = torch.full(exists.shape, torch.nan)
    for row, (label, count) in enumerate(zip(labels, exists.sum(1).tolist(), strict=True)):
        scores[row, :count] = torch.from_numpy(random_scores(seed, label, count))
    return scores.to(exists.device)


def first_texts(texts: Sequence[str], scores: Tensor, count: int) -> list[str]:
    """Texts of the parts with the largest scores, best first, and nothing in place of missing ones.

    Args:
        texts: of each part that there is.
        scores: [part], of at least these; where one is not known, there is no text.
        count: how many.
    """
    known = scores[: len(texts)]
    order: list[int] = [] if bool(known.isnan().any()) else best_first(known).tolist()
    best = [texts[part] for part in order[:count]]
    return best + [""] * (count - len(best))
