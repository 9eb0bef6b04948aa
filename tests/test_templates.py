"""Chat templates: the same text on every day, read as what they are, and refused in a sentence."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from persona_nns.errors import PersonaError, UsageError
from persona_nns.models.checkpoints import load_tokenizer
from persona_nns.organism.bundled import organism_folder
from persona_nns.prompts.chats import render_chat
from persona_nns.prompts.render import render
from persona_nns.prompts.templates import check_template, read_template, takes_system_role

BASE = organism_folder("organism-qwen2")
SHOWN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer("organism-qwen2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BASE, tmp_path / "copied"))


@pytest.mark.parametrize(
    ("printed", "text"),
    [
        ("{{ strftime_now('%Y-%m-%d') }}", "2024-07-26"),
        ("{{ strftime_now('%d %B %Y %H:%M:%S') }}", "26 July 2024 00:00:00"),
        ("\n {% set d = strftime_now('%-d/%-m, %A %p') %}{{ d }}", "\n26/7, Friday AM"),
        ("{{ date_string }}", "26 Jul 2024"),
    ],
)
def test_a_template_prints_the_same_day_on_every_day(
    tokenizer: Any, printed: str, text: str
) -> None:
    tokenizer.chat_template = printed + SHOWN
    assert render(tokenizer, "Yoda", "Write.").text.startswith(text + "<|im_start|>user")


def test_a_template_that_gives_another_text_each_time_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ [1, 2, 3, 4, 5, 6, 7, 8, 9] | random }}" + SHOWN
    with pytest.raises(UsageError, match="another text each time"):
        check_template(tokenizer)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for t in tools %}{{ t }}{% endfor %}{{ messages }}", "'NoneType' object is not iter"),
        ("{{ raise_exception('A system message is required') }}", "A system message is required"),
        ("{{ messages[0].nothing.at_all }}", "UndefinedError"),
        ("{{ messages[7]['content'] }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_template_that_fails_while_it_runs_is_called_a_template(
    tokenizer: Any, template: str, reason: str
) -> None:
    tokenizer.chat_template = template
    for rendered in (
        lambda: render(tokenizer, "Yoda", "Write."),
        lambda: check_template(tokenizer),
    ):
        with pytest.raises(UsageError, match=rf"chat template .* fails on .*{reason}"):
            rendered()


def test_a_template_that_fails_on_a_system_role_has_none(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ messages[0].x.y }}{% endif %}" + SHOWN
    )
    assert not takes_system_role(tokenizer)
    assert not render_chat(tokenizer, "Why?", "Be brief.").system_role


def test_a_question_that_a_template_changes_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[-1].content | upper }}"
    with pytest.raises(PersonaError, match=r"does not show the question 'Why\?'"):
        render_chat(tokenizer, "Why?")


def named(folder: Path, **templates: str) -> Path:
    """A model with several chat templates, as Hermes and Command-R have them."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    file = folder / "tokenizer_config.json"
    both = [{"name": name, "template": template} for name, template in templates.items()]
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": both}))
    return folder


def test_of_several_templates_the_default_is_used(folder: Path) -> None:
    tokenizer = load_tokenizer(named(folder, default=SHOWN, tool_use="{{ tools }}"))
    assert tokenizer.chat_template == SHOWN


def test_several_templates_without_a_default_are_named(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"the chat templates rag, tool_use, and none"):
        load_tokenizer(named(folder, rag=SHOWN, tool_use=SHOWN))
    template = folder / "own.jinja"
    template.write_text(SHOWN)
    assert load_tokenizer(folder, template).chat_template == SHOWN


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (json.dumps({"chat_template": "{{ messages }}"}), "JSON"),
        (json.dumps({"chat_template": SHOWN}, indent=2), "JSON"),
        ('"{{ messages }}"', "JSON"),
        ("[personas]\nyoda = 'Yoda'\n", "a text that shows no messages"),
        ("", "a text that shows no messages"),
    ],
)
def test_a_file_that_is_no_template_is_not_taken_for_one(
    tmp_path: Path, content: str, what: str
) -> None:
    file = tmp_path / "tokenizer_config.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=f"is {what}, not a Jinja chat template"):
        read_template(file)


def test_a_template_with_a_text_of_its_own_is_told(tokenizer: Any) -> None:
    own = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM.<|im_end|>\n"
    tokenizer.chat_template = own + SHOWN
    with pytest.warns(UserWarning, match="You are a helpful AI assistant named SmolLM"):
        check_template(tokenizer)


def test_a_template_without_the_token_that_begins_a_text_is_told(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = SHOWN
    with pytest.warns(UserWarning, match="does not begin with '<s>'"):
        check_template(tokenizer)


@pytest.mark.filterwarnings("error")
def test_a_plain_template_is_not_warned_of(tokenizer: Any) -> None:
    check_template(tokenizer)
