"""Conversations and scripts that people bring: files with the messages of a chat.

A conversation is ``{"id": …, "messages": [{"role": …, "content": …}, …]}``, or has its messages
under ``conversation`` as public transcripts do; a script is ``{"id": …, "turns": [user texts]}``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from transformers import PreTrainedTokenizerBase

from persona_nns.errors import PersonaError, UsageError
from persona_nns.prompts.files import read_json, read_jsonl, stem_of, suffix_of
from persona_nns.prompts.turns import RenderedChat, render_turns

Speaker = Literal["system", "user", "assistant"]
SPEAKERS: tuple[Speaker, ...] = get_args(Speaker)

_LINES = (".jsonl", ".jsonl.gz")
_SHAPE = '{"id": …, "messages": [{"role": "user", "content": …}, …]}'


@dataclass(frozen=True)
class Conversation:
    """What was said, in turn.

    Attributes:
        id: its name: the file's own, else the file's stem, or the number of the line.
        messages: speaker and text of each turn.
        domain: what it is about, where the file says so.
    """

    id: str
    messages: tuple[tuple[Speaker, str], ...]
    domain: str = ""

    @property
    def turns(self) -> tuple[str, ...]:
        """The user's texts that a model is to answer; none, as the answers are there."""
        return ()


@dataclass(frozen=True)
class Script:
    """What a user says, turn after turn, whatever the answers are.

    Attributes:
        id: its name, as of a conversation.
        turns: the user's texts.
        domain: what it is about, where the file says so.
    """

    id: str
    turns: tuple[str, ...]
    domain: str = ""

    @property
    def messages(self) -> tuple[tuple[Speaker, str], ...]:
        """The conversation with answers that are empty."""
        said: list[tuple[Speaker, str]] = []
        for turn in self.turns:
            said.append(("user", turn))
            said.append(("assistant", ""))
        return tuple(said)


@dataclass(frozen=True, eq=False)
class Talk:
    """A conversation or script in a model's template: what an experiment measures at a time.

    Attributes:
        id: its name.
        asked: what the user says, of a script; nothing of a conversation.
        chat: how it is rendered; a script with answers that are empty.
        n_turns: turns that the result has places for.
    """

    id: str
    asked: tuple[str, ...]
    chat: RenderedChat
    n_turns: int

    @property
    def label(self) -> str:
        """What it is called in messages."""
        return self.id

    @property
    def place(self) -> dict[str, Any]:
        """Where it stands in the result."""
        return {"conversation": self.id}


