"""Turns of conversations on the templates of public models, and the files that they are read from.

What a template writes is spelt out piece by piece (`chat_templates`), each piece with the number of
its message; a token belongs to a turn by looking at its characters one after the other.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import PUBLIC, Said, with_public_template

from persona_nns.errors import PersonaError, UsageError
from persona_nns.prompts import (
    PLAIN_TEMPLATE,
    Conversation,
    Script,
    Speaker,
    read_conversations,
    read_said,
    read_scripts,
    render_each,
    render_turns,
)

# Equal texts, texts that stand in templates, that look like marks, or begin and end oddly.
TALK = [
    ("system", "You are user."),
    ("user", "user"),
    ("assistant", "turn1mark0417 is\n\n  what I am. assistant"),
    ("user", "user"),
    ("assistant", "– ¿sí?"),
    ("user", "写一首俳句。"),
    ("assistant", "user"),
]
NAMES = [*PUBLIC, "plain"]


def tokenizer_of(name: str, tokenizer: Any) -> Any:
    if name in PUBLIC:
        return with_public_template(tokenizer, PUBLIC[name])
    plain = with_public_template(tokenizer, PUBLIC["qwen2.5"])
    plain.chat_template = PLAIN_TEMPLATE
    return plain


def written(name: str, talk: list[tuple[str, str]]) -> tuple[str, list[str]]:
    """The text that a template writes, and of every character the message that it is of."""
    said: list[Said] = [(role, [(text, str(k))]) for k, (role, text) in enumerate(talk)]
    if name == "plain":
        pieces = [piece for _, content in said for piece in (*content, ("\n", ""))]
    else:
        if talk[0][0] == "system" and not PUBLIC[name].system_role:
            (_, told), (role, content), *others = said
            said = [(role, [*told, ("\n\n", ""), *content]), *others]
        pieces = PUBLIC[name].writer(said, False)
    text = "".join(piece for piece, _ in pieces)
    if name == "olmo-2":  # nothing behind the last answer
        text = text.removesuffix("\n")
    return text, [label for piece, label in pieces for _ in piece][: len(text)]


def expected_turns(tokenizer: Any, text: str, labels: list[str], n_turns: int) -> list[range]:
    found: list[list[int]] = [[] for _ in range(n_turns)]
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    for token, (start, stop) in enumerate(offsets["offset_mapping"]):
        letters = [k for k in range(start, stop) if not text[k].isspace()]
        if letters and labels[letters[0]]:
            found[int(labels[letters[0]])].append(token)
    return [range(each[0], each[-1] + 1) if each else range(0) for each in found]


@pytest.mark.parametrize("has_system", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_turns_are_where_the_template_writes_them(
    name: str, has_system: bool, tokenizer: Any
) -> None:
    own = tokenizer_of(name, tokenizer)
    talk = TALK if has_system else TALK[1:]
    if name == "mistral-0.3" and has_system:  # it shows the system text before a last user message
        with pytest.raises(PersonaError, match=r"not show message 0, 'You are user\.'"):
            render_turns(own, talk)
        talk = talk[:-1]
    text, labels = written(name, talk)
    chat = render_turns(own, talk)
    assert list(chat.ids) == own(text, add_special_tokens=False)["input_ids"]
    assert list(chat.turns) == expected_turns(own, text, labels, len(talk))
    assert all(chat.turns)
    assert chat.speakers == tuple(role for role, _ in talk)
    for turn, window, speaker in zip(chat.turns, chat.windows, chat.speakers, strict=True):
        answer = range(turn.start - 1, turn.stop)
        assert window == (answer if speaker == "assistant" else range(0))


@pytest.mark.parametrize("name", NAMES)
def test_white_space_at_the_ends_is_no_content_and_an_empty_turn_has_no_tokens(
    name: str, tokenizer: Any
) -> None:
    own = tokenizer_of(name, tokenizer)
    talk = [
        ("user", "  One\n"),
        ("assistant", "\n\nTwo  and\tmore \n"),
        ("user", " \n"),
        ("assistant", ""),
        ("user", "Three \t"),
    ]
    chat = render_turns(own, talk, header=True)
    text = own.decode(list(chat.ids))
    for k, (_, content) in enumerate(talk):
        core = content.strip()
        start = text.index(core) if core else 0
        labels = [
            str(k) if core and start <= at < start + len(core) else "" for at in range(len(text))
        ]
        assert chat.turns[k] == expected_turns(own, text, labels, len(talk))[k]
        assert bool(chat.turns[k]) == bool(core)
        assert own.decode(list(chat.ids[chat.turns[k].start : chat.turns[k].stop])).strip() == core
    assert not chat.windows[3]


@pytest.mark.parametrize("name", ["qwen2.5", "llama-3.1", "gemma-2", "smollm2"])
def test_a_system_text_takes_the_place_of_the_own_one_and_is_no_turn(
    name: str, tokenizer: Any
) -> None:
    own = tokenizer_of(name, tokenizer)
    instead = [("system", "Be brief."), *TALK[1:]]
    expected = render_turns(own, instead)
    replaced = render_turns(own, TALK, system="Be brief.")
    assert (replaced.ids, replaced.turns[1:]) == (expected.ids, expected.turns[1:])
    assert replaced.turns[0] == range(0)
    assert replaced.speakers == expected.speakers
    put_before = render_turns(own, TALK[1:], system="Be brief.")
    assert (put_before.ids, put_before.turns) == (expected.ids, expected.turns[1:])


def test_a_template_that_refuses_is_named_with_the_conversation(tokenizer: Any) -> None:
    own = tokenizer_of("gemma-2", tokenizer)
    twice = Conversation("a/7", (("user", "One."), ("user", "Two.")))
    message = (
        r"^The conversation 'a/7' cannot be used: .*fails on messages of user, user .*alternate"
    )
    with pytest.raises(UsageError, match=message):
        render_each(own, [twice])
    alone = Conversation("b", (("system", "One."), ("assistant", "Two.")))
    with pytest.raises(UsageError, match=r"'b' cannot be used: .* has no system role"):
        render_each(own, [alone])
    thinking = Conversation("c", (("user", "One."), ("assistant", "<think>x</think>Two.")))
    with pytest.raises(UsageError, match=r"'c' cannot be used: .*not show message 1, '<thi"):
        render_each(tokenizer_of("qwen3", tokenizer), [thinking])


def lines(*values: Any) -> str:
    return "\n".join(json.dumps(value) for value in values) + "\n"


HELLO = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]


def test_conversations_of_both_formats_and_of_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_text(
        lines({"id": "one", "messages": HELLO, "domain": "coding"}, {"conversation": HELLO})
        + "\n"
        + lines({"id": 7, "messages": HELLO[:1]})
    )
    said: tuple[tuple[Speaker, str], ...] = (("user", "Hello."), ("assistant", "Hi."))
    assert read_conversations(file) == [
        Conversation("one", said, "coding"),
        Conversation("2", said),
        Conversation("7", said[:1]),
    ]
    folder = tmp_path / "transcripts"
    folder.mkdir()
    public = {"model": "m", "domain": "coding", "turns": 30, "conversation": HELLO}
    (folder / "b.json").write_text(json.dumps(public))
    (folder / "a.json").write_text(json.dumps({"messages": HELLO}))
    (folder / "notes.txt").write_text("not read")
    assert read_conversations(folder) == [
        Conversation("a", said),
        Conversation("b", said, "coding"),
    ]
    assert read_conversations(folder / "b.json") == [Conversation("b", said, "coding")]
    scripts = tmp_path / "scripts.jsonl"
    scripts.write_text(lines({"id": "s", "turns": ["Hello.", "Why?"]}, {"turns": ["One."]}))
    assert read_scripts(scripts) == [Script("s", ("Hello.", "Why?")), Script("2", ("One.",))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            {"messages": [{"role": "human", "content": "x"}]},
            "Message 0 is said by 'human', and not by system, user or assistant: line 2",
        ),
        ({"messages": []}, "'messages' is empty: line 2"),
        ({"messages": "x"}, "'messages' is 'x' and not a list: line 2"),
        (
            {"messages": [{"role": "user"}]},
            "Message 0 is {'role': 'user'}; it needs the texts 'role' and 'content': line 2",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "Message 0 is .* needs the texts"),
        ({"messages": ["x"]}, "Message 0 is 'x'; it needs the texts"),
        ({"turns": ["x"]}, r"A conversation needs 'messages' \(or 'conversation'\): line 2"),
        ({"messages": HELLO, "id": "one"}, "The id 'one' stands in line 1 of '.*' and in line 2"),
        ({"messages": HELLO, "id": 1.5}, "The id is 1.5; it has to be a text or a whole number"),
        ({"messages": HELLO, "id": " "}, "The id is ' '; it has to be a text"),
        ({"messages": HELLO, "domain": 3}, "The domain is 3 and not a text"),
        (["x"], "Line 2 of '.*' is no JSON object"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(line: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_text(lines({"id": "one", "messages": HELLO}, line))
    with pytest.raises(UsageError, match=f"^{message}") as caught:
        read_conversations(file)
    assert str(file) in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"id": "x"}, "A script needs 'turns', the user's texts: line 1"),
        ({"turns": []}, "'turns' is empty: line 1"),
        ({"turns": ["Hello.", ""]}, "Turn 1 is '' and not a text that says something: line 1"),
        ({"turns": [{"content": "x"}]}, "Turn 0 is {'content': 'x'} and not a text"),
    ],
)
def test_a_line_that_is_no_script_is_named(line: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "script.jsonl"
    file.write_text(lines(line))
    with pytest.raises(UsageError, match=f"^{message}") as caught:
        read_scripts(file)
    assert str(file) in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"holds no \.json or \.jsonl file"):
        read_conversations(tmp_path / "empty")
    with pytest.raises(UsageError, match=r"The conversations '.*none\.jsonl' cannot be read"):
        read_conversations(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match=r"are read from a \.jsonl or \.jsonl\.gz file"):
        read_conversations(tmp_path / "talks.csv")
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="holds nothing"):
        read_scripts(tmp_path / "none.jsonl")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UsageError, match="is no conversation; it needs"):
        read_conversations(tmp_path / "list.json")
    for given in ((None, None), ("a.jsonl", "b.jsonl")):
        with pytest.raises(UsageError, match="Give either conversations"):
            read_said(*given)
