"""The turns of a conversation: which tokens of the rendered chat each message is.

The messages are rendered once more with a mark in place of each text. That tells what the template
puts around them, so that it does not matter whether two texts are equal, or a text stands in the
template too. Runs on servers as well, where a model's own answers are rendered.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from persona_nns.errors import PersonaError, UsageError
from persona_nns.prompts.templates import apply_template, takes_system_role

#: What stands in place of the k-th message while it is looked where a template shows it.
_MARK = "turn{}mark0417"
_MARKS = re.compile(_MARK.format(r"(\d+)"))

Messages = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class RenderedChat:
    """A rendered conversation.

    Attributes:
        ids: its token ids.
        turns: of each message, the tokens from the first to the last whose first character that is
            no white space lies in its text; empty where it has no text.
        speakers: of each message.
    """

    ids: tuple[int, ...]
    turns: tuple[range, ...]
    speakers: tuple[str, ...]

    @property
    def windows(self) -> list[range]:
        """Of each answer, from the token before its first to its last; of other turns, none."""
        return [
            range(max(turn.start - 1, 0), turn.stop)
            if turn and speaker == "assistant"
            else range(0)
            for turn, speaker in zip(self.turns, self.speakers, strict=True)
        ]


def render_turns(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    system: str | None = None,
    header: bool = False,
) -> RenderedChat:
    """Render a conversation in the model's template, and find its turns.

    Where the template has no system role the system text and a blank line open the first user
    message.

    Args:
        tokenizer: the model's.
        messages: role (system, user or assistant) and text of each.
        system: a system text in place of a first system message, or in front of all others. It is
            no turn; the message in whose place it stands is an empty one.
        header: let the generation header follow.

    Raises:
        UsageError: the model has no chat template, or one that refuses the messages.
        PersonaError: the template does not show a text as it is, or the tokenizer reports no
            character offsets.
    """
    if system is not None:
        own = messages[0][0] == "system"
        chat = render_turns(tokenizer, [("system", system), *messages[own:]], header=header)
        turns = (*[range(0)] * own, *chat.turns[1:])
        return RenderedChat(chat.ids, turns, tuple(role for role, _ in messages))
    folds = messages[0][0] == "system" and not takes_system_role(tokenizer)
    text = apply_template(tokenizer, _shown(messages, folds=folds), header=header)
    marked = [
        (role, _MARK.format(k) if content.strip() else content)
        for k, (role, content) in enumerate(messages)
    ]
    template = apply_template(tokenizer, _shown(marked, folds=folds), header=header)
    places = _places(template, text, [content for _, content in messages])
    if not tokenizer.is_fast:
        raise PersonaError(
            "The tokenizer reports no character offsets; convert it to a fast tokenizer "
            "(a tokenizer.json file) so that turns can be found."
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    firsts = [_first_character(text, *offsets) for offsets in encoded["offset_mapping"]]
    turns = tuple(_tokens_in(firsts, places.get(k)) for k in range(len(messages)))
    return RenderedChat(tuple(encoded["input_ids"]), turns, tuple(role for role, _ in messages))


def render_talks(
    tokenizer: PreTrainedTokenizerBase, talks: Sequence[Messages], system: str | None
) -> tuple[list[RenderedChat], list[RenderedChat]]:
    """Conversations as they are, and with a system text; none of these without one."""
    chats = [render_turns(tokenizer, talk) for talk in talks]
    if system is None:
        return chats, []
    return chats, [render_turns(tokenizer, talk, system=system) for talk in talks]


def check_same_turns(chats: Sequence[RenderedChat], told: Sequence[RenderedChat]) -> None:
    """See that the turns of conversations have the same tokens under a system text, if at all.

    Raises:
        PersonaError: one has others.
    """
    for chat, with_text in zip(chats if told else [], told, strict=True):
        for turn, again in zip(chat.turns, with_text.turns, strict=True):
            ids = chat.ids[turn.start : turn.stop]
            if again and ids != with_text.ids[again.start : again.stop]:
                raise PersonaError(
                    "The chat template gives what follows a system text other tokens; pass one "
                    "that does not (--template FILE)."
                )


def _shown(messages: Messages, *, folds: bool) -> list[dict[str, str]]:
    """What the template is given.

    Raises:
        UsageError: there is no user message that the system text could open.
    """
    shown = [{"role": role, "content": content} for role, content in messages]
    if not folds:
        return shown
    system, *others = shown
    first = next((message for message in others if message["role"] == "user"), None)
    if first is None:
        raise UsageError(
            "The chat template has no system role, and no user's message follows that the system "
            "text could open; give the conversation a user's turn."
        )
    first["content"] = f"{system['content']}\n\n{first['content']}"
    return others


def _places(template: str, text: str, contents: Sequence[str]) -> dict[int, tuple[int, int]]:
    """Where each text stands, without the white space around it: start and stop, by message.

    Many templates (Llama-3's, Gemma's) leave out white space around a message, or some of it.
    Where one shows a message several times, the last one counts.

    Raises:
        PersonaError: the rendered text is not the template with the texts in place of the marks.
    """
    pieces = _MARKS.split(template)  # what the template has, and numbers of marks, in turn
    order = list(map(int, pieces[1::2]))
    missing = [k for k, content in enumerate(contents) if content.strip() and k not in order]
    pattern = re.escape(pieces[0])
    for k, after in zip(order, pieces[2::2], strict=True):
        content = contents[k]
        core = content.strip()
        start = content.index(core)
        before, behind = content[:start], content[start + len(core) :]
        ends = "|".join(re.escape(before[n:]) for n in range(len(before) + 1))
        begins = "|".join(re.escape(behind[:n]) for n in range(len(behind), -1, -1))
        pattern += f"(?:{ends})({re.escape(core)})(?:{begins}){re.escape(after)}"
    found = None if missing else re.fullmatch(pattern, text)
    if found is None:
        k = missing[0] if missing else _changed(contents, text)
        raise PersonaError(
            f"The chat template does not show message {k}, {contents[k]!r}, as it is, so its "
            "tokens cannot be found; pass a template that does (--template FILE)."
        )
    return {k: found.span(place) for place, k in enumerate(order, start=1)}


def _changed(contents: Sequence[str], text: str) -> int:
    """The first message whose text is not to be seen, or else the first of all."""
    return next((k for k, content in enumerate(contents) if content.strip() not in text), 0)


def _first_character(text: str, start: int, stop: int) -> int | None:
    """Where a token's first character stands that is no white space; None without one."""
    piece = text[start:stop].lstrip()
    return stop - len(piece) if piece else None


def _tokens_in(firsts: Sequence[int | None], place: tuple[int, int] | None) -> range:
    if place is None:
        return range(0)
    start, stop = place
    inside = [
        token for token, first in enumerate(firsts) if first is not None and start <= first < stop
    ]
    return range(inside[0], inside[-1] + 1) if inside else range(0)
