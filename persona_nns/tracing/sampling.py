"""Sampling that does not depend on the batch: every row draws from a generator of its own.

By the Gumbel-max trick a sample from a distribution is the argmax of its log-probabilities plus
Gumbel noise. So generation stays greedy, and the noise is added by a logits processor, seeded row
by row. May run on a server: torch and builtins only.
"""

import hashlib
from collections.abc import Sequence

import torch
from nnsight import TransformersModel, save
from torch import Tensor

from persona_nns.tracing.batches import left_pad, similar_rows
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


def sample_replies(
    model: TransformersModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
) -> Tensor:
    """Sample a reply to each prompt; a row does not depend on the rows beside it.

    Args:
        model: from `load_model`.
        prompts: token ids, one row for each reply.
        seeds: one for each row.
        max_new_tokens: the longest reply.
        temperature: 1 samples from the model; 0 is greedy.

    Returns:
        [row, token], −1 after a row's end, on the CPU.
    """
    said = torch.full((len(prompts), max_new_tokens), -1)
    for batch in similar_rows([len(ids) + max_new_tokens for ids in prompts]):
        padded = left_pad([prompts[row] for row in batch], device=model.device)
        sampler = RowSampler([seeds[row] for row in batch], temperature)
        with model.generate(
            padded.tokens,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            logits_processor=[sampler] if temperature else [],
        ) as tracer:
            generated = save(tracer.result)
        reply = read_continuation(
            generated, padded.input_ids.shape[1], max_new_tokens, end_tokens(model)
        )
        said[batch] = reply.until_end().cpu()
    return said
