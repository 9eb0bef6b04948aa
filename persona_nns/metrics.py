"""What is measured on next-token distributions. Runs inside tracing contexts: torch only."""

import torch
from torch import Tensor


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-softmax over the vocabulary in float32, whatever the model's precision."""
    return torch.log_softmax(logits.float(), dim=-1)


def summed_kl(clean: Tensor, intervened: Tensor, scored: Tensor) -> Tensor:
    """KL(clean ‖ intervened) in nats, summed over the scored tokens.

    Args:
        clean: log-probabilities, [row, token, vocabulary].
        intervened: log-probabilities, [row, token, vocabulary].
        scored: [row, token], True where the token counts (never padding).

    Returns:
        [row].
    """
    per_token = (clean.exp() * (clean - intervened)).sum(-1)
    return torch.where(scored, per_token, 0.0).sum(-1)
