"""The additive decomposition of a role prompt's residual (As X, Do Y, section 3.3).

With h the residual of the four prompts at one site, ΔX = h_XB − h_BB, ΔY = h_BY − h_BB,
ΔXY = h_XY − h_BB and Inter = ΔXY − ΔX − ΔY. Every function reduces the last axis (d_model),
in float32.
"""

from torch import Tensor

# Added to every denominator, so that 0/0 (the embedding of p_last, equal in all prompts) is 0.
_EPSILON = 1e-9


def additive(bb: Tensor, xb: Tensor, by: Tensor) -> Tensor:
    """The additive prediction h_BB + ΔX + ΔY, [..., d_model], in float32."""
    bb, xb, by = bb.float(), xb.float(), by.float()
    return bb + (xb - bb) + (by - bb)


def cos_additive(bb: Tensor, xb: Tensor, by: Tensor, xy: Tensor) -> Tensor:
    """cos(ΔXY, ΔX + ΔY), [...]: does the sum point where the combination goes?"""
    bb = bb.float()
    return cosine(xy - bb, (xb - bb) + (by - bb))


def cos_persona_task(bb: Tensor, xb: Tensor, by: Tensor) -> Tensor:
    """cos(ΔX, ΔY), [...]: are the two effects separate directions?"""
    bb = bb.float()
    return cosine(xb - bb, by - bb)


def interaction_ratio(bb: Tensor, xb: Tensor, by: Tensor, xy: Tensor) -> Tensor:
    """‖Inter‖ / ‖ΔXY‖, [...]: how large is what the sum leaves out?"""
    bb = bb.float()
    together = xy - bb
    interaction = together - (xb - bb) - (by - bb)
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
