"""Steering: add a direction to the residual stream, take it away, or cap what lies along it.

``h_L + α v_L`` at the input of block L, at the tokens of a position set: ``all``, ``prompt`` (the
last prompt token included) or ``response`` (from the last prompt token on: the tokens whose
streams predict the response). Positions are explicit masks, so that a teacher-forced pass and
generation do the same.

What changes and scores streams runs inside tracing contexts and may run on a server: torch and
builtins only.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from persona_nns.errors import UsageError

STEERED_POSITIONS = ("all", "prompt", "response")


def steered_tokens(
    attention_mask: Tensor, n_response: Tensor | int, position_sets: Sequence[str]
) -> Tensor:
    """Which tokens of rows a position set holds, for rows padded on either side.

    Args:
        attention_mask: [row, column], 0 on padding.
        n_response: [row], how many of a row's last tokens are the response; 0 where the response
            is yet to be generated.
        position_sets: one for each row.

    Returns:
        [row, column], 1 on the tokens that are steered.
    """
    place = attention_mask.cumsum(1) * attention_mask
    n_prompt = (attention_mask.sum(1) - n_response)[:, None]
    of_set = {
        "all": place > 0,
        "prompt": (place > 0) & (place <= n_prompt),
        "response": (place > 0) & (place >= n_prompt),
    }
    rows = [of_set[name][row] for row, name in enumerate(position_sets)]
    return torch.stack(rows).float()


def steered_steps(position_sets: Sequence[str]) -> Tensor:
    """Which rows are steered at tokens that are generated, [row, 1]."""
    return torch.tensor([[float(name != "prompt")] for name in position_sets])


def steer(hidden: Tensor, direction: Tensor, strength: Tensor) -> Tensor:
    """Add a vector to a residual stream.

    Args:
        hidden: [row, column, d_model].
        direction: [d_model].
        strength: [row, column], α on the tokens that are steered and 0 on the others.

    Returns:
        [row, column, d_model] in the dtype of ``hidden``.
    """
    direction, strength = direction.to(hidden.device), strength.to(hidden.device)
    return (hidden.float() + strength[..., None] * direction).to(hidden.dtype)


def steer_on_sphere(hidden: Tensor, direction: Tensor, strength: Tensor) -> Tensor:
    """Add a vector and give the stream its norm back: (h + α v) ‖h‖ / ‖h + α v‖.

    What ``normalize=True`` does in repeng's ``ControlModule``. Tokens that are not steered stay as
    they are, exactly; a sum of zero stays zero.

    Args:
        hidden: [row, column, d_model].
        direction: [d_model].
        strength: [row, column], α on the tokens that are steered and 0 on the others.

    Returns:
        [row, column, d_model] in the dtype of ``hidden``.
    """
    direction, strength = direction.to(hidden.device), strength.to(hidden.device)
    stream = hidden.float()
    moved = stream + strength[..., None] * direction
    before, after = stream.norm(dim=-1, keepdim=True), moved.norm(dim=-1, keepdim=True)
    return torch.where(after > 0, moved * (before / after), moved).to(hidden.dtype)


def ablate(hidden: Tensor, direction: Tensor) -> Tensor:
    """Take a direction out of a residual stream: h − (h·v̂) v̂.

    Args:
        hidden: [row, column, d_model].
        direction: v̂ [d_model], of norm one, or zero, which changes nothing.

    Returns:
        [row, column, d_model] in the dtype of ``hidden``.
    """
    stream, direction = hidden.float(), direction.to(hidden.device)
    return (stream - (stream @ direction)[..., None] * direction).to(hidden.dtype)


def cap(hidden: Tensor, direction: Tensor, tau: Tensor | float, steered: Tensor) -> Tensor:
    """Cut off what lies above a threshold along a direction: h − max(0, h·v̂ − τ) v̂.

    To keep a model near something, v points away from it. So does the public code of "The Assistant
    Axis" (arXiv 2601.10387), at the output of its layer ℓ, our ℓ + 1; the paper's text has v point
    to the assistant and raises what is too low, which is this with −v and −τ. In float32, so that
    what is cut of a bfloat16 stream is right to the rounding of the stream itself.

    Args:
        hidden: [row, column, d_model].
        direction: v̂ [d_model], of norm one, or zero, which changes nothing.
        tau: τ, in the units of the stream; +∞ changes nothing.
        steered: [row, column], 1 on the tokens that are capped and 0 on the others.

    Returns:
        [row, column, d_model] in the dtype of ``hidden``.
    """
    direction, steered = direction.to(hidden.device), steered.to(hidden.device)
    stream = hidden.float()
    excess = (stream @ direction - tau).clamp(min=0) * steered
    return (stream - excess[..., None] * direction).to(hidden.dtype)


def increments(vector: Tensor) -> Tensor:
    """What each block adds when every block is steered: v_L − v_{L−1}, with v_{−1} = 0.

    Args:
        vector: [n_layers + 1, d_model].

    Returns:
        [n_layers, d_model]; what the blocks 0 … L add sums to v_L.
    """
    before = torch.cat([torch.zeros_like(vector[:1]), vector[:-2]])
    return vector[:-1] - before


def response_logprob(logits: Tensor, response: Tensor, n_response: Tensor) -> Tensor:
    """Log-probability of each row's response, summed over its tokens.

    Args:
        logits: [row, column, vocabulary], the columns that predict the last columns of
            ``response``: column k predicts token k.
        response: [row, column], token ids, right-aligned.
        n_response: [row], how many of the last columns are a row's response.

    Returns:
        [row], in nats.
    """
    logprobs = logits.float().log_softmax(-1)
    said = logprobs.gather(-1, response[..., None])[..., 0]
    column = torch.arange(response.shape[1], device=response.device)
    inside = column >= response.shape[1] - n_response[:, None]
    return torch.where(inside, said, 0.0).sum(-1)


def parse_alphas(spec: str) -> tuple[float, ...]:
    """The coefficients in a list such as ``0,1,2``, in its order.

    Raises:
        UsageError: not finite numbers, or one given twice.
    """
    parts = [part.strip() for part in spec.split(",") if part.strip()]
    try:
        alphas = tuple(float(part) for part in parts)
    except ValueError as error:
        raise UsageError(f"The alphas {spec!r} are not numbers such as 0,1,2.") from error
    if not alphas or not all(map(math.isfinite, alphas)):
        raise UsageError(f"The alphas {spec!r} are not finite numbers such as 0,1,2.")
    if len(set(alphas)) < len(alphas):
        raise UsageError(f"An alpha is given twice in {spec!r}; name each one once.")
    return alphas


def parse_position_sets(spec: str) -> tuple[str, ...]:
    """The position sets in a list such as ``all,response``, in its order.

    Raises:
        UsageError: an unknown one, or one given twice.
    """
    names = tuple(part.strip() for part in spec.split(",") if part.strip())
    for name in names:
        if name not in STEERED_POSITIONS:
            raise UsageError(f"Unknown position set {name!r}; use {', '.join(STEERED_POSITIONS)}.")
        if names.count(name) > 1:
            raise UsageError(f"The position set {name!r} is given twice; name each one once.")
    if not names:
        raise UsageError(f"No position set was asked for; use {', '.join(STEERED_POSITIONS)}.")
    return names
