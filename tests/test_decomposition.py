"""The decomposition, with numbers worked out by hand."""

import math

import pytest
import torch

from persona_nns.tracing.decomposition import (
    additive,
    cos_additive,
    cos_persona_task,
    cosine,
    interaction_ratio,
)

BB = torch.tensor([1.0, 1.0, 1.0])
XB = torch.tensor([4.0, 1.0, 1.0])  # ΔX = (3, 0, 0)
BY = torch.tensor([1.0, 5.0, 1.0])  # ΔY = (0, 4, 0)
XY = torch.tensor([4.0, 5.0, 13.0])  # ΔXY = (3, 4, 12), Inter = (0, 0, 12)


def test_the_prediction_is_the_baseline_plus_both_effects() -> None:
    assert additive(BB, XB, BY).tolist() == [4.0, 5.0, 1.0]


def test_cosine_of_the_combination_with_the_sum() -> None:
    assert float(cos_additive(BB, XB, BY, XY)) == pytest.approx(25 / (13 * 5), abs=1e-7)


def test_cosine_of_persona_and_task() -> None:
    assert float(cos_persona_task(BB, XB, BY)) == 0.0
    slanted = torch.tensor([4.0, 5.0, 1.0])  # ΔY = (3, 4, 0)
    assert float(cos_persona_task(BB, XB, slanted)) == pytest.approx(3 / 5, abs=1e-7)
    opposite = torch.tensor([-1.0, 1.0, 1.0])
    assert float(cos_persona_task(BB, XB, opposite)) == pytest.approx(-1.0, abs=1e-7)


def test_interaction_relative_to_the_whole_effect() -> None:
    assert float(interaction_ratio(BB, XB, BY, XY)) == pytest.approx(12 / 13, abs=1e-7)


def test_what_adds_up_exactly_has_cosine_one_and_no_interaction() -> None:
    together = additive(BB, XB, BY)
    assert float(cos_additive(BB, XB, BY, together)) == pytest.approx(1.0, abs=1e-6)
    assert float(interaction_ratio(BB, XB, BY, together)) == pytest.approx(0.0, abs=1e-7)


def test_zero_over_zero_is_zero() -> None:
    assert float(cos_additive(BB, BB, BB, BB)) == 0.0
    assert float(cos_persona_task(BB, BB, BY)) == 0.0
    assert float(interaction_ratio(BB, BB, BB, BB)) == 0.0


def test_small_vectors_are_not_swallowed_by_the_epsilon() -> None:
    a, b = torch.tensor([1e-3, 0.0]), torch.tensor([1e-3, 1e-3])
    assert float(cosine(a, b)) == pytest.approx(1 / math.sqrt(2), rel=2e-3)


def test_only_the_last_axis_is_reduced() -> None:
    generator = torch.Generator().manual_seed(0)
    bb, xb, by, xy = torch.randn(4, 2, 3, 5, generator=generator)
    assert additive(bb, xb, by).shape == (2, 3, 5)
    whole = cos_additive(bb, xb, by, xy), cos_persona_task(bb, xb, by)
    whole = (*whole, interaction_ratio(bb, xb, by, xy))
    for values in whole:
        assert values.shape == (2, 3)
    one = bb[1, 2], xb[1, 2], by[1, 2], xy[1, 2]
    parts = cos_additive(*one), cos_persona_task(*one[:3]), interaction_ratio(*one)
    for values, part in zip(whole, parts, strict=True):
        assert float(values[1, 2]) == pytest.approx(float(part), abs=1e-6)


def test_bfloat16_residuals_are_decomposed_in_float32() -> None:
    # The residuals are bfloat16 numbers, but their differences (-254.5, -254.75) are not.
    bb = torch.tensor([256.0, 1.0], dtype=torch.bfloat16)
    xb = torch.tensor([1.5, 1.0], dtype=torch.bfloat16)
    by = torch.tensor([1.25, 3.0], dtype=torch.bfloat16)
    xy = torch.tensor([1.0, 301.0], dtype=torch.bfloat16)  # stored as 300 or 302
    dx, dy, dxy = [-254.5, 0.0], [-254.75, 2.0], [-255.0, float(xy[1]) - 1.0]
    prediction = additive(bb, xb, by)
    assert prediction.dtype is torch.float32
    assert prediction.tolist() == [256.0 - 254.5 - 254.75, 3.0]

    total = [dx[0] + dy[0], dx[1] + dy[1]]
    inter = [dxy[0] - total[0], dxy[1] - total[1]]
    expected = {
        "additive": (dxy[0] * total[0] + dxy[1] * total[1])
        / (math.hypot(*dxy) * math.hypot(*total)),
        "persona_task": (dx[0] * dy[0] + dx[1] * dy[1]) / (math.hypot(*dx) * math.hypot(*dy)),
        "interaction": math.hypot(*inter) / math.hypot(*dxy),
    }
    values = {
        "additive": cos_additive(bb, xb, by, xy),
        "persona_task": cos_persona_task(bb, xb, by),
        "interaction": interaction_ratio(bb, xb, by, xy),
    }
    assert all(value.dtype is torch.float32 for value in values.values())
    assert {name: float(value) for name, value in values.items()} == pytest.approx(
        expected, rel=1e-6
    )
