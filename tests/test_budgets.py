"""Budgets: which parts are kept, in which order, and how many are needed."""

import math

import numpy as np
import pytest
import torch
import xarray as xr

from persona_nns.declarations import agreement, budget_labels, budget_sizes, random_scores
from persona_nns.results import needed_for
from persona_nns.tracing import best_first, within_budget


@pytest.mark.parametrize(
    ("count", "labels"),
    [
        (1, "0 all"),
        (2, "0 1 all"),
        (8, "0 1 2 4 all"),
        (9, "0 1 2 4 8 all"),
        (270, "0 1 2 4 8 16 32 64 128 256 all"),
    ],
)
def test_budgets_are_the_powers_of_two_below_the_count(count: int, labels: str) -> None:
    assert budget_labels(count) == labels.split()


def test_a_budget_beyond_the_count_keeps_all() -> None:
    assert budget_sizes(["0", "1", "4", "8", "all"], 5) == [0, 1, 4, 5, 5]


def test_the_largest_scores_are_kept_and_equal_ones_by_their_place() -> None:
    scores = torch.tensor([[0.5, 2.0, -3.0, 2.0, 0.5], [0.0, -1.0, 0.0, 1.0, 0.0]])
    assert best_first(scores).tolist() == [[1, 3, 0, 4, 2], [3, 0, 2, 4, 1]]
    kept = within_budget(scores, [0, 1, 3, 5])
    assert kept[0].long().tolist() == [[0] * 5, [0, 1, 0, 0, 0], [1, 1, 0, 1, 0], [1] * 5]
    assert kept[1, 2].long().tolist() == [1, 0, 1, 1, 0]


def test_the_random_order_is_that_of_seed_and_label() -> None:
    scores = random_scores(3, "teacher/arch", 7)
    order = np.random.default_rng([3, *b"teacher/arch"]).permutation(7)
    assert scores[order].tolist() == [0, -1, -2, -3, -4, -5, -6]
    assert best_first(torch.from_numpy(scores)).tolist() == order.tolist()
    assert random_scores(3, "chef/arch", 7).tolist() != scores.tolist()
    assert random_scores(4, "teacher/arch", 7).tolist() != scores.tolist()


def test_agreement_is_a_rank_correlation() -> None:
    assert agreement([[3, 1], [2, 0]], [[30, 10], [20, -5]]) == pytest.approx(1)
    assert agreement([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert agreement([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833)
    assert math.isnan(agreement([1, math.nan], [1, 2]))
    assert math.isnan(agreement([1, 1], [1, 2]))


def test_what_is_needed_is_counted_from_where_the_curve_stays_above() -> None:
    sizes = xr.DataArray([0, 1, 2, 4, 9], dims="budget")
    closure = xr.DataArray(
        [
            [0, 0.6, 0.4, 0.7, 1],
            [0.0, 0.1, 0.2, 0.3, 0.4],
            [0.5, 0.6, 0.7, 0.8, 0.9],
            [0, math.nan, 0.6, 0.7, 1],
        ],
        dims=("cell", "budget"),
    )
    np.testing.assert_array_equal(needed_for(closure, 0.5, sizes), [4, math.nan, 0, math.nan])
