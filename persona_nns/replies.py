"""What a model says to prompts when nothing is done to it. May run on a server."""

from collections.abc import Sequence

import torch
from nnsight import TransformersModel, save
from torch import Tensor

from persona_nns.batches import left_pad, similar_rows
from persona_nns.continuations import read_continuation
from persona_nns.models import end_tokens
from persona_nns.sampling import RowSampler


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