def read_conversations(source: str | Path) -> list[Conversation]:
    """The conversations of a JSONL file, one a line, or of a folder of JSON files, one a file.

    Raises:
        UsageError: something cannot be read, or is no conversation; the file and line are named.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if suffix_of(file) in (".json", *_LINES))
        if not files:
            raise UsageError(f"The folder {str(source)!r} holds no .json or .jsonl file.")
        return _all_of([given for file in files for given in _given(file)], _conversation)
    return _all_of(_given(source), _conversation)


def read_scripts(file: str | Path) -> list[Script]:
    """The scripts of a JSONL file, one a line.

    Raises:
        UsageError: the file cannot be read, or a line is no script.
    """
    return _all_of(_given(file), _script)


def read_said(conversations: str | None, script: str | None) -> list[Conversation] | list[Script]:
    """The conversations of one source, or the scripts of another.

    Raises:
        UsageError: both are given, or neither; or what is given cannot be used.
    """
    if (conversations is None) == (script is None):
        raise UsageError(
            "Give either conversations (--conversations F.jsonl, or a folder) or a script that the "
            "model answers (--script F.jsonl)."
        )
    return read_conversations(conversations) if conversations else read_scripts(str(script))


def render_each(
    tokenizer: PreTrainedTokenizerBase,
    said: Sequence[Conversation | Script],
    system: str | None = None,
) -> list[RenderedChat]:
    """Conversations and scripts in the model's template.

    Args:
        tokenizer: the model's.
        said: the conversations or scripts.
        system: a system text in place of their own; it is no turn. None leaves them as they are.

    Raises:
        UsageError: the template refuses one, or does not show it as it is; it is named.
    """
    rendered: list[RenderedChat] = []
    for each in said:
        try:
            rendered.append(render_turns(tokenizer, each.messages, system=system))
        except PersonaError as error:
            raise UsageError(f"The conversation {each.id!r} cannot be used: {error}") from error
    return rendered


def domains_of(said: Sequence[Conversation | Script]) -> dict[str, tuple[str, list[str]]]:
    """The coordinate ``domain`` of the conversations, where one of them has a domain."""
    domains = [each.domain for each in said]
    return {"domain": ("conversation", domains)} if any(domains) else {}


@dataclass(frozen=True)
class _Given:
    """An object of a file, where it stands, and its name where it has none of its own."""

    values: Mapping[str, Any]
    place: str
    name: str


def _given(file: str | Path) -> list[_Given]:
    shown = str(file)
    if suffix_of(file) == ".json":
        values = read_json(file, "The conversation")
        if not isinstance(values, dict):
            raise UsageError(f"The file {shown!r} is no conversation; it needs {_SHAPE}.")
        return [_Given(values, repr(shown), stem_of(file))]
    if suffix_of(file) not in _LINES:
        raise UsageError(
            f"Conversations and scripts are read from a {' or '.join(_LINES)} file, conversations "
            f"from a folder of .json files too; {shown!r} is neither."
        )
    rows = read_jsonl(file, "The conversations")
    if not rows:
        raise UsageError(f"The file {shown!r} holds nothing; it needs a line {_SHAPE}.")
    return [_Given(row.values, f"line {row.number} of {shown!r}", str(row.number)) for row in rows]


Read = TypeVar("Read", Conversation, Script)


def _all_of(given: Sequence[_Given], read: Callable[[_Given], Read]) -> list[Read]:
    """What objects are, each under a name of its own."""
    found: list[Read] = []
    places: dict[str, str] = {}
    for each in given:
        one = read(each)
        if one.id in places:
            raise UsageError(
                f"The id {one.id!r} stands in {places[one.id]} and in {each.place}; give each one "
                "an id of its own."
            )
        places[one.id] = each.place
        found.append(one)
    return found


def _conversation(given: _Given) -> Conversation:
    keys = [key for key in ("messages", "conversation") if key in given.values]
    if len(keys) != 1:
        raise UsageError(f"A conversation needs 'messages' (or 'conversation'): {given.place}.")
    messages = [_message(each, k, given.place) for k, each in _listed(given, keys[0])]
    return Conversation(_id(given), tuple(messages), _domain(given))


def _script(given: _Given) -> Script:
    if "turns" not in given.values:
        raise UsageError(f"A script needs 'turns', the user's texts: {given.place}.")
    turns = list(_listed(given, "turns"))
    for k, turn in turns:
        if not isinstance(turn, str) or not turn.strip():
            raise UsageError(
                f"Turn {k} is {turn!r} and not a text that says something: {given.place}."
            )
    return Script(_id(given), tuple(str(turn) for _, turn in turns), _domain(given))


def _listed(given: _Given, key: str) -> Iterable[tuple[int, Any]]:
    values = given.values[key]
    if not isinstance(values, list) or not values:
        found = "empty" if values == [] else f"{values!r} and not a list"
        raise UsageError(f"{key!r} is {found}: {given.place}.")
    return enumerate(values)


def _message(value: Any, k: int, place: str) -> tuple[Speaker, str]:
    role = value.get("role") if isinstance(value, dict) else None
    content = value.get("content") if isinstance(value, dict) else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise UsageError(
            f"Message {k} is {value!r}; it needs the texts 'role' and 'content': {place}."
        )
    for speaker in SPEAKERS:
        if role == speaker:
            return speaker, content
    raise UsageError(
        f"Message {k} is said by {role!r}, and not by {', '.join(SPEAKERS[:-1])} or "
        f"{SPEAKERS[-1]}: {place}."
    )


def _id(given: _Given) -> str:
    own = given.values.get("id", given.name)
    if isinstance(own, bool) or not isinstance(own, str | int) or not str(own).strip():
        raise UsageError(
            f"The id is {own!r}; it has to be a text or a whole number: {given.place}."
        )
    return str(own)


def _domain(given: _Given) -> str:
    domain = given.values.get("domain", "")
    if not isinstance(domain, str):
        raise UsageError(f"The domain is {domain!r} and not a text: {given.place}.")
    return domain
