"""The additive decomposition of a role prompt's residual (As X, Do Y, section 3.3).

With h the residual of the four prompts at one site, ΔX = h_XB − h_BB, ΔY = h_BY − h_BB,
ΔXY = h_XY − h_BB and Inter = ΔXY − ΔX − ΔY. Every function reduces the last axis (d_model),
in float32.
"""

import torch
from torch import Tensor

# Added to every denominator, so that 0/0 (the embedding of p_last, equal in all prompts) is 0.
_EPSILON = 1e-9
# Differences below this share of the residual are rounding of float32: on the architectures of
# the tests rounding stays below 6e-7, and the smallest effect is 0.1.
_ROUNDING = 2e-6


def additive(bb: Tensor, xb: Tensor, by: Tensor) -> Tensor:
    """The additive prediction h_BB + ΔX + ΔY, [..., d_model], in float32."""
    bb, xb, by = bb.float(), xb.float(), by.float()
    return bb + (xb - bb) + (by - bb)


def effect(of: Tensor, bb: Tensor) -> Tensor:
    """What a prompt adds to the baseline's residual: of − h_BB, [..., d_model].

    Where that is no more than rounding, it is zero. Rows of a batch round differently, and a
    sliding window can hide the persona from a site: the direction of such a difference would be
    noise.
    """
    bb = bb.float()
    difference = of.float() - bb
    size = difference.norm(dim=-1, keepdim=True)
    return torch.where(size > _ROUNDING * bb.norm(dim=-1, keepdim=True), difference, 0.0)


def cos_additive(bb: Tensor, xb: Tensor, by: Tensor, xy: Tensor) -> Tensor:
    """cos(ΔXY, ΔX + ΔY), [...]: does the sum point where the combination goes?"""
    return cosine(effect(xy, bb), effect(xb, bb) + effect(by, bb))


def cos_persona_task(bb: Tensor, xb: Tensor, by: Tensor) -> Tensor:
    """cos(ΔX, ΔY), [...]: are the two effects separate directions?"""
    return cosine(effect(xb, bb), effect(by, bb))


def interaction_ratio(bb: Tensor, xb: Tensor, by: Tensor, xy: Tensor) -> Tensor:
    """‖Inter‖ / ‖ΔXY‖, [...]: how large is what the sum leaves out?"""
    together = effect(xy, bb)
    interaction = together - effect(xb, bb) - effect(by, bb)
    return interaction.norm(dim=-1) / (together.norm(dim=-1) + _EPSILON)


def gap_ratio(predicted: Tensor, xy: Tensor, bb: Tensor) -> Tensor:
    """‖h_add − h_XY‖ / ‖h_XY − h_BB‖, [...]: what the prediction misses, of the whole effect.

    Of residuals it is `interaction_ratio`; of residuals after a norm it is what that norm leaves.
    """
    predicted, xy, bb = predicted.float(), xy.float(), bb.float()
    return (predicted - xy).norm(dim=-1) / ((xy - bb).norm(dim=-1) + _EPSILON)


def match_rms(vector: Tensor, target: Tensor) -> Tensor:
    """The vector rescaled to the root mean square of the target, [..., d_model], in float32."""
    vector, target = vector.float(), target.float()
    return vector * (target.norm(dim=-1, keepdim=True) / vector.norm(dim=-1, keepdim=True))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity over the last axis, [...]; 0 where a vector is zero."""
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1) + _EPSILON)
