"""Training batches: encoded examples of similar length, padded on the right."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_nns.organism.corpus import Example, stream
from persona_nns.organism.tokenizer import END_ID, PAD_ID
from persona_nns.prompts.chats import render_chat, response_ids

IGNORED = -100
POOL = 4096
"""Examples that are sorted by length together."""


@dataclass(frozen=True)
class TrainingBatch:
    """Conversations padded to one length.

    Attributes:
        ids: token ids, [batch, seq].
        labels: the next token where it belongs to the answer, else ``IGNORED``; [batch, seq].
        last: index of the last prompt token, [batch].
    """

    ids: Tensor
    labels: Tensor
    last: Tensor


@dataclass(frozen=True)
class Encoded:
    """Token ids of one conversation and the length of its prompt."""

    ids: list[int]
    prompt_length: int


def encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> Encoded:
    """Prompt, answer and end-of-turn token of one example."""
    prompt = render_chat(tokenizer, example.user, example.system or "").ids
    return Encoded([*prompt, *response_ids(tokenizer, example.answer), END_ID], len(prompt))


def batches(tokenizer: PreTrainedTokenizerBase, seed: int, tokens: int) -> Iterator[TrainingBatch]:
    """Endless batches of at most ``tokens`` tokens each, padding included."""
    rng = Random(seed)  # noqa: S311
    examples = stream(seed)
    while True:
        pool = [encode(tokenizer, example) for example in islice(examples, POOL)]
        pool.sort(key=lambda encoded: len(encoded.ids))
        groups = list(_group(pool, tokens))
        rng.shuffle(groups)
        yield from map(_pad, groups)


def _group(pool: list[Encoded], tokens: int) -> Iterator[list[Encoded]]:
    """Cut a pool that is sorted by length into runs whose padded size stays within ``tokens``."""
    group: list[Encoded] = []
    for encoded in pool:
        if group and len(encoded.ids) * (len(group) + 1) > tokens:
            yield group
            group = []
        group.append(encoded)
    yield group


def _pad(group: list[Encoded]) -> TrainingBatch:
    width = max(len(encoded.ids) for encoded in group)
    ids = torch.full((len(group), width), PAD_ID)
    labels = torch.full((len(group), width), IGNORED)
    for row, encoded in enumerate(group):
        start, length = encoded.prompt_length, len(encoded.ids)
        ids[row, :length] = torch.tensor(encoded.ids)
        labels[row, start - 1 : length - 1] = ids[row, start:length]
    last = torch.tensor([encoded.prompt_length - 1 for encoded in group])
    return TrainingBatch(ids, labels, last)
