"""What a model says, greedily: the continuation that every intervention is scored on."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from nnsight import TransformersModel, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_nns.declarations.sites import generated_index
from persona_nns.prompts.grids import Cell
from persona_nns.prompts.markers import count_each
from persona_nns.tracing.batches import left_pad
from persona_nns.tracing.prefixes import Prefilled


@dataclass(frozen=True)
class Continuation:
    """Reference tokens of a batch of prompts.

    Attributes:
        ids: [row, token]; what stands after a row's end token is padding.
        length: [row], tokens up to and including the end token (all, where none was said).
    """

    ids: Tensor
    length: Tensor

    def first(self, n_tokens: int) -> "Continuation":
        """Its first tokens."""
        return Continuation(self.ids[:, :n_tokens], self.length.clamp(max=n_tokens))

    def scored(self, position: str, n_eval: int) -> Tensor:
        """Which tokens of the window that a position is scored on exist, [row, n_eval].

        The window is tokens 1 … n_eval for a position of the prompt, and K+1 … K+n_eval for
        ``gK``: the window of the causal KL.
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


def say(model: TransformersModel, prompts: Prefilled, n_tokens: int) -> Continuation:
    """What a model says to prompts, greedily."""
    batch = left_pad(prompts.rows, device=model.device)
    with model.generate(batch.tokens, **greedily(prompts, n_tokens)) as tracer:
        said = save(tracer.result)
    return read_continuation(said, batch.width, n_tokens, end_tokens(model))


def greedily(prompts: Prefilled, n_tokens: int) -> dict[str, Any]:
    """How ``generate`` is called for the likeliest tokens, beside the tokens of the prompts."""
    return {
        "past_key_values": prompts.prefix and prompts.prefix.cache(),
        "max_new_tokens": n_tokens,
        "do_sample": False,
        "num_beams": 1,
    }


def mark(texts: Sequence[Any], cells: Sequence[Cell]) -> dict[str, Any]:
    """The variables ``text``, ``any_marker`` and ``distinct_markers`` of what each cell says."""
    distinct = torch.tensor(count_each(texts, cells))
    return {"text": texts, "any_marker": distinct > 0, "distinct_markers": distinct}


@contextmanager
def until_end_of_text() -> Iterator[None]:
    """Let a loop over generated tokens end with the text, without being warned of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*was never reached: the loop asked for")
        yield


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
