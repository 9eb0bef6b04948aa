"""Trait vectors: averages of residuals over the tokens of an answer, and which answers count.

`averages` runs inside tracing contexts and may run on a server: torch and builtins only.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Average = Literal["response_avg", "prompt_avg", "prompt_last"]
AVERAGES: tuple[Average, ...] = get_args(Average)

#: A pair of answers counts if pos scores at least this, neg less, and both are as coherent.
THRESHOLD = 50.0


def token_weights(attention_mask: Tensor, n_response: Tensor) -> Tensor:
    """What each token weighs in each average, for rows padded on either side.

    Args:
        attention_mask: [row, column], 0 on padding.
        n_response: [row], how many of a row's last tokens are the response.

    Returns:
        [row, average, column], in the order of `AVERAGES`; each average's weights sum to one.
    """
    place = attention_mask.cumsum(1) * attention_mask  # 1 … n on a row's tokens, 0 on padding
    n_prompt = (attention_mask.sum(1) - n_response)[:, None]
    masks = torch.stack([place > n_prompt, (place > 0) & (place <= n_prompt), place == n_prompt], 1)
    weights = masks.float()
    return weights / weights.sum(-1, keepdim=True)


def averages(hidden: Tensor, weights: Tensor) -> Tensor:
    """The three averages of a residual stream.

    Args:
        hidden: [row, column, d_model].
        weights: [row, average, column], from `token_weights`.

    Returns:
        [row, average, d_model] in float32.
    """
    # What stands on padding weighs nothing, and must not be able to turn the sum into NaN.
    weights = weights.to(hidden.device)
    kept = torch.where(weights.any(1)[..., None], hidden.float(), 0.0)
    return weights @ kept


def normalised(vector: Tensor) -> Tensor:
    """A vector divided by its norm over the last axis; zero where it is zero."""
    norm = vector.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, vector / norm, torch.zeros_like(vector))


def keeps_pair(pos: tuple[float, float], neg: tuple[float, float]) -> bool:
    """Whether a pair of answers shows the contrast (each is trait and coherence, NaN refused)."""
    if any(map(math.isnan, (*pos, *neg))):
        return False
    coherent = pos[1] >= THRESHOLD and neg[1] >= THRESHOLD
    return pos[0] >= THRESHOLD > neg[0] and coherent
