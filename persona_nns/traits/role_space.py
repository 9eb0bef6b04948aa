"""The space of roles at a layer: means, axis, principal components, and what chance would give.

"The Assistant Axis" (arXiv 2601.10387). R are the live roles but the default, X their means
[R, d_model], m = mean of X, C = X − m. Components are the right singular vectors of C; the axis is
mean(default) − m. No matrix is d_model wide both ways: what only needs singular values takes them
from C Cᵀ, [R, R].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

#: Components that are kept, at most.
MOST_COMPONENTS = 10
#: Draws of the null, and of the intervals.
DRAWS = 200
_PERCENTILE = 0.95
_BOUNDS = (0.025, 0.975)


@dataclass(frozen=True, eq=False)
class RoleAnswers:
    """Which answers count, whose they are, and what they answer.

    Attributes:
        role: [answer], index of the role of each kept answer.
        question: [answer], index of the question of each.
        n_roles: how many roles there are.
        default: index of the assistant.
        min_answers: a role with fewer kept answers is left out.
    """

    role: Tensor
    question: Tensor
    n_roles: int
    default: int
    min_answers: int

    @cached_property
    def n_kept(self) -> Tensor:
        """Kept answers of each role, [role]."""
        return torch.bincount(self.role, minlength=self.n_roles)

    @cached_property
    def is_live(self) -> Tensor:
        """Whether a role has enough of them, [role]."""
        return self.n_kept >= self.min_answers

    @cached_property
    def others(self) -> Tensor:
        """Indices of R, the live roles but the default, [R]."""
        live = self.is_live.clone()
        live[self.default] = False
        return live.nonzero()[:, 0]

    @property
    def has_default(self) -> bool:
        """Whether the default is live."""
        return bool(self.is_live[self.default])

    @property
    def n_components(self) -> int:
        """Components that are kept."""
        return min(MOST_COMPONENTS, len(self.others) - 1)

    @cached_property
    def place(self) -> Tensor:
        """Where a role stands in R, [role]; −1 elsewhere."""
        place = torch.full((self.n_roles,), -1)
        place[self.others] = torch.arange(len(self.others))
        return place


def describe_space(answers: RoleAnswers, means: Tensor, seed: int) -> dict[str, Tensor]:
    """Everything about the roles at one layer.

    Args:
        answers: which they are; at least two roles beside the default are live.
        means: of each kept answer, [answer, d_model] in float32.
        seed: of the draws; they are the same at every layer.

    Returns:
        By variable; NaN for a role that is not live, and where the default would have to be.
    """
    centre = means.mean(0, dtype=torch.float64)
    # Draws are made of what differs between answers: float32 holds that well.
    moved = (means - centre).float()
    own = _role_means(answers, moved.double())
    found = _describe(answers, own)
    found["role_mean"] = own + centre
    null = torch.stack(list(_null_spectra(answers, moved, seed)))
    shares = null / null.sum(1, keepdim=True)
    n = answers.n_components
    found["explained_null"] = torch.quantile(shares[:, :n], _PERCENTILE, dim=0)
    found["variance_null"] = torch.quantile(null.sum(1), _PERCENTILE)
    found |= _intervals(answers, moved, found["component"], seed)
    return found


def _role_means(answers: RoleAnswers, means: Tensor) -> Tensor:
    """Mean over the kept answers of each role, [role, d_model]; NaN where it is not live."""
    sums = means.new_zeros(answers.n_roles, means.shape[1]).index_add_(0, answers.role, means)
    counts = answers.n_kept.clamp(min=1)[:, None]
    return torch.where(answers.is_live[:, None], sums / counts, torch.nan)


def _describe(answers: RoleAnswers, own: Tensor) -> dict[str, Tensor]:
    """What the role means say without any draw; ``own`` is [role, d_model]."""
    others, n = own[answers.others], answers.n_components
    middle = others.mean(0)
    _, singular, rows = torch.linalg.svd(others - middle, full_matrices=False)
    axis, centred = own[answers.default] - middle, own - middle
    component = rows[:n] * torch.where(rows[:n] @ axis < 0, -1.0, 1.0)[:, None]
    direction, shown = _unit(axis), _unit(centred)
    return {
        "axis": axis,
        "component": component,
        "explained": singular[:n] ** 2 / (singular**2).sum(),
        "variance": (singular**2).sum() / len(others),
        "loading": centred @ component.T,
        "projection": centred @ direction,
        "cos_roles": shown @ shown.T,
        "cos_axis": component @ direction,
    }


def _null_spectra(answers: RoleAnswers, moved: Tensor, seed: int) -> Iterator[Tensor]:
    """Of each draw, the variances along its components, largest first, [R]; their sum is all.

    Within each question, the kept answers of R exchange their labels.
    """
    generator = torch.Generator().manual_seed(seed)
    taking_part = answers.place[answers.role] >= 0
    role, question = answers.place[answers.role[taking_part]], answers.question[taking_part]
    own, n = moved[taking_part], len(answers.others)
    counts = torch.bincount(role, minlength=n)[:, None]
    in_order = question.argsort(stable=True)
    for _ in range(DRAWS):
        shuffled = torch.rand(len(role), generator=generator).argsort()
        shuffled = shuffled[question[shuffled].argsort(stable=True)]
        drawn = torch.empty_like(role)
        drawn[in_order] = role[shuffled]
        means = own.new_zeros(n, own.shape[1]).index_add_(0, drawn, own).double() / counts
        yield _spectrum(means - means.mean(0))[0]


def _unit(vector: Tensor) -> Tensor:
    """A vector divided by its norm over the last axis; zero where it is zero, NaN where it is."""
    norm = vector.norm(dim=-1, keepdim=True)
    return torch.where(norm == 0, 0.0, vector / norm)


def _spectrum(centred: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues of C Cᵀ / R, [R], largest first, and its eigenvectors in their columns.

    They are the variances along the components, and what each row has to do with them.
    """
    values, vectors = torch.linalg.eigh(centred @ centred.T / len(centred))
    return values.flip(0).clamp(min=0), vectors.flip(1)


