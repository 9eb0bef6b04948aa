"""What is measured on next-token distributions. Runs inside tracing contexts: torch only."""

import torch
from torch import Tensor

#: Two runs whose KL is below this many nats are the same, but for rounding.
NO_GAP = 1e-6

# Probabilities that a KL is taken of at a time: so few stay in a processor's cache.
_AT_A_TIME = 2**20


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-softmax over the vocabulary in float32, whatever the model's precision."""
    return torch.log_softmax(logits.float(), dim=-1)


def closure(kl: Tensor, host: Tensor) -> Tensor:
    """1 − KL / KL(host): the share of the host's gap to the clean run that is gone.

    Args:
        kl: KL(clean ‖ intervened) in nats.
        host: KL(clean ‖ host) in nats, of a shape that broadcasts.

    Returns:
        NaN where the host is the clean run but for rounding: there is no gap to close.
    """
    return torch.where(host > NO_GAP, 1 - kl / host, torch.nan)


def summed_kl(clean: Tensor, intervened: Tensor, scored: Tensor) -> Tensor:
    """KL(clean ‖ intervened) in nats, summed over the scored tokens.

    Both distributions sum to one, so that Σ q − p adds nothing but what is lost when their
    logarithms are rounded. With it, two float32 runs that are the same but for rounding are about
    1e-8 nats apart; without it, up to 2e-6.

    Args:
        clean: log-probabilities, [row, token, vocabulary].
        intervened: log-probabilities, [row, token, vocabulary].
        scored: [row, token], True where the token counts (never padding).

    Returns:
        [row].
    """
    p, q = clean.exp(), intervened.exp()
    per_token = (p * (clean - intervened) + (q - p)).sum(-1)
    return torch.where(scored, per_token, 0.0).sum(-1)


def kl_of_logits(clean: Tensor, logits: Tensor, scored: Tensor) -> Tensor:
    """`summed_kl` of what is given as logits; a few rows at a time, so that it takes no memory.

    Args:
        clean: log-probabilities, [row, token, vocabulary].
        logits: of the intervened run, [row, token, vocabulary], in the model's precision.
        scored: [row, token], True where the token counts (never padding).

    Returns:
        [row].
    """
    n_rows = max(1, _AT_A_TIME // logits[0].numel())
    parts = zip(clean.split(n_rows), logits.split(n_rows), scored.split(n_rows), strict=True)
    return torch.cat([summed_kl(p, log_probabilities(of), which) for p, of, which in parts])
