"""The clean run: what interventions are made in, and what they are compared with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from persona_nns.tracing.kv.cache import KVCache, read_cache
from persona_nns.tracing.window import Window, open_window


@dataclass(frozen=True)
class CleanRun:
    """The greedy run on clean prompts: what interventions are made in and compared with.

    Attributes:
        window: prompts and continuation, from the end of the prefix on.
        n_prompt: columns of the window that belong to the prompts.
        logits: [row, token, vocabulary], the distribution of each generated token.
        residual: [layer, row, column of the window, d_model], with layer n_layers after the
            final norm.
        cache: keys and values of prefix and window; None where nothing is reused.
    """

    window: Window
    n_prompt: int
    logits: Tensor
    residual: Tensor
    cache: KVCache | None

    def narrow(self, site: Tensor, n_generated: int) -> Window:
        """The part of the run that an intervention can change and that is scored.

        Args:
            site: [row], the place of the intervention in each row.
            n_generated: the window ends with the column that predicts this generated token.

        Returns:
            From the first column of a site on; from the first column of all where nothing is
            reused.
        """
        stop = self.n_prompt + n_generated - 1
        if self.cache is None:
            return self.window.until(stop)
        first = int(self.window.column(site).min())
        whole = replace(self.window, clean=self.residual).until(stop)
        return whole.behind(self.cache.until(self.window.start + first))


def read_clean_run(
    said: Any, prompts: Sequence[Sequence[int]], continuation: Tensor, prefix: KVCache | None
) -> CleanRun:
    """Read a greedy run off what ``generate`` returned.

    Args:
        said: its result, with logits, hidden states and cache (``return_dict_in_generate``).
        prompts: the token ids it was given.
        continuation: [row, token], what it said; where all rows ended early, its last columns
            were never run and hold zeros in the result.
        prefix: the caches it was given.
    """
    n_tokens = continuation.shape[1]
    steps = [torch.stack(step) for step in said.hidden_states]
    missing = n_tokens - len(steps)
    residual = torch.nn.functional.pad(torch.cat(steps, dim=2), (0, 0, 0, missing))
    logits = torch.nn.functional.pad(torch.stack(said.logits, dim=1), (0, 0, 0, missing))
    window = open_window(prompts, continuation[:, :-1], prefix)
    return CleanRun(
        window=window,
        n_prompt=steps[0].shape[2],
        logits=logits,
        residual=residual,
        cache=None if prefix is None else read_cache(said.past_key_values, window.attention_mask),
    )
