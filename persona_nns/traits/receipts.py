"""Receipts of steering: what it costs, and whether it is the direction that does it.

- KL(unsteered ‖ steered) at the last token of neutral prompts: what steering does where nothing
  has to do with the trait.
- A random direction of the same norm at each layer: what any push of that size does.
- Which answers move against the direction: "anti-steerable" ones (arXiv 2407.12404 defines them by
  the slope of a logit difference; here it is the sign of a log-probability's change).
- Strength in units of the gap between the two classes, α‖v‖ / ‖mean₊ − mean₋‖.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_nns.prompts.chats import render_chat
from persona_nns.traits.directions import Direction

#: What has to do with no trait.
NEUTRAL_QUESTIONS = (
    "What is the capital of Portugal?",
    "How many minutes are there in three hours?",
    "Which gas do plants take in from the air?",
    "Name a tool for driving nails into wood.",
    "What does a thermometer measure?",
    "In which season do most leaves fall from the trees?",
    "Which number comes after ninety-nine?",
    "What is paper made from?",
)
_SEED = 0


@dataclass(frozen=True, eq=False)
class Receipts:
    """What the receipts of a direction are measured with.

    Attributes:
        neutral: token ids of the neutral prompts.
        random: [n_layers + 1, d_model], of the direction's norm at each layer.
        gap: [n_layers + 1], distance of the means of the two classes; NaN where it is unknown.
    """

    neutral: tuple[tuple[int, ...], ...]
    random: Tensor
    gap: Tensor


def receipts_of(direction: Direction, tokenizer: PreTrainedTokenizerBase) -> Receipts:
    """What the receipts of a direction are measured with, on a model with this tokenizer."""
    vectors, gap = direction.vectors, direction.gap
    unknown = torch.full((len(vectors),), torch.nan)
    return Receipts(
        tuple(render_chat(tokenizer, question).ids for question in NEUTRAL_QUESTIONS),
        random_like(vectors),
        unknown if gap is None else gap,
    )


def strength_of(vectors: Tensor, gap: Tensor, alphas: Tensor) -> Tensor:
    """α‖v‖ in units of the gap, [layer, α]; NaN where there is no gap.

    Args:
        vectors: [layer, d_model].
        gap: [layer].
        alphas: [α].
    """
    known = torch.where(gap > 0, gap, torch.nan)
    return vectors.norm(dim=-1)[:, None] * alphas / known[:, None]


def random_like(vectors: Tensor) -> Tensor:
    """A random direction of the same norm at each layer, the same whenever it is asked for.

    Args:
        vectors: [layer, d_model] on the CPU.
    """
    drawn = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(_SEED))
    return drawn * (vectors.norm(dim=-1) / drawn.norm(dim=-1))[:, None]


def moves_against(effect: Tensor, expected: Tensor, alphas: Tensor) -> Tensor:
    """Which answers move against the direction: 1 where they do, 0 where not, NaN at α = 0.

    With α > 0 an answer that shows the trait should become more likely, and one that does not less
    likely; with α < 0 the other way round. It moves against the direction where the change of its
    log-probability has the opposite sign. The mean over answers is the share.

    Args:
        effect: change of the log-probability, [row, …, α, position set].
        expected: [row], 1 of an answer with the trait (``pos``), −1 of one without (``neg``).
        alphas: [α].
    """
    wanted = torch.sign(alphas)[:, None] * expected.reshape(-1, *[1] * (effect.dim() - 1))
    return torch.where(wanted == 0, torch.nan, (effect * wanted < 0).float())
