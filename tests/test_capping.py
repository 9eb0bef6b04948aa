"""Capping: what lies above τ along a direction is cut off, and nothing else."""

import torch

from persona_nns.tracing import cap


def test_cap_is_its_formula_and_leaves_no_projection_above_tau() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = 9 * torch.randn(3, 5, 16, generator=generator)
    unit = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
    steered = torch.ones(3, 5)
    steered[0, :2] = 0
    capped = cap(hidden, unit, 2.0, steered)
    for row in range(3):
        for token in range(5):
            h = hidden[row, token].double()
            over = max(0.0, float(h @ unit.double()) - 2.0) * float(steered[row, token])
            expected = h - over * unit.double()
            torch.testing.assert_close(capped[row, token].double(), expected, atol=1e-5, rtol=0)
    assert float((capped @ unit)[steered > 0].max()) < 2 + 1e-4
    assert torch.equal(capped[0, :2], hidden[0, :2])
    below = hidden @ unit <= 2
    assert below.any()
    assert torch.equal(capped[below], hidden[below])


def test_cap_without_an_end_or_a_direction_changes_nothing() -> None:
    hidden = torch.randn(2, 5, 8)
    unit, every = torch.eye(8)[0], torch.ones(2, 5)
    assert torch.equal(cap(hidden, unit, torch.inf, every), hidden)
    assert torch.equal(cap(hidden, torch.zeros(8), -3.0, every), hidden)
    assert torch.equal(cap(hidden, unit, -3.0, torch.zeros(2, 5)), hidden)


def test_a_bfloat16_stream_is_capped_in_float32() -> None:
    hidden = (100 * torch.randn(1, 200, 64)).bfloat16()
    unit = torch.nn.functional.normalize(torch.randn(64), dim=0)
    capped = cap(hidden, unit, 1.5, torch.ones(1, 200))
    assert capped.dtype == torch.bfloat16
    wide = hidden.double()
    over = ((wide @ unit.double()) - 1.5).clamp(min=0)
    expected = wide - over[..., None] * unit.double()
    assert torch.equal(capped, expected.bfloat16()) or float(
        (capped.double() - expected).abs().max()
    ) <= 2**-8 * float(expected.abs().max())
