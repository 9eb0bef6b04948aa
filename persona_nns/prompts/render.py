"""From texts to token ids: the prompts of a cell, the spans of a prompt, its positions.

A prompt is ``As {persona}, {task}`` as one user turn in the model's chat template, with the
generation header. It is tokenised as it stands, without special tokens being added again.
"""

import json
import warnings
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from jinja2.exceptions import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from persona_nns.errors import PersonaError, UsageError, first_line
from persona_nns.prompts.grids import Cell, PromptName, role_prompt
from persona_nns.prompts.pinned import PINNED, with_the_day

Span = Literal["prefix", "persona", "task", "tail"]
ROLE_PROMPTS: tuple[PromptName, ...] = ("BB", "XB", "BY", "XY")

# The text and a newline, for models without a chat template. The beginning-of-text token
# stands in front where the tokenizer itself would have put one (see `apply_template`).
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"

# Words in front of a text that name roles ("user", "start_header_id"), not a system text.
_ROLE_WORDS = 4


class TemplateError(UsageError):
    """A chat template does not take a conversation."""


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt.

    Attributes:
        text: the rendered text, template included.
        ids: its token ids.
        spans: the token range of each span. A token belongs to the span of its first
            non-space character; a token of spaces only goes with what follows. Without a
            persona the ``persona`` range is empty.
        user_last: index of the last token before the generation header, or None where the
            template renders the user turn differently without the header.
    """

    text: str
    ids: tuple[int, ...]
    spans: Mapping[Span, range]
    user_last: int | None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class RenderedCell(Cell):
    """A cell that carries its prompts, for a place that renders none itself."""

    prompts: Mapping[PromptName, Prompt] = field(default_factory=dict[PromptName, Prompt])


def with_prompts(tokenizer: PreTrainedTokenizerBase, cell: Cell) -> RenderedCell:
    """A cell with all its prompts, for a place that renders none itself."""
    texts = {part.name: getattr(cell, part.name) for part in fields(Cell)}
    return RenderedCell(**texts, prompts=render_cell(tokenizer, cell, (*ROLE_PROMPTS, "BARE")))


def render_cell(
    tokenizer: PreTrainedTokenizerBase, cell: Cell, names: Iterable[PromptName] = ROLE_PROMPTS
) -> dict[PromptName, Prompt]:
    """Render the prompts of a cell (by default BB, XB, BY and XY)."""
    if isinstance(cell, RenderedCell):
        return {name: cell.prompts[name] for name in names}
    return {name: render(tokenizer, *cell.texts(name)) for name in names}


def render(tokenizer: PreTrainedTokenizerBase, persona: str | None, task: str) -> Prompt:
    """Render ``As {persona}, {task}``, or the task alone where the persona is None.

    Raises:
        UsageError: the model has no chat template.
        PersonaError: the template does not show the text as it is, the tokenizer reports no
            character offsets, or has no token for the persona or the task.
    """
    content = role_prompt(persona, task)
    messages = [{"role": "user", "content": content}]
    text = apply_template(tokenizer, messages, header=True)
    turn = apply_template(tokenizer, messages, header=False)
    # A short text may stand in the generation header too, which comes after the user's turn.
    start, stop = find_shown(content, text[: len(turn)] if text.startswith(turn) else text)
    if start < 0:
        raise PersonaError(
            f"The chat template changes the prompt {content!r}, so its spans cannot be found; "
            "pass a template that shows the user's text as it is (--template FILE)."
        )
    if not tokenizer.is_fast:
        raise PersonaError(
            "The tokenizer reports no character offsets; convert it to a fast tokenizer "
            "(a tokenizer.json file) so that spans can be found."
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = _first_characters(text, encoded["offset_mapping"])
    persona_start = start + len("As ") if persona is not None else start
    task_start = persona_start + len(persona or "")
    bounds = [0, persona_start, task_start, stop]
    edges = [*(bisect_left(starts, bound) for bound in bounds), len(starts)]
    names: tuple[Span, ...] = ("prefix", "persona", "task", "tail")
    spans: dict[Span, range] = {name: range(edges[k], edges[k + 1]) for k, name in enumerate(names)}
    said: dict[Span, str | None] = {"persona": persona, "task": task}
    for name, words in said.items():
        if words is not None and not spans[name]:
            raise PersonaError(
                f"The {name} {words!r} has no token of its own in the rendered prompt {text!r}; is "
                "this the model's own tokenizer?"
            )
    return Prompt(
        text=text,
        ids=tuple(encoded["input_ids"]),
        spans=spans,
        user_last=_user_last(text, turn, encoded["offset_mapping"]),
    )


def find_shown(content: str, text: str) -> tuple[int, int]:
    """Where a text stands in a rendered prompt, start and stop; both −1 where it does not.

    Many templates (Llama-3's, Gemma's) leave out the white space around it.
    """
    for shown in (content, content.strip()):
        start = text.rfind(shown)
        if start >= 0:
            return start, start + len(shown)
    return -1, -1


def tokens_between(tokenizer: PreTrainedTokenizerBase, text: str, start: int, stop: int) -> range:
    """The tokens of a rendered text whose first non-space character is start … stop − 1."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = _first_characters(text, encoded["offset_mapping"])
    return range(bisect_left(starts, start), bisect_left(starts, stop))


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, header: bool
) -> str:
    """The text of a conversation, with or without the generation header.

    Raises:
        UsageError: the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise UsageError(
            f"The model {tokenizer.name_or_path!r} has no chat template; "
            "pass --template plain, or --template FILE with one."
        )
    try:
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=with_the_day(tokenizer.get_chat_template()),
            tokenize=False,
            add_generation_prompt=header,
            **PINNED,
        )
    except TemplateSyntaxError as error:
        raise UsageError(
            f"The chat template is not Jinja ({first_line(error)}); pass another with --template."
        ) from error
    except Exception as error:  # whatever a template does with what it is not given
        roles = ", ".join(message["role"] for message in messages)
        raise TemplateError(
            f"The chat template of {tokenizer.name_or_path!r} fails on messages of {roles} "
            f"({type(error).__name__}: {first_line(error)}); pass another with --template."
        ) from error
    assert isinstance(text, str)
    if tokenizer.chat_template == PLAIN_TEMPLATE and adds_bos(tokenizer):
        return f"{tokenizer.bos_token}{text}"
    return text


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """See that a chat template gives the same text each time, and tell what it puts in front.

    Warns of a beginning-of-text token that the tokenizer would have put and the template does
    not, and of a system text of the template's own.

    Raises:
        UsageError: the template fails, or does not give the same text twice.
    """
    if tokenizer.chat_template is None:
        return
    probe = "A probe of the template."
    messages = [{"role": "user", "content": probe}]
    texts = {apply_template(tokenizer, messages, header=True) for _ in range(16)}
    if len(texts) > 1:
        raise UsageError(
            f"The chat template of {tokenizer.name_or_path!r} gives another text each time, so "
            "no number could be measured again; pass another with --template."
        )
    (text,) = texts
    bos = tokenizer.bos_token
    if adds_bos(tokenizer) and not text.startswith(str(bos)):
        warnings.warn(
            f"The chat template does not begin with {bos!r}, which the tokenizer puts in front of "
            "a text: the model may have been trained with it.",
            stacklevel=2,
        )
    own = text.partition(probe)[0]
    for special in tokenizer.all_special_tokens:
        own = own.replace(special, " ")
    if len(own.split()) > _ROLE_WORDS:
        warnings.warn(
            f"The chat template puts a text of its own before every prompt: "
            f"{' '.join(own.split())!r}.",
            stacklevel=2,
        )


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token with which the chat template ends an answer; None where it has none."""
    if tokenizer.chat_template is None:
        return None
    answer = "An answer to the probe."
    messages = [
        {"role": "user", "content": "A probe of the template."},
        {"role": "assistant", "content": answer},
    ]
    _, _, after = apply_template(tokenizer, messages, header=False).rpartition(answer)
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((id_ for id_ in ids[:1] if id_ in special), None)


