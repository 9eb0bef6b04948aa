"""Attention heads of prompts that are alike behind the persona, one's in place of the other's.

The passes that patch stand in `experiments/head_budget.py`. A cell is run at a time, so that no row
is padded: its prompts differ in length before the places, and are equally long in them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from nnsight import TransformersModel, save
from torch import Tensor

from persona_nns.prompts.twins import Twins
from persona_nns.tracing.attention import look_at, tell, weights_of
from persona_nns.tracing.continuations import say
from persona_nns.tracing.metrics import log_probabilities, summed_kl
from persona_nns.tracing.prefixes import Prefilled, prefill
from persona_nns.tracing.residuals import last_columns, stack_layers
from persona_nns.tracing.sandbox import entry
from persona_nns.tracing.window import Window, open_window


@dataclass(frozen=True)
class TwinRun:
    """A prompt of a cell, and what follows it, run as it is.

    Attributes:
        window: what is run behind the prefix.
        heads: of each block, [1, column, head × d_head], the output projection's input.
        predicted: log-probabilities, [1, token, vocabulary], of what follows.
        attention: [layer, head], to the persona, mean over the places.
    """

    window: Window
    heads: Sequence[Tensor]
    predicted: Tensor
    attention: Tensor


@dataclass(frozen=True)
class TwinRuns:
    """The two prompts of a cell, each followed by what is said to XY.

    Attributes:
        clean: XY.
        host: BY.
        n_places: last columns, of the same tokens in both.
    """

    clean: TwinRun
    host: TwinRun
    n_places: int

    @property
    def n_heads(self) -> int:
        """Attention heads of a block."""
        return self.clean.attention.shape[1]

    @property
    def none(self) -> Tensor:
        """KL from the clean run with nothing patched."""
        return self.kl(self.host.predicted)[0]

    def kl(self, predicted: Tensor) -> Tensor:
        """KL from the clean run, [row], of log-probabilities [row, token, vocabulary]."""
        clean = self.clean.predicted
        scored = torch.ones(clean.shape[:2], dtype=torch.bool, device=clean.device)
        return summed_kl(clean, predicted, scored)

    def patch(self, own: Tensor, layer: int, heads: Tensor) -> Tensor:
        """A block's heads with some of them as in the clean run, [row, column, head × d_head].

        Args:
            own: what they are otherwise, of as many rows, or one.
            layer: of the block.
            heads: [row, head], which are patched.
        """
        width = own.shape[1]
        is_place = torch.arange(width, device=own.device) >= width - self.n_places
        feature = heads.to(own.device).repeat_interleave(own.shape[2] // heads.shape[1], dim=1)
        clean = last_columns(self.clean.heads[layer], width)
        return torch.where(is_place[:, None] & feature[:, None], clean, own)


def run_twins(
    model: TransformersModel, twins: Sequence[Twins], n_eval: int, *, reuse: bool
) -> dict[str, TwinRuns]:
    """Both runs of every cell, by its label; of one without places none.

    Args:
        model: from `load_model`.
        twins: the prompts of the cells.
        n_eval: tokens that are said to XY.
        reuse: run what stands before the places once; False runs whole rows.
    """
    twins = [of for of in twins if of.n_shared]
    if not twins:
        return {}
    said = say(model, Prefilled([of.clean for of in twins], None), n_eval)
    said.warn_if_short([of.label for of in twins], n_eval)
    rows = [ids for of in twins for ids in (of.clean, of.host)]
    stops = [-of.n_shared for of in twins for _ in range(2)]
    before = prefill(
        model, [ids[:stop] for ids, stop in zip(rows, stops, strict=True)], reuse=reuse
    )
    runs: dict[str, TwinRuns] = {}
    for k, of in enumerate(twins):
        length = int(said.length[k])  # the end token is predicted, and not run
        places = of.n_shared + length - 1
        both: list[TwinRun] = []
        for row in (2 * k, 2 * k + 1):
            prefix = before and before.rows(torch.tensor([row], device=model.device))
            window = open_window([rows[row]], said.ids[k : k + 1, : length - 1], prefix)
            both.append(_run_one(model, window, of.persona, places, length, reuse=reuse))
        runs[of.label] = TwinRuns(both[0], both[1], places)
    return runs


def _run_one(
    model: TransformersModel,
    window: Window,
    persona: range,
    n_places: int,
    n_scored: int,
    *,
    reuse: bool,
) -> TwinRun:
    """Run a prompt as it is, and keep what its heads put out and look at."""
    width = window.input_ids.shape[1]
    asking = torch.arange(width - n_places, width, device=model.device)[None]
    told = tell(model, window)
    entering, looks, heads, weights = [], [], [], []
    with model.trace(window.inputs(cached=True), logits_to_keep=n_scored):
        for layer, block in enumerate(model.layers):
            entering.append(entry(model, layer).output)
            look, mixed, _ = look_at(block.attn, asking, told[layer])
            looks.append(look)
            heads.append(mixed)
        predicted = save(log_probabilities(model.output.logits))
        cached = model.output.past_key_values.layers
        for block, look, held in zip(model.layers, looks, cached, strict=True):
            seen = weights_of(block.attn, look, held)[0, ..., persona.start : persona.stop]
            weights.append(seen.float().sum(-1).mean(-1))
        attention = save(stack_layers(weights))
        save((entering, heads))
    clean = stack_layers(entering) if reuse else None
    return TwinRun(replace(window, clean=clean), heads, predicted, attention)
