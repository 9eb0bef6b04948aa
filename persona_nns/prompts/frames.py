"""Frames: how persona and task are put to a model, as the messages of a chat.

In a frame ``{persona}`` and ``{task}`` stand once each: the task in the last message, which is the
user's, and the persona not after it. All other text is literal, braces too. Three frames have
names; others are the table ``[frame]`` of a TOML file, a grid's or one of its own.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, model_validator

from persona_nns.errors import UsageError
from persona_nns.prompts.files import problem_of, read_toml

PERSONA_SLOT, TASK_SLOT = "{persona}", "{task}"

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One message of a frame; its content may hold slots."""

    role: Role
    content: str

    def filled(self, persona: str | None, task: str) -> "Message":
        """The message with texts in its slots, whatever these texts hold themselves."""
        texts = {PERSONA_SLOT: persona or "", TASK_SLOT: task}
        slots = "|".join(map(re.escape, texts))
        return Message(self.role, re.sub(slots, lambda slot: texts[slot[0]], self.content))


@dataclass(frozen=True)
class Frame:
    """Messages with a slot for the persona and one for the task.

    Frames are equal whose messages are, whatever they are called.

    Raises:
        UsageError: the slots or the roles are not where they have to be.
    """

    messages: tuple[Message, ...]
    name: str = field(default="own", compare=False)

    def __post_init__(self) -> None:
        """Check the messages."""
        if problem := _problem_of(self.messages):
            raise UsageError(f"The frame {self.name!r} is none: {problem}.")

    @property
    def has_system_message(self) -> bool:
        """Whether it begins with a system message."""
        return self.messages[0].role == "system"

    def fill(self, persona: str | None, task: str) -> tuple[Message, ...]:
        """The messages with texts in the slots.

        Without a persona (None) a message that holds the persona's slot and not the task's is left
        out, and in one that holds both everything before the task is.
        """
        messages = self.messages if persona is not None else tuple(self._without_persona())
        return tuple(message.filled(persona, task) for message in messages)

    def _without_persona(self) -> list[Message]:
        kept: list[Message] = []
        for message in self.messages:
            content = message.content
            if PERSONA_SLOT not in content:
                kept.append(message)
            elif TASK_SLOT in content:
                kept.append(Message(message.role, content[content.index(TASK_SLOT) :]))
        return kept

    def opened_by_slot(self, persona: str) -> "Frame":
        """The frame with this persona as literal text, its message opened by the slot."""
        messages = [
            Message(each.role, f"{PERSONA_SLOT} {each.content.replace(PERSONA_SLOT, persona)}")
            if PERSONA_SLOT in each.content
            else each
            for each in self.messages
        ]
        return Frame(tuple(messages), self.name)


def without_system_role(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages for a template without a system role.

    The system text and a blank line open the first user message.
    """
    if messages[0].role != "system":
        return messages
    system, *others = messages
    first = next(place for place, message in enumerate(others) if message.role == "user")
    others[first] = Message("user", f"{system.content}\n\n{others[first].content}")
    return tuple(others)


def _problem_of(messages: tuple[Message, ...]) -> str | None:
    """What keeps messages from being a frame, as the end of a sentence."""
    contents = [message.content for message in messages]
    for slot in (PERSONA_SLOT, TASK_SLOT):
        count = sum(content.count(slot) for content in contents)
        if count != 1:
            return f"{slot} stands in its messages {count} times; it has to stand there once"
    if messages[-1].role != "user" or TASK_SLOT not in contents[-1]:
        return f"{TASK_SLOT} has to stand in the last message, and that has to be the user's"
    if PERSONA_SLOT in contents[-1].partition(TASK_SLOT)[2]:
        return f"{PERSONA_SLOT} stands after {TASK_SLOT}; it has to come before it"
    if any(message.role == "system" for message in messages[1:]):
        return "a system message can only be the first"
    return None


#: ``As {persona}, {task}`` in one user message, as in "As X, Do Y".
ROLE = Frame((Message("user", "As {persona}, {task}"),), "role")
SYSTEM = Frame((Message("system", "You are {persona}."), Message("user", "{task}")), "system")
LATER = Frame(
    (
        Message("user", "Hello."),
        Message("assistant", "Hello! How can I help you today?"),
        Message("user", "As {persona}, {task}"),
    ),
    "later",
)
BUNDLED_FRAMES = {frame.name: frame for frame in (ROLE, SYSTEM, LATER)}


class _MessageTable(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Role
    content: Annotated[str, StringConstraints(min_length=1)]


class FrameTable(BaseModel):
    """What the table ``[frame]`` of a file may hold."""

    model_config = ConfigDict(extra="forbid")

    messages: list[_MessageTable]

    @model_validator(mode="after")
    def _check_messages(self) -> "FrameTable":
        if problem := _problem_of(self._read()):
            raise ValueError(problem)
        return self

    def _read(self) -> tuple[Message, ...]:
        return tuple(Message(each.role, each.content) for each in self.messages)

    def frame(self, name: str) -> Frame:
        """The frame under a name."""
        return Frame(self._read(), name)


class _FrameFile(BaseModel):
    """A file with a frame: a grid's, or one of its own."""

    frame: FrameTable


def load_frame(frame: str | Path | Frame) -> Frame:
    """A frame by its name, or from a TOML file with a table ``[frame]``.

    Args:
        frame: ``role``, ``system``, ``later``, or the path of a ``.toml`` file, which names the
            frame; a `Frame` is returned as it is.

    Raises:
        UsageError: an unknown name, an unreadable file, or one that holds no frame.
    """
    if isinstance(frame, Frame):
        return frame
    if frame in BUNDLED_FRAMES:
        return BUNDLED_FRAMES[str(frame)]
    path = Path(frame)
    if path.suffix != ".toml":
        raise UsageError(
            f"Unknown frame {str(frame)!r}; use {', '.join(BUNDLED_FRAMES)}, or a .toml file."
        )
    tables = read_toml(path, "The frame file")
    try:
        return _FrameFile.model_validate(tables).frame.frame(path.stem)
    except ValidationError as error:
        raise UsageError(
            f"The frame file {str(path)!r} holds no frame: {problem_of(error)}."
        ) from error
