"""The clean run: what interventions are made in, and what they are compared with."""

from dataclasses import dataclass, replace

import torch
from nnsight import TransformersModel, save
from torch import Tensor

from persona_nns.tracing.batches import keep_last, left_pad
from persona_nns.tracing.continuations import (
    Continuation,
    end_tokens,
    greedily,
    read_continuation,
)
from persona_nns.tracing.kv.cache import KVCache, read_cache
from persona_nns.tracing.prefixes import Prefilled
from persona_nns.tracing.residuals import stack_layers
from persona_nns.tracing.sandbox import entry
from persona_nns.tracing.window import Window


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

    @property
    def p_last(self) -> Tensor:
        """Its place in each row, [row]."""
        return self.n_prompt - 1 + self.window.start - self.window.padding

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


def run_clean(
    model: TransformersModel, prompts: Prefilled, n_tokens: int
) -> tuple[Continuation, CleanRun]:
    """What a model says to prompts, greedily, and the run in which it says it.

    Where all rows end early, the last columns were never run and hold zeros.
    """
    batch = left_pad(prompts.rows, device=model.device)
    kept = {"output_logits": True, "output_hidden_states": True, "return_dict_in_generate": True}
    with model.generate(batch.tokens, **greedily(prompts, n_tokens), **kept) as tracer:
        run = save(tracer.result)
    said = read_continuation(run.sequences, batch.width, n_tokens, end_tokens(model))
    steps = [torch.stack(step) for step in run.hidden_states]
    missing = n_tokens - len(steps)
    window = prompts.followed_by(said.ids[:, :-1])
    return said, CleanRun(
        window=window,
        n_prompt=steps[0].shape[2],
        logits=torch.nn.functional.pad(torch.stack(run.logits, dim=1), (0, 0, 0, missing)),
        residual=torch.nn.functional.pad(torch.cat(steps, dim=2), (0, 0, 0, missing)),
        cache=prompts.prefix and read_cache(run.past_key_values, window.attention_mask),
    )


def force(model: TransformersModel, prompts: Prefilled, said: Tensor) -> CleanRun:
    """Run prompts, and what is said to follow them, [row, token], as it stands.

    The distributions are those of p_last and of all that is said; no residual is read after the
    final norm.
    """
    window, n_said = prompts.followed_by(said), said.shape[1]
    with model.trace(window.inputs(), logits_to_keep=keep_last(n_said + 1)):
        residual = save([entry(model, layer).output for layer in range(len(model.layers))])
        cache = save(model.output.past_key_values)
        logits = save(model.output.logits)
    return CleanRun(
        window=window,
        n_prompt=window.input_ids.shape[1] - n_said,
        logits=logits,
        residual=stack_layers(residual),
        cache=prompts.prefix and read_cache(cache, window.attention_mask),
    )
