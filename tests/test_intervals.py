"""Bootstrap intervals: those of a known distribution, and of several samples together."""

import numpy as np
import pytest

from persona_nns.figures.intervals import interval


def test_the_interval_of_a_mean_is_as_wide_as_its_standard_error_says() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    low, high = interval(values, statistic=np.mean)
    error = values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_the_same_numbers_give_the_same_interval() -> None:
    values = np.arange(24.0)
    assert interval(values) == interval(values)
    low, high = interval(values)
    assert low < np.median(values) < high


def test_where_all_cells_agree_the_interval_is_a_point() -> None:
    assert interval(np.ones(24), statistic=np.mean) == (1.0, 1.0)


def test_one_cell_has_no_interval() -> None:
    assert np.isnan(interval(np.ones(1))).all()


def test_samples_of_the_same_cells_are_resampled_together() -> None:
    values = np.random.default_rng(0).lognormal(size=24)

    def ratio(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return a.mean(axis) / b.mean(axis)

    assert interval(0.5 * values, values, statistic=ratio) == pytest.approx((0.5, 0.5))
