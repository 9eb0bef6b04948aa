"""The turns of rendered conversations in batches: means over them, windows of them, their scores.

An assistant's turn with content tokens [p, q) has the *window* [p − 1, q): the tokens that are
steered, from the one before its first to its last. What is read of a stream runs inside tracing
contexts and may run on a server: torch and builtins only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from persona_nns.prompts.turns import RenderedChat
from persona_nns.tracing.batches import Batch, similar_rows
from persona_nns.tracing.kv.cache import KVCache
from persona_nns.tracing.metrics import summed_kl


def marked_tokens(batch: Batch, spans: Sequence[Sequence[range]]) -> Tensor:
    """Which tokens of a batch lie in one of their row's spans, [row, column], 1 or 0."""
    marks = torch.zeros(batch.input_ids.shape)
    for row, (of_row, padding) in enumerate(zip(spans, batch.padding.tolist(), strict=True)):
        for span in of_row:
            marks[row, padding + span.start : padding + span.stop] = 1.0
    return marks.to(batch.input_ids.device)


def turn_weights(batch: Batch, turns: Sequence[Sequence[range]], n_turns: int) -> Tensor:
    """What each token weighs in the mean over each turn.

    Args:
        batch: of conversations.
        turns: content tokens of each row's turns.
        n_turns: how many turns there are places for.

    Returns:
        [row, turn, column]; a turn's weights sum to one, and are zero where it has no tokens.
    """
    weights = torch.zeros(len(turns), n_turns, batch.width)
    for row, (of_row, padding) in enumerate(zip(turns, batch.padding.tolist(), strict=True)):
        for turn, span in enumerate(of_row):
            if span:
                weights[row, turn, padding + span.start : padding + span.stop] = 1 / len(span)
    return weights.to(batch.input_ids.device)


def turn_projections(hidden: Tensor, directions: Tensor, weights: Tensor) -> Tensor:
    """Means over turns of a residual stream's projections.

    Args:
        hidden: [row, column, d_model].
        directions: d̂ [direction, d_model], of norm one, or zero.
        weights: [row, turn, column], from `turn_weights`.

    Returns:
        [row, turn, direction] in float32; NaN where a turn has no tokens.
    """
    directions, weights = directions.to(hidden.device), weights.to(hidden.device)
    counted = weights.any(1)[..., None]
    projected = torch.where(counted, hidden.float() @ directions.T, 0.0)
    means = weights @ projected
    return torch.where(weights.any(-1)[..., None], means, torch.nan)


@dataclass(frozen=True)
class Windows:
    """Windows of turns, each behind the cache of the tokens before it.

    They are padded on the right and what is before them on the left, so that the columns of a row
    stay as far apart as its tokens: a sliding window counts columns.

    Attributes:
        input_ids: [row, column].
        attention_mask: [row, column of the cache + column].
        position_ids: [row, column].
        inside: [row, column], 1 on the tokens of the window.
        target: [row, column], the token that each token but the last has to foretell.
        before: caches of the earlier tokens; None where no row has any.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    inside: Tensor
    target: Tensor
    before: KVCache | None

    @property
    def inputs(self) -> dict[str, Any]:
        """What a trace needs to run them; a new cache each time."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "past_key_values": None if self.before is None else self.before.cache(),
            "use_cache": self.before is not None,
        }

    @property
    def scored(self) -> Tensor:
        """Which tokens foretell a content token, all but the last, [row, column − 1]."""
        return self.inside[:, 1:] > 0


def open_windows(
    cache: KVCache, chats: Sequence[RenderedChat], places: Sequence[tuple[int, int]]
) -> Windows:
    """Windows of answers behind what a cache holds of the tokens before them.

    Args:
        cache: of the conversations, a row each.
        chats: the conversations.
        places: of each window, its conversation and its turn.
    """
    device = cache.attention_mask.device
    windows = [chats[row].windows[turn] for row, turn in places]
    start = torch.tensor([window.start for window in windows], device=device)
    length = torch.tensor([len(window) for window in windows], device=device)
    column = torch.arange(int(length.max()), device=device)
    rows = [
        [*chats[row].ids[window.start : window.stop], *[0] * (len(column) - len(window))]
        for (row, _), window in zip(places, windows, strict=True)
    ]
    padded = torch.tensor(rows, device=device)
    inside = (column < length[:, None]).long()
    before = None
    if int(start.max()):
        before = cache.begin(torch.tensor([row for row, _ in places], device=device), start)
    held = inside[:, :0] if before is None else before.attention_mask
    return Windows(
        input_ids=padded,
        attention_mask=torch.cat([held, inside], dim=1),
        # Padding stands where the last token does: a learned position has to exist.
        position_ids=start[:, None] + torch.minimum(column, length[:, None] - 1),
        inside=inside,
        target=padded[:, 1:],
        before=before,
    )


@dataclass(frozen=True)
class Spoken:
    """Conversations whose answers are scored, and what a pass without steering has left.

    Attributes:
        chats: the conversations.
        told: the same with the system text; none without one.
        clean: keys and values of the conversations.
        clean_told: of those with the system text.
    """

    chats: Sequence[RenderedChat]
    told: Sequence[RenderedChat]
    clean: KVCache
    clean_told: KVCache | None


def deal_answers(
    chats: Sequence[RenderedChat], n_vocabulary: int
) -> Iterator[list[tuple[int, int]]]:
    """The answers that can be scored, by conversation and turn, in passes that fit.

    Args:
        chats: the conversations.
        n_vocabulary: tokens that the model knows: of each scored token there are as many numbers.
    """
    places = [
        (row, turn)
        for row, chat in enumerate(chats)
        for turn, window in enumerate(chat.windows)
        if window and chat.turns[turn].start > 0  # nothing foretells a first token
    ]
    windows = [chats[row].windows[turn] for row, turn in places]
    # A token's distribution weighs as much as the keys and values of many.
    for some in similar_rows(
        [max(each.stop, len(each) * n_vocabulary // 4096) for each in windows]
    ):
        yield [places[k] for k in some]


def window_logprob(windows: Windows, logprobs: Tensor) -> Tensor:
    """Log-probability of each window's content tokens, summed, [row], in nats.

    Args:
        windows: the windows.
        logprobs: [row, column, vocabulary], of a pass over them.
    """
    said = logprobs[:, :-1].gather(-1, windows.target[..., None])[..., 0]
    return torch.where(windows.scored, said, 0.0).sum(-1)


def window_kl(windows: Windows, reference: Tensor, logprobs: Tensor) -> Tensor:
    """KL(reference ‖ another), summed over what foretells content tokens, [row], in nats.

    Args:
        windows: the windows.
        reference: [row, column, vocabulary], log-probabilities of a pass over them.
        logprobs: of another pass.
    """
    return summed_kl(reference[:, :-1], logprobs[:, :-1], windows.scored)