def read_template(template: str | Path) -> str:
    """The template that ``--template`` names: ``plain``, or the text of a Jinja file.

    Raises:
        UsageError: the file cannot be read.
    """
    if template == "plain":
        return PLAIN_TEMPLATE
    try:
        text = Path(template).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"The template {str(template)!r} cannot be read ({error}); "
            "use 'plain' or the path of a Jinja file."
        ) from error
    if _is_json(text) or "messages" not in text:
        what = "JSON" if _is_json(text) else "a text that shows no messages"
        raise UsageError(
            f"The template {str(template)!r} is {what}, not a Jinja chat template; put the "
            "template alone into a file."
        )
    return text


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts a beginning-of-text token in front of a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def _first_characters(text: str, offsets: list[tuple[int, int]]) -> list[int]:
    """For each token, where its first non-space character stands.

    Byte-level tokens carry the space before a word, so the raw start of a word's token lies
    in what precedes it. A token of spaces only takes the place of the token that follows.
    """
    firsts: list[int] = []
    following = len(text)
    for start, end in reversed(offsets):
        piece = text[start:end]
        stripped = piece.lstrip()
        following = end - len(stripped) if stripped else min(following, len(text))
        firsts.append(following)
    return firsts[::-1]


def _user_last(text: str, turn: str, offsets: list[tuple[int, int]]) -> int | None:
    if not text.startswith(turn):
        return None
    return sum(start < len(turn) for start, _ in offsets) - 1
