"""Sampling that does not depend on the batch: every row draws from a generator of its own.

By the Gumbel-max trick a sample from a distribution is the argmax of its log-probabilities plus
Gumbel noise. So generation stays greedy, and the noise is added by a logits processor, seeded row
by row. May run on a server: torch and builtins only.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nnsight import TransformersModel, save
from torch import Tensor

from persona_nns.declarations.options import Count, NotNegative, Share
from persona_nns.tracing.batches import Batch, left_pad, similar_rows
from persona_nns.tracing.continuations import end_tokens, read_continuation


class RowSampler:
    """A logits processor after which the argmax is a sample, at temperature 1 or another.

    Attributes:
        seeds: one for each row.
        temperature: divides the logits; above 0.
        top_p: only the most likely tokens that together have this probability; 1 is all.
    """

    def __init__(self, seeds: Sequence[int], temperature: float = 1.0, top_p: float = 1.0) -> None:
        self.seeds = list(seeds)
        self.temperature = temperature
        self.top_p = top_p
        self._generators: list[torch.Generator] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        """Add noise to logits [row, vocabulary]; what top_p leaves out becomes −inf."""
        if not self._generators:
            # On the CPU, so that a sample does not depend on the device either.
            self._generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        logits = nucleus(scores.float() / self.temperature, self.top_p)
        uniform = torch.stack(
            [torch.rand(scores.shape[1], generator=each) for each in self._generators]
        )
        # A uniform draw of 0 would be noise of −inf, and one of 1 noise of +inf.
        tiny = torch.finfo(torch.float32).tiny
        noise = -torch.log(-torch.log(uniform.clamp(tiny, 1 - 2**-24)))
        return logits + noise.to(scores.device)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of most likely tokens whose probability reaches ``top_p``.

    Args:
        logits: [row, vocabulary].
        top_p: above 0; 1 keeps all.

    Returns:
        [row, vocabulary], −inf at tokens left out.
    """
    if top_p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    left_out = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
    return logits.masked_fill(left_out, -torch.inf)


def row_seed(*labels: str | int | float) -> int:
    """A seed that is the same wherever these labels are drawn for."""
    digest = hashlib.sha256("\n".join(map(str, labels)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


@dataclass(frozen=True)
class SeededPrompt:
    """Token ids to be answered, and the seed that the answer is drawn with."""

    ids: Sequence[int]
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        max_new_tokens: the longest answer.
        temperature: 1 samples from the model; 0 is greedy.
    """

    max_new_tokens: Count = 256
    temperature: NotNegative = 1.0

    def sampler(self, seeds: Sequence[int]) -> RowSampler:
        """Draws the rows with these seeds."""
        return RowSampler(seeds, self.temperature)


@dataclass(frozen=True)
class NucleusSampling(Sampling):
    """How answers are drawn, from the most likely tokens only.

    Attributes:
        top_p: sample from the most likely tokens that together have this probability.
    """

    top_p: Share = 1.0

    def sampler(self, seeds: Sequence[int]) -> RowSampler:
        """Draws the rows with these seeds."""
        return RowSampler(seeds, self.temperature, self.top_p)


def prompt_batches(
    prompts: Sequence[SeededPrompt], sampling: Sampling, *, device: torch.device
) -> Iterator[tuple[list[int], Batch, dict[str, Any]]]:
    """Deal prompts into batches of similar length; no answer depends on those beside it.

    Yields:
        Which of the prompts, the batch of them, and what ``generate`` takes beside its tokens.
    """
    n_tokens = sampling.max_new_tokens
    for rows in similar_rows([len(prompt.ids) + n_tokens for prompt in prompts]):
        sampler = sampling.sampler([prompts[row].seed for row in rows])
        settings = {
            "max_new_tokens": n_tokens,
            "do_sample": False,
            "num_beams": 1,
            "use_cache": True,
            "logits_processor": [sampler] if sampling.temperature else [],
        }
        yield rows, left_pad([prompts[row].ids for row in rows], device=device), settings


def read_replies(
    model: TransformersModel, generated: Tensor, batch: Batch, sampling: Sampling
) -> Tensor:
    """What ``generate`` added to a batch of prompts, [row, token], −1 after the end, on the CPU."""
    n_tokens = sampling.max_new_tokens
    said = read_continuation(generated, batch.width, n_tokens, end_tokens(model))
    return said.until_end().cpu()


def sample_replies(
    model: TransformersModel, prompts: Sequence[SeededPrompt], sampling: Sampling
) -> Tensor:
    """Sample a reply to each prompt, [row, token], −1 after a row's end, on the CPU."""
    said = torch.full((len(prompts), sampling.max_new_tokens), -1)
    for rows, batch, settings in prompt_batches(prompts, sampling, device=model.device):
        with model.generate(batch.tokens, **settings) as tracer:
            generated = save(tracer.result)
        said[rows] = read_replies(model, generated, batch, sampling)
    return said
