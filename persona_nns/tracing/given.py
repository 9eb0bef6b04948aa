"""Given answers, read once without intervention, so that interventions go on from there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nnsight import TransformersModel, save
from torch import Tensor

from persona_nns.tracing.batches import left_pad
from persona_nns.tracing.metrics import log_probabilities, summed_kl
from persona_nns.tracing.steering import response_logprob, steered_tokens


@dataclass(frozen=True)
class Given:
    """Prompts with their answers, which may be empty, and what the model makes of them.

    Attributes:
        inputs: what the model takes: prompts and answers, padded on the left.
        response: token ids of the answers, right-aligned, [row, column].
        n_response: how many of them are a row's answer, [row].
        clean: what enters each block without steering, [row, column, d_model].
        last: log-probabilities of what follows the last token, [row, vocabulary].
    """

    inputs: dict[str, Any]
    response: Tensor
    n_response: Tensor
    clean: list[Tensor]
    last: Tensor

    def steered(self, position_set: str) -> Tensor:
        """Which tokens a position set holds, [row, column], 1 where it does."""
        mask = self.inputs["attention_mask"]
        return steered_tokens(mask, self.n_response, [position_set] * len(mask))

    def logprob(self, logits: Tensor) -> Tensor:
        """Log-probability of each answer in nats, [row].

        Args:
            logits: [row, column, vocabulary] of the last columns: the answers', and one before.
        """
        return response_logprob(logits[:, :-1], self.response, self.n_response)

    def divergence(self, logits: Tensor) -> Tensor:
        """KL(without intervention ‖ with it) of what follows the last token, in nats, [row].

        Args:
            logits: [row, column, vocabulary] of the last columns.
        """
        there = log_probabilities(logits[:, -1:])
        return summed_kl(self.last[:, None], there, torch.ones_like(there[..., 0]) > 0)


def read_given(
    model: TransformersModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> Given:
    """Run prompts with their answers without intervention.

    Args:
        model: from `load_model`.
        prompts: token ids of each row's prompt.
        answers: token ids of each row's answer.
    """
    rows = [(*prompt, *answer) for prompt, answer in zip(prompts, answers, strict=True)]
    padded = left_pad(rows, device=model.device)
    n_response = torch.tensor([len(answer) for answer in answers], device=model.device)
    inputs = {**padded.tokens, "position_ids": padded.position_ids, "use_cache": False}
    with model.trace(inputs, logits_to_keep=1):
        clean = save([block.input for block in model.layers])
        last = save(log_probabilities(model.output.logits[:, -1]))
    response = padded.input_ids[:, padded.width - int(n_response.max()) :]
    return Given(inputs, response, n_response, clean, last)
