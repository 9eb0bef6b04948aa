"""Questions asked as students: tokens of the identity, letters, and alignment of two prompts."""

import os
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from persona_nns.errors import PersonaError, UsageError
from persona_nns.prompts.identities import (
    PERSONA,
    AskedQuestion,
    align,
    ask,
    check_persona,
    load_identities,
    shared_prefix,
)
from persona_nns.prompts.questions import load_questions
from persona_nns.prompts.templates import PLAIN_TEMPLATE

QUESTION = load_questions("bundled")[0]


def asked(before: int, identity: int, after: int, *, first: int = 1) -> AskedQuestion:
    n = before + identity + after
    return AskedQuestion(tuple(range(first, first + n)), range(before, before + identity), (), 0)


def test_the_prompt_is_the_usual_one_with_the_identity_as_its_own_tokens(tokenizer: Any) -> None:
    row = ask(tokenizer, PERSONA, "thoroughly good", QUESTION)
    text = tokenizer.decode(row.ids)
    assert (
        "As a thoroughly good student, answer this multiple-choice question with one letter only."
        "\n\nWhat is the capital of France?\nA. Madrid\nB. Paris\nC. Vienna\nD. Rome" in text
    )
    named = tokenizer.decode(row.ids[row.identity.start : row.identity.stop])
    assert named == " thoroughly good"
    assert [tokenizer.decode([token]) for token in row.letters] == ["A", "B", "C", "D"]
    assert row.answer == 1


def test_a_persona_may_have_its_slot_elsewhere(tokenizer: Any) -> None:
    row = ask(tokenizer, "someone {identity}", "red", QUESTION)
    assert tokenizer.decode(row.ids[row.identity.start : row.identity.stop]) == " red"
    for persona in ("a student", "a {identity} {identity} student"):
        with pytest.raises(UsageError, match="exactly one slot"):
            check_persona(persona)


def test_a_letter_that_joins_the_prompt_is_refused(tokenizer: Any) -> None:
    joined = deepcopy(tokenizer)
    # The prompt ends in a space, which the letter then takes into its own token.
    joined.chat_template = PLAIN_TEMPLATE + " "
    joined.add_tokens([" A"])
    with pytest.raises(PersonaError, match="letter 'A' after the prompt is not a single token"):
        ask(joined, PERSONA, "red", QUESTION)


def test_a_template_that_drops_the_persona_is_refused(tokenizer: Any) -> None:
    other = deepcopy(tokenizer)
    other.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(PersonaError, match="changes the prompt"):
        ask(other, PERSONA, "red", QUESTION)


@pytest.mark.parametrize(
    ("clean", "corrupt", "partner"),
    [
        (asked(2, 1, 2), asked(2, 1, 2), [0, 1, 2, 3, 4]),
        (asked(2, 3, 2), asked(2, 1, 2), [0, 1, 4, 5, 6]),
        (asked(2, 1, 2), asked(2, 3, 2), [0, 1, -1, -1, 2, 3, 4]),
        (asked(1, 2, 1), asked(1, 3, 1), [0, -1, 1, 2, 3]),
        # Tokens that take up a part of what stands beside the identity.
        (asked(1, 1, 1), asked(2, 1, 2), [0, -1, 1, -1, 2]),
        (asked(2, 1, 3), asked(1, 1, 2), [0, 2, 4, 5]),
    ],
)
def test_alignment_is_from_the_start_last_to_last_and_from_the_end(
    clean: AskedQuestion, corrupt: AskedQuestion, partner: list[int]
) -> None:
    assert align(clean, corrupt) == partner


def test_the_shared_prefix_ends_before_every_identity() -> None:
    assert shared_prefix([asked(4, 1, 2), asked(3, 2, 2)]) == 3
    assert shared_prefix([asked(3, 1, 2), asked(3, 1, 2, first=2)]) == 0


def test_identities_come_from_a_file_with_comments(tmp_path: Path) -> None:
    file = tmp_path / "identities.txt"
    file.write_text("# two\n\n good \nvery bad # comment\nC# fan\n")
    assert load_identities(file) == ("good", "very bad", "C# fan")
    assert {"good", "bad", "red", "blue"} <= set(load_identities(None))
    for text, sentence in (("good\n", "fewer than two"), ("good\nbad\ngood\n", "'good' twice")):
        file.write_text(text)
        with pytest.raises(UsageError, match=sentence):
            load_identities(file)
    with pytest.raises(UsageError, match="cannot be read"):
        load_identities(tmp_path / "none.txt")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="are no file: a pipe can be read only once"):
        load_identities(tmp_path / "pipe")


@pytest.mark.parametrize("choice", ["Rome", " Rome ", "Rome\n"])
def test_a_template_may_leave_out_the_space_around_the_text(tokenizer: Any, choice: str) -> None:
    trimming = deepcopy(tokenizer)
    trimming.chat_template = "<|im_start|>{{ messages[0]['content'] | trim }}<|im_end|>"
    question = replace(QUESTION, choices=(*QUESTION.choices[:3], choice))
    row = ask(trimming, PERSONA, "red", question)
    assert tokenizer.decode(row.ids[row.identity.start : row.identity.stop]) == " red"
    assert tokenizer.decode(row.ids).endswith("Rome<|im_end|>")
