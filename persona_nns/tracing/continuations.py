"""The greedy continuation that every intervention on a prompt is scored on."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from nnsight import TransformersModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_nns.declarations.sites import generated_index


@dataclass(frozen=True)
class Continuation:
    """Reference tokens of a batch of prompts.

    Attributes:
        ids: [row, token]; what stands after a row's end token is padding.
        length: [row], tokens up to and including the end token (all, where none was said).
    """

    ids: Tensor
    length: Tensor

    def scored(self, position: str, n_eval: int) -> Tensor:
        """Which tokens of the window that a position is scored on exist, [row, n_eval].

        The window is tokens 1 … n_eval for a position of the prompt, and K+1 … K+n_eval for
        ``gK`` (PROTOCOLS, causal KL).
        """
        token = torch.arange(n_eval, device=self.ids.device) + generated_index(position)
        return token < self.length[:, None]

    def until_end(self) -> Tensor:
        """The tokens with −1 after each row's end, [row, token]."""
        token = torch.arange(self.ids.shape[1], device=self.ids.device)
        return self.ids.masked_fill(token >= self.length[:, None], -1)

    def warn_if_short(self, labels: Sequence[str], n_tokens: int) -> None:
        """Warn of continuations that end before ``n_tokens``: they are scored on fewer tokens."""
        short = [
            f"{label} ({length})"
            for label, length in zip(labels, self.length.tolist(), strict=True)
            if length < n_tokens
        ]
        if short:
            warnings.warn(
                f"Continuations that end before {n_tokens} tokens are scored up to their end "
                f"(n_eval says how many): {', '.join(short)}.",
                stacklevel=2,
            )

    def reaches(self, position: str) -> Tensor:
        """Whether the continuation is long enough for the position to exist, [row]."""
        return self.length >= generated_index(position)

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """What was said in each row, without special tokens and what stands after the end."""
        rows = zip(self.ids.tolist(), self.length.tolist(), strict=True)
        said = [ids[:length] for ids, length in rows]
        return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in said]


def read_continuation(
    generated: Tensor, n_prompt: int, n_tokens: int, end_tokens: Sequence[int]
) -> Continuation:
    """Cut the continuation out of what ``generate`` returned.

    Args:
        generated: [row, column], prompts (left-padded to ``n_prompt`` columns) and what
            follows them.
        n_prompt: columns of the prompts.
        n_tokens: the number of tokens asked for; a batch in which every row ended earlier
            comes back narrower and is filled up.
        end_tokens: ids of the tokens that end a text.
    """
    ids = generated[:, n_prompt : n_prompt + n_tokens]
    ids = torch.nn.functional.pad(ids, (0, n_tokens - ids.shape[1]))
    said = torch.arange(n_tokens, device=ids.device) < generated.shape[1] - n_prompt
    ended = torch.isin(ids, torch.tensor(end_tokens, device=ids.device)) & said
    first_end = torch.where(ended.any(1), ended.long().argmax(1) + 1, said.sum())
    return Continuation(ids=ids, length=first_end)


def end_tokens(model: TransformersModel) -> list[int]:
    """Ids of the tokens that end a text of this model."""
    ends = model._module.generation_config.eos_token_id
    if ends is None:
        ends = model.tokenizer.eos_token_id if model.tokenizer is not None else None
    if ends is None:
        return []
    return [ends] if isinstance(ends, int) else list(ends)
