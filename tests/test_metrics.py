"""KL between two runs, and closure: the share of a gap that is gone, where there is a gap."""

import pytest
import torch

from persona_nns.tracing import metrics
from persona_nns.tracing.metrics import closure, kl_of_logits, log_probabilities, summed_kl


def test_closure_is_the_share_of_the_hosts_gap_that_is_gone() -> None:
    host = torch.tensor([[4.0], [0.5]])
    kl = torch.tensor([[4.0, 1.0, 0.0], [0.0, 0.75, 0.5]])
    assert closure(kl, host).tolist() == [[0.0, 0.75, 1.0], [1.0, -0.5, 0.0]]


def test_without_a_gap_there_is_no_share() -> None:
    host = torch.tensor([0.0, -5e-8, 1e-7])
    assert closure(torch.tensor([0.0, 0.6, 6.0]), host).isnan().all()


def distributions(shift: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of two runs whose logits are as far apart as ``shift``, in float32."""
    generator = torch.Generator().manual_seed(seed)
    one = 6 * torch.randn(3, 10, 1024, generator=generator)
    other = one + shift * torch.randn(one.shape, generator=generator)
    return log_probabilities(one), log_probabilities(other)


def test_the_kl_is_that_of_float64() -> None:
    scored = torch.ones(3, 10, dtype=torch.bool)
    scored[1, 4:] = False
    for shift in (0.01, 0.3, 20.0):
        one, other = distributions(shift)
        exact = (one.double().exp() * (one.double() - other.double())).sum(-1)
        expected = (exact * scored).sum(-1).float()
        torch.testing.assert_close(summed_kl(one, other, scored), expected, rtol=1e-4, atol=5e-6)


def test_runs_that_are_the_same_but_for_rounding_are_the_same() -> None:
    scored = torch.ones(3, 10, dtype=torch.bool)
    for seed in range(20):
        one, other = distributions(1e-6, seed)
        assert float(summed_kl(one, other, scored).abs().max()) < 5e-7


def test_what_one_run_cannot_say_costs_no_nan() -> None:
    one = torch.tensor([[[0.0, -400.0]]])
    other = torch.tensor([[[-400.0, 0.0]]])
    scored = torch.ones(1, 1, dtype=torch.bool)
    assert summed_kl(one, other, scored).tolist() == [400.0]


@pytest.mark.parametrize("n_rows", [1, 2, 3, 100])
def test_the_kl_of_logits_is_that_of_their_distributions_however_many_at_a_time(
    n_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_AT_A_TIME", n_rows * 4 * 64)
    generator = torch.Generator().manual_seed(1)
    clean = log_probabilities(torch.randn(5, 4, 64, generator=generator))
    logits = torch.randn(5, 4, 64, generator=generator)
    scored = torch.rand(5, 4, generator=generator) > 0.3
    expected = summed_kl(clean, log_probabilities(logits), scored)
    assert torch.equal(kl_of_logits(clean, logits, scored), expected)
