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
from persona_nns.tracing.batches import left_pad, similar_rows
from persona_nns.tracing.continuations import Continuation, end_tokens, read_continuation
from persona_nns.tracing.kv.cache import KVCache
from persona_nns.tracing.sandbox import has_weights


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
        if scores.device.type == "cuda":
            uniform = uniform.pin_memory().to(scores.device, non_blocking=True)
        uniform = uniform.to(scores.device)
        # A uniform draw of 0 would be noise of −inf, and one of 1 noise of +inf.
        tiny = torch.finfo(torch.float32).tiny
        noise = -torch.log(-torch.log(uniform.clamp(tiny, 1 - 2**-24)))
        return logits + noise


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


class Draw:
    """Answers to a batch of prompts while they are drawn: passes of ``generate``, told one by one.

    Where the model has its weights, one pass draws them all by a logits processor. From a sandbox
    none of ours can be handed to it: there a pass gives the scores of one more token, as
    ``generate`` would choose by them, and the same sampler draws it here.

    Attributes:
        batch: the prompts.
        said: [row, token], what has been said in the passes so far.
    """

    def __init__(
        self,
        model: TransformersModel,
        prompts: Sequence[SeededPrompt],
        sampling: Sampling,
        prefix: KVCache | None = None,
    ) -> None:
        """Prompts, and what is kept of their first tokens, if anything is."""
        self.batch = left_pad([prompt.ids for prompt in prompts], device=model.device)
        self.said = self.batch.input_ids[:, :0]
        self._prefix, self._ends = prefix, end_tokens(model)
        self._n_tokens = sampling.max_new_tokens
        self._sampler = None
        if sampling.temperature:
            self._sampler = sampling.sampler([prompt.seed for prompt in prompts])
        self._by_token = self._sampler is not None and not has_weights(model)

    @property
    def unfinished(self) -> bool:
        """Whether another pass is needed."""
        if not self._by_token:
            return not self.n_said
        ended = torch.isin(self.said, torch.tensor(self._ends, device=self.said.device)).any(1)
        return self.n_said < self._n_tokens and not bool(ended.all())

    @property
    def n_said(self) -> int:
        """Tokens that have been said before the next pass."""
        return self.said.shape[1]

    @property
    def tokens(self) -> dict[str, Tensor]:
        """What the next pass goes on from."""
        mask = torch.nn.functional.pad(self.batch.attention_mask, (0, self.n_said), value=1)
        return {
            "input_ids": torch.cat([self.batch.input_ids, self.said], dim=1),
            "attention_mask": mask,
        }

    def settings(self, *, cached: bool = True) -> dict[str, Any]:
        """What ``generate`` takes beside the tokens.

        Args:
            cached: keep keys and values from token to token.
        """
        chosen = {
            "past_key_values": self._prefix and self._prefix.cache(),
            "max_new_tokens": self._n_tokens,
            "do_sample": False,
            "num_beams": 1,
            "use_cache": cached,
        }
        if self._by_token:
            kept = {"return_dict_in_generate": True, "output_scores": True}
            return {**chosen, "max_new_tokens": 1, "use_cache": self._prefix is not None, **kept}
        return {**chosen, "logits_processor": [] if self._sampler is None else [self._sampler]}

    def add(self, generated: Any) -> None:
        """Take in what a pass has returned."""
        if self._by_token and self._sampler is not None:
            drawn = self._sampler(self.batch.input_ids, generated.scores[0]).argmax(-1)
            self.said = torch.cat([self.said, drawn[:, None].to(self.said)], dim=1)
        else:
            self.said = generated[:, self.batch.width :]

    def read(self) -> Continuation:
        """What has been said."""
        return read_continuation(
            torch.cat([self.batch.input_ids, self.said], dim=1),
            self.batch.width,
            self._n_tokens,
            self._ends,
        )

    def replies(self) -> Tensor:
        """What has been said, [row, token], −1 after a row's end, on the CPU."""
        return self.read().until_end().cpu()


def draws(
    model: TransformersModel, prompts: Sequence[SeededPrompt], sampling: Sampling
) -> Iterator[tuple[list[int], Draw]]:
    """Deal prompts into batches of similar length; no answer depends on those beside it.

    Yields:
        Which of the prompts, and their answers, still to be drawn.
    """
    n_tokens = sampling.max_new_tokens
    for rows in similar_rows([len(prompt.ids) + n_tokens for prompt in prompts]):
        yield rows, Draw(model, [prompts[row] for row in rows], sampling)


def sample_replies(
    model: TransformersModel, prompts: Sequence[SeededPrompt], sampling: Sampling
) -> Tensor:
    """Sample a reply to each prompt, [row, token], −1 after a row's end, on the CPU."""
    said = torch.full((len(prompts), sampling.max_new_tokens), -1)
    for rows, draw in draws(model, prompts, sampling):
        while draw.unfinished:
            with model.generate(draw.tokens, **draw.settings()) as tracer:
                generated = save(tracer.result)
            draw.add(generated)
        said[rows] = draw.replies()
    return said