def _intervals(
    answers: RoleAnswers, moved: Tensor, component: Tensor, seed: int
) -> dict[str, Tensor]:
    """95 % percentile intervals over draws of questions, default included.

    A component takes the draw's of largest |cosine| with it, signed by that cosine. A role's
    projection is on the draw's own axis.
    """
    n_roles = answers.n_roles
    cosines = torch.full((DRAWS, len(component)), torch.nan, dtype=torch.float64)
    projections = torch.full((DRAWS, n_roles), torch.nan, dtype=torch.float64)
    if answers.has_default:
        for draw, (axis, centred, present) in enumerate(_resampled(answers, moved, seed)):
            direction = _unit(axis)
            projections[draw, present] = centred @ direction
            rows = centred[answers.place[present] >= 0]
            cosines[draw] = _cosines_of_matches(rows, direction, component)
    bounds = torch.tensor(_BOUNDS, dtype=torch.float64)
    return {
        "cos_axis_interval": torch.nanquantile(cosines, bounds, dim=0).T,
        "projection_interval": torch.nanquantile(projections, bounds, dim=0).T,
    }


def _cosines_of_matches(rows: Tensor, direction: Tensor, component: Tensor) -> Tensor:
    """Cosine with the axis of the component of a draw that is most like each of some, [component].

    Args:
        rows: centred role means of the draw, [R, d_model].
        direction: of its axis, [d_model].
        component: [component, d_model].
    """
    n = min(MOST_COMPONENTS, len(rows) - 1)
    if n < 1:
        return torch.full((len(component),), torch.nan, dtype=torch.float64)
    _, vectors = _spectrum(rows)
    drawn = _unit(vectors[:, :n].T @ rows)
    alike = component @ drawn.T
    best = alike.abs().argmax(1)
    return (drawn @ direction)[best] * alike.gather(1, best[:, None])[:, 0].sign()


def _resampled(
    answers: RoleAnswers, moved: Tensor, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each draw of questions: the axis, the centred means of the roles there, and which.

    The roles are those live ones that answer a question of the draw; a draw without the default,
    or without any other role, is drawn again.
    """
    questions, question = answers.question.unique(return_inverse=True)
    n_questions, n_roles = len(questions), answers.n_roles
    cell = answers.role * n_questions + question
    sums = moved.new_zeros(n_roles * n_questions, moved.shape[1]).index_add_(0, cell, moved)
    sums = sums.view(n_roles, n_questions, -1)
    counts = torch.bincount(cell, minlength=n_roles * n_questions).view(n_roles, n_questions)
    counts = counts * answers.is_live[:, None]
    generator = torch.Generator().manual_seed(seed)
    n_drawn = 0
    while n_drawn < DRAWS:
        drawn = torch.randint(n_questions, (n_questions,), generator=generator)
        times = torch.bincount(drawn, minlength=n_questions)
        kept = counts @ times
        present = (kept > 0).nonzero()[:, 0]
        if not kept[answers.default] or len(present) < 2:
            continue
        n_drawn += 1
        totals = torch.einsum("q,rqd->rd", times.to(sums.dtype), sums[present])
        means = totals.double() / kept[present, None]
        middle = means[answers.place[present] >= 0].mean(0)
        axis = means[present == answers.default][0] - middle
        yield axis, means - middle, present


def stack_layers(found: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `describe_space` gives at each layer, with the layers in the declared place."""
    last = {"role_mean": 1, "loading": 1, "projection": 1, "projection_interval": 1, "cos_roles": 2}
    return {
        name: torch.stack([each[name] for each in found], last.get(name, 0)) for name in found[0]
    }
