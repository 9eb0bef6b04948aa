"""Roles as public files have them, and the questions that all roles are asked."""

import json
from pathlib import Path
from typing import Any

import pytest

from persona_nns.errors import UsageError
from persona_nns.traits import Role, load_roles, read_role, read_role_questions

RUBRIC = "Does it play the role?\n{question}\n{answer}\nA number between 0 and 3."
PIRATE = {
    "instruction": [{"pos": "You are a pirate."}, {"pos": "Act as a pirate. "}],
    "questions": ["How do you feel about taxes?"],
    "eval_prompt": RUBRIC,
}
DEFAULT = {"instruction": [{"pos": ""}, {"pos": "You are {model_name}."}]}


def write(file: Path, data: Any) -> Path:
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    return file


def test_a_role_has_instructions_alone_or_with_questions_and_a_rubric(tmp_path: Path) -> None:
    write(tmp_path / "pirate.json", PIRATE)
    write(tmp_path / "default.json", DEFAULT)
    default, pirate = load_roles(tmp_path)
    assert default == Role("default", ("", "You are {model_name}."), (), None)
    assert pirate == Role(
        "pirate",
        ("You are a pirate.", "Act as a pirate. "),
        ("How do you feel about taxes?",),
        RUBRIC,
    )


def test_the_models_label_stands_for_its_name(tmp_path: Path) -> None:
    role = read_role(write(tmp_path / "default.json", DEFAULT))
    assert role.systems("google/gemma-2-2b-it") == ("", "You are google/gemma-2-2b-it.")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("{", "role file .*r.json' cannot be read: .* line 1"),
        ([], "lacks instruction; it needs a list"),
        ({"questions": ["Why?"]}, "lacks instruction; it needs a list"),
        ({"instruction": []}, "instruction is an empty list"),
        ({"instruction": ["Be."]}, "An instruction of .* is 'Be.'; each needs the text 'pos'"),
        ({"instruction": [{"neg": "Be."}]}, "each needs the text 'pos'"),
        ({**PIRATE, "questions": []}, "questions is an empty list"),
        ({**PIRATE, "questions": ["Why?", 7]}, "questions of .* have to be texts"),
        ({**PIRATE, "eval_prompt": "Rate it."}, r"eval_prompt of .* with \{question\} and"),
    ],
)
def test_what_is_no_role_is_one_sentence(tmp_path: Path, data: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        read_role(write(tmp_path / "r.json", data))
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_a_folder_without_roles_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(UsageError, match=r"holds no role, that is, no \{role\}.json"):
            load_roles(folder)


def test_questions_of_all_roles_are_known_by_their_id(tmp_path: Path) -> None:
    lines = '{"question": "What is law?", "id": 0}\n\n{"question": "Why?", "id": 12}\n'
    assert read_role_questions(write(tmp_path / "q.jsonl", lines)) == {
        0: "What is law?",
        12: "Why?",
    }


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("", "There are no questions in .*q.jsonl'"),
        ('{"id": 0}\n', "Line 1 of .* lacks the text 'question'"),
        ('{"question": "Why?", "id": "a"}\n', "Line 1 of .*: id is 'a'; it has to be a whole"),
        ('{"question": "Why?"}\n', "id is None; it has to be a whole number"),
        (
            '{"question": "Why?", "id": 1}\n{"question": "How?", "id": 1}\n',
            r"Line 2 of .*: the id 1 stands for 'Why\?' already",
        ),
        ("[]\n", "Line 1 of .* is no JSON object"),
    ],
)
def test_what_is_no_question_is_one_sentence(tmp_path: Path, lines: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        read_role_questions(write(tmp_path / "q.jsonl", lines))
