"""A model's own answers to what a user says turn after turn, each after the ones before.

Each turn the conversation so far is rendered anew, with the generation header. What an operation
does is a matter of tokens: it acts at the windows of earlier answers, or not, and from the last
token of the prompt on, or not. Of what has been run before, the keys and values of the first tokens
are kept that are the same, with the operation where it is to be: so nothing depends on them being
kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from nnsight import TransformersModel
from torch import Tensor
from transformers import Cache, DynamicCache

from persona_nns.prompts.turns import Messages, render_turns
from persona_nns.tracing.batches import Batch, left_pad
from persona_nns.tracing.continuations import Continuation, end_tokens, read_continuation
from persona_nns.tracing.kv.cache import KVCache, read_cache
from persona_nns.tracing.turns import marked_tokens

# Of a conversation that has been run: its tokens, each with whether the operation acted there.
_Run = list[tuple[int, bool]]


@dataclass(frozen=True)
class Acts:
    """Where an operation acts while a model answers.

    Attributes:
        earlier: at the windows of earlier answers.
        now: in the window of this answer: from the last token of the prompt on.
    """

    earlier: bool
    now: bool


@dataclass(frozen=True)
class Held:
    """What has been run of some conversations.

    Attributes:
        cache: keys and values, a row a conversation.
        runs: of each conversation, by its number: its row of the cache, and what that holds.
    """

    cache: KVCache
    runs: dict[int, tuple[int, _Run]]


@dataclass(frozen=True)
class Opened:
    """Conversations that are to be answered.

    Attributes:
        which: their numbers.
        batch: the conversations so far, with the generation header.
        prefix: what is kept of their first columns; None where nothing is.
        marks: [row, column], 1 where the operation acts.
        acts: where it acts.
        reuse: keep keys and values from step to step.
    """

    which: Sequence[int]
    batch: Batch
    prefix: KVCache | None
    marks: Tensor
    acts: Acts
    reuse: bool

    def settings(self, max_new_tokens: int) -> dict[str, Any]:
        """What ``generate`` takes beside the tokens: the likeliest token at each step."""
        cache = DynamicCache() if self.prefix is None else self.prefix.cache()
        return {
            # Without a configuration, so that layers with a sliding window keep every column.
            "past_key_values": cache if self.reuse else None,
            "use_cache": self.reuse,
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "num_beams": 1,
            "return_dict_in_generate": True,
        }

    def acting(self, step: int) -> Tensor:
        """Where the operation acts in what is run at a step, [row, column], 1 or 0."""
        now = float(self.acts.now) * torch.ones_like(self.marks[:, :1])
        if not self.reuse:  # what was said before runs again
            return torch.cat([self.marks, now.expand(-1, step)], dim=1)
        first = 0 if self.prefix is None else self.prefix.width
        return self.marks[:, first:] if step == 0 else now

    def read(
        self, model: TransformersModel, sequences: Tensor, cache: Cache | None, max_new_tokens: int
    ) -> tuple[Continuation, Held | None]:
        """What was said, and what has been run now.

        Args:
            model: that has said it.
            sequences: [row, column], prompts and answers.
            cache: what the model has kept.
            max_new_tokens: the longest answer.
        """
        width = self.batch.width
        said = read_continuation(sequences, width, max_new_tokens, end_tokens(model))
        if cache is None or not self.reuse:
            return said, None
        grown = torch.nn.functional.pad(
            self.batch.attention_mask, (0, sequences.shape[1] - width), value=1
        )
        held = read_cache(cache, grown)
        runs: dict[int, tuple[int, _Run]] = {}
        tokens, marked = sequences.tolist(), (self.marks > 0).tolist()
        padding, length = self.batch.padding.tolist(), said.length.tolist()
        for row, number in enumerate(self.which):
            n_said = min(length[row], held.width - width)
            ids = tokens[row][padding[row] : width + n_said]
            marks = [*marked[row][padding[row] :], *[self.acts.now] * n_said]
            runs[number] = row, list(zip(ids, marks, strict=True))
        return said, Held(held, runs)


Answer = Callable[[Opened], tuple[Continuation, Held | None]]


def converse(
    model: TransformersModel,
    scripts: Sequence[Sequence[str]],
    answer: Answer,
    acts: Acts,
    *,
    system: str | None = None,
    reuse: bool,
) -> list[list[tuple[str, str]]]:
    """Let a model answer what a user says, turn after turn.

    Args:
        model: from `load_model`.
        scripts: the user's texts of each conversation.
        answer: says what the model says to opened conversations.
        acts: where the operation acts.
        system: a system text in front of each conversation.
        reuse: keep keys and values.

    Returns:
        The messages of each conversation, without the system text.
    """
    talks: list[list[tuple[str, str]]] = [[] for _ in scripts]
    held: Held | None = None
    for turn in range(max(map(len, scripts))):
        which = [number for number, script in enumerate(scripts) if turn < len(script)]
        for number in which:
            talks[number].append(("user", scripts[number][turn]))
        asked = [talks[number] for number in which]
        opened = open_answers(model, which, asked, held, acts, system=system, reuse=reuse)
        said, held = answer(opened)
        for number, text in zip(which, said.texts(model.tokenizer), strict=True):
            talks[number].append(("assistant", text))
    return talks


def answers_of(talk: Messages, n_turns: int) -> list[str]:
    """The model's texts by turn; empty where another speaks, and behind the last turn."""
    said = [text if role == "assistant" else "" for role, text in talk]
    return [*said, *[""] * (n_turns - len(said))]


def open_answers(
    model: TransformersModel,
    which: Sequence[int],
    talks: Sequence[Messages],
    held: Held | None,
    acts: Acts,
    *,
    system: str | None = None,
    reuse: bool,
) -> Opened:
    """Conversations to be answered, behind what has been run of them.

    Args:
        model: from `load_model`.
        which: their numbers.
        talks: their messages, the user's last.
        held: what has been run before.
        acts: where the operation acts.
        system: a system text in front of each conversation.
        reuse: keep keys and values.
    """
    rows: list[tuple[int, ...]] = []
    spans: list[list[range]] = []
    for messages in talks:
        chat = render_turns(model.tokenizer, messages, system=system, header=True)
        last = range(len(chat.ids) - 1, len(chat.ids))
        spans.append([*(chat.windows if acts.earlier else []), *([last] if acts.now else [])])
        rows.append(chat.ids)
    batch = left_pad(rows, device=model.device)
    marks = marked_tokens(batch, spans)
    prefix = None
    if held is not None and reuse:
        prefix = _kept(batch, marks, which, held)
    return Opened(which, batch, prefix, marks, acts, reuse)


def _kept(batch: Batch, marks: Tensor, which: Sequence[int], held: Held) -> KVCache | None:
    """What has been run of the first columns of a batch, equally many columns of each row."""
    left: list[int] = []
    tokens, marked = batch.input_ids.tolist(), (marks > 0).tolist()
    padding = batch.padding.tolist()
    for row, number in enumerate(which):
        begin = padding[row]
        wanted = zip(tokens[row][begin:], marked[row][begin:], strict=True)
        pairs = zip(wanted, held.runs[number][1], strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        left.append(max(batch.width - begin - same, 1))  # the last token has to be run
    before = batch.width - max(left)
    if before <= min(padding):
        return None
    index = torch.tensor([held.runs[number][0] for number in which], device=marks.device)
    return held.cache.begin(index, before - batch.padding)
