"""From texts to token ids: the prompts of a cell, the spans of a prompt, its positions.

A prompt is a frame, by default ``As {persona}, {task}`` as one user turn, in the model's chat
template with the generation header. It is tokenised as it stands, without special tokens being
added again.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Literal, get_args

from transformers import PreTrainedTokenizerBase

from persona_nns.declarations.plans import ShownPrompt
from persona_nns.errors import PersonaError
from persona_nns.prompts.frames import ROLE, Frame, without_system_role
from persona_nns.prompts.grids import Cell, PromptName
from persona_nns.prompts.slots import PERSONA_MARK, TASK_MARK, Slots, find_slots
from persona_nns.prompts.templates import (
    TemplateError,
    apply_template,
    find_shown,
    takes_system_role,
)

Span = Literal["prefix", "persona", "task", "tail"]
_TOGETHER = 256  # prompts that are tokenised at a time
ROLE_PROMPTS: tuple[PromptName, ...] = ("BB", "XB", "BY", "XY")


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
        ends: where each token ends in the text; a prompt that travels does without.
    """

    text: str
    ids: tuple[int, ...]
    spans: Mapping[Span, range]
    user_last: int | None
    ends: tuple[int, ...] = field(default=(), compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def shown(self) -> ShownPrompt:
        """What a reader sees of it."""
        stops = tuple(self.spans[name].stop for name in get_args(Span))
        return ShownPrompt(self.text, self.ends, stops, self.user_last)


@dataclass(frozen=True)
class RenderedCell(Cell):
    """A cell that carries its prompts, for a place that renders none itself."""

    prompts: Mapping[PromptName, Prompt] = field(default_factory=dict[PromptName, Prompt])


def with_prompts(tokenizer: PreTrainedTokenizerBase, cell: Cell) -> RenderedCell:
    """A cell with all its prompts, for a place that renders none itself."""
    texts = {part.name: getattr(cell, part.name) for part in fields(Cell)}
    names = prompt_names(tokenizer, cell.frame)
    rendered = render_cell(tokenizer, cell, names)
    prompts: dict[PromptName, Prompt] = {
        name: replace(prompt, ends=()) for name, prompt in rendered.items()
    }
    return RenderedCell(**texts, prompts=prompts)


def render_cell(
    tokenizer: PreTrainedTokenizerBase, cell: Cell, names: Iterable[PromptName] = ROLE_PROMPTS
) -> dict[PromptName, Prompt]:
    """Render the prompts of a cell (by default BB, XB, BY and XY)."""
    return render_cells(tokenizer, [cell], names)[0]


def render_cells(
    tokenizer: PreTrainedTokenizerBase,
    cells: Sequence[Cell],
    names: Iterable[PromptName] = ROLE_PROMPTS,
) -> list[dict[PromptName, Prompt]]:
    """Render the prompts of some cells, each distinct one once.

    Raises:
        PersonaError: a cell that brings its prompts lacks one of them (BARE: see `prompt_names`).
    """
    names = tuple(names)
    asked = {cell.frame for cell in cells if not isinstance(cell, RenderedCell)}
    frames = {frame: FramedTemplate.of(tokenizer, frame) for frame in asked}
    for frame, of_frame in frames.items():
        framed = [c for c in cells if not isinstance(c, RenderedCell) and c.frame == frame]
        of_frame.render_all(cell.texts(name) for cell in framed for name in names)
    rendered: list[dict[PromptName, Prompt]] = []
    for cell in cells:
        if not isinstance(cell, RenderedCell):
            of_frame = frames[cell.frame]
            rendered.append({name: of_frame.render(*cell.texts(name)) for name in names})
        elif missing := [name for name in names if name not in cell.prompts]:
            raise PersonaError(
                f"The chat template does not take the prompt {', '.join(missing)} of "
                f"{cell.label!r}, what is left of its frame without the persona; use another frame."
            )
        else:
            rendered.append({name: cell.prompts[name] for name in names})
    return rendered


def prompt_names(tokenizer: PreTrainedTokenizerBase, frame: Frame) -> tuple[PromptName, ...]:
    """The prompts that a cell has in a frame: BARE only where the template takes it.

    Without the message that holds the persona a conversation may begin with an answer, which some
    templates refuse.
    """
    try:
        messages = FramedTemplate.of(tokenizer, frame).messages(None, "A probe of the template.")
        apply_template(tokenizer, messages, header=True)
    except TemplateError:
        return ROLE_PROMPTS
    return (*ROLE_PROMPTS, "BARE")


def render(
    tokenizer: PreTrainedTokenizerBase, persona: str | None, task: str, frame: Frame = ROLE
) -> Prompt:
    """Render a persona and a task in a frame, or the task alone where the persona is None.

    Raises:
        UsageError: the model has no chat template, or one that does not take the messages.
        PersonaError: the template does not show the texts as they are, the tokenizer reports no
            character offsets, or has no token for the persona or the task.
    """
    return FramedTemplate.of(tokenizer, frame).render(persona, task)


@dataclass(frozen=True)
class _Marked:
    """What a template makes of marks in place of the texts.

    Attributes:
        text: with the generation header.
        header: the generation header; None where the text without it is no beginning of it.
    """

    text: str
    header: str | None


@dataclass(frozen=True)
class FramedTemplate:
    """A frame in the chat template of a model, where each pair of texts is rendered once.

    Attributes:
        tokenizer: the model's.
        frame: the frame.
        opens_user_message: whether the system text opens the first user message, because the
            template has no system role.
    """

    tokenizer: PreTrainedTokenizerBase
    frame: Frame
    opens_user_message: bool
    _known: dict[tuple[str | None, str], Prompt] = field(
        default_factory=dict[tuple[str | None, str], Prompt], repr=False
    )
    _marked: dict[bool, _Marked] = field(default_factory=dict[bool, _Marked], repr=False)
    # One object for each number that stands in any prompt: of many they take most of the memory.
    _numbers: dict[int, int] = field(default_factory=dict[int, int], repr=False)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, frame: Frame) -> "FramedTemplate":
        """A frame in the template of a tokenizer."""
        without_role = frame.has_system_message and not takes_system_role(tokenizer)
        return cls(tokenizer, frame, without_role)

    def messages(self, persona: str | None, task: str) -> list[dict[str, str]]:
        """What the template is given; without the persona where that is None."""
        messages = self.frame.fill(persona, task)
        if self.opens_user_message:
            messages = without_system_role(messages)
        return [{"role": message.role, "content": message.content} for message in messages]

    def render(self, persona: str | None, task: str) -> Prompt:
        """The prompt of a persona and a task, as the function `render` documents it."""
        pair = persona, task
        self.render_all([pair])
        return self._known[pair]

    def render_all(self, pairs: Iterable[tuple[str | None, str]]) -> None:
        """Render pairs of texts ahead of `render`: many are tokenised faster together."""
        missing = [pair for pair in dict.fromkeys(pairs) if pair not in self._known]
        for start in range(0, len(missing), _TOGETHER):
            together = missing[start : start + _TOGETHER]
            shown = [self._show(*pair) for pair in together]
            encoded = self.tokenizer(
                [text for text, _ in shown], add_special_tokens=False, return_offsets_mapping=True
            )
            tokens = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            for pair, (text, slots), (ids, offsets) in zip(together, shown, tokens, strict=True):
                self._known[pair] = self._prompt(*pair, text, slots, ids, offsets)

    def _show(self, persona: str | None, task: str) -> tuple[str, Slots]:
        """What the template makes of two texts, and where they stand in it."""
        messages = self.messages(persona, task)
        text = apply_template(self.tokenizer, messages, header=True)
        contents = [message["content"] for message in messages]
        marked = self._mark(bare=persona is None)
        slots = find_slots(marked.text, text, persona or "", task)
        # What a template does to the frame's own texts, it does to them between marks too.
        if slots is None or any(find_shown(content, text)[0] < 0 for content in contents):
            asked = "\n\n".join(contents)
            raise PersonaError(
                f"The chat template changes the prompt {asked!r}, so its spans cannot be found; "
                "pass a template that shows the user's text as it is (--template FILE)."
            )
        if not self.tokenizer.is_fast:
            raise PersonaError(
                "The tokenizer reports no character offsets; convert it to a fast tokenizer "
                "(a tokenizer.json file) so that spans can be found."
            )
        return text, slots

    def _prompt(
        self,
        persona: str | None,
        task: str,
        text: str,
        slots: Slots,
        ids: Sequence[int],
        offsets: list[tuple[int, int]],
    ) -> Prompt:
        spans = _spans(_first_characters(text, offsets), slots)
        said: dict[Span, str | None] = {"persona": persona, "task": task}
        for name, words in said.items():
            if words is not None and not spans[name]:
                raise PersonaError(
                    f"The {name} {words!r} has no token of its own in the rendered prompt "
                    f"{text!r}; is this the model's own tokenizer?"
                )
        last = None
        marked = self._mark(bare=persona is None)
        if marked.header is not None:
            turn = len(text) - len(marked.header)
            last = sum(start < turn for start, _ in offsets) - 1
        ends = accumulate((stop for _, stop in offsets), max)
        return Prompt(text, self._kept(ids), spans, last, self._kept(ends))

    def _kept(self, numbers: Iterable[int]) -> tuple[int, ...]:
        known = self._numbers.setdefault
        return tuple([known(number, number) for number in numbers])

    def _mark(self, *, bare: bool) -> _Marked:
        """The prompt with marks for persona and task; without a persona they stand together."""
        if bare not in self._marked:
            marks = (None, PERSONA_MARK + TASK_MARK) if bare else (PERSONA_MARK, TASK_MARK)
            messages = self.messages(*marks)
            text = apply_template(self.tokenizer, messages, header=True)
            turn = apply_template(self.tokenizer, messages, header=False)
            header = text.removeprefix(turn) if text.startswith(turn) else None
            self._marked[bare] = _Marked(text, header)
        return self._marked[bare]


def _spans(starts: Sequence[int], slots: Slots) -> dict[Span, range]:
    """The token range of each span, from where each token's first character stands."""
    bounds = (0, slots.persona_start, slots.persona_stop, slots.task_stop)
    edges = [*(bisect_left(starts, bound) for bound in bounds), len(starts)]
    names: tuple[Span, ...] = ("prefix", "persona", "task", "tail")
    return {name: range(edges[k], edges[k + 1]) for k, name in enumerate(names)}


def tokens_between(tokenizer: PreTrainedTokenizerBase, text: str, start: int, stop: int) -> range:
    """The tokens of a rendered text whose first non-space character is start … stop − 1."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = _first_characters(text, encoded["offset_mapping"])
    return range(bisect_left(starts, start), bisect_left(starts, stop))


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
