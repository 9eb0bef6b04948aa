"""Neutral text in a prompt, so that it is as long as another one.

Padding is counted in tokens: a text is rendered where it is to stand, and as many of its tokens
are kept as are missing. The last word of it may be cut short.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from persona_nns.prompts.grids import Cell
from persona_nns.prompts.render import Prompt, Span, render

#: What hosts are padded with: nothing about a person, a task or a manner of speaking.
NEUTRAL = "on an ordinary day at an ordinary place, with the usual things to see and to do,"


@dataclass(frozen=True)
class PaddedPrompt:
    """A host prompt with neutral text.

    Attributes:
        prompt: the padded prompt; as it was where nothing could be put in.
        n_neutral: how many tokens were put in; -1 where the host is the longer one.
    """

    prompt: Prompt
    n_neutral: int


def pad_persona(
    tokenizer: PreTrainedTokenizerBase, cell: Cell, host: Prompt, target: Prompt, text: str
) -> PaddedPrompt:
    """Continue the host's persona with a text until it has as many tokens as the target's.

    Args:
        tokenizer: the model's.
        cell: whose prompts they are.
        host: the prompt BY.
        target: the prompt XY.
        text: repeated as often as needed.
    """
    persona = host.spans["persona"]
    missing = len(target.spans["persona"]) - len(persona)
    if missing <= 0:
        return PaddedPrompt(host, 0 if missing == 0 else -1)
    longer = " ".join([cell.baseline_persona_text, *[text] * missing])
    stop = persona.stop + missing
    begin = render(tokenizer, longer, cell.task_text, cell.frame).ids[:stop]
    spans: dict[Span, range] = {**host.spans, "persona": range(persona.start, stop)}
    return _join(tokenizer, begin, host, persona.stop, spans)


def pad_total(
    tokenizer: PreTrainedTokenizerBase, cell: Cell, host: Prompt, target: Prompt, text: str
) -> PaddedPrompt:
    """Open the message that holds the persona with a text, so that host and target are as long.

    Everything from "As" on (in the frame ``role``) then stands as far from the start as in the
    target. Arguments as for `pad_persona`.
    """
    missing = len(target) - len(host)
    if missing <= 0:
        return PaddedPrompt(host, 0 if missing == 0 else -1)
    opened = cell.frame.opened_by_slot(cell.baseline_persona_text)
    before = render(tokenizer, " ".join([text] * missing), cell.task_text, opened)
    head = before.spans["prefix"].stop
    return _join(tokenizer, before.ids[: head + missing], host, head, host.spans)


def _join(
    tokenizer: PreTrainedTokenizerBase,
    begin: tuple[int, ...],
    host: Prompt,
    kept_from: int,
    spans: Mapping[Span, range],
) -> PaddedPrompt:
    """A beginning, and what the host has from a token on; spans after it move along."""
    ids = (*begin, *host.ids[kept_from:])
    added = len(ids) - len(host)

    def moved(span: range) -> range:
        return range(span.start + added, span.stop + added) if span.start >= kept_from else span

    moved_spans: dict[Span, range] = {name: moved(span) for name, span in spans.items()}
    prefix = range(moved_spans["persona"].start)
    return PaddedPrompt(
        Prompt(
            text=str(tokenizer.decode(list(ids))),
            ids=ids,
            spans={**moved_spans, "prefix": prefix},
            user_last=None if host.user_last is None else host.user_last + added,
        ),
        added,
    )
