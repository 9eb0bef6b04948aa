"""Prompts: rendered text, token ids, spans, and the last token of the user's turn."""

import copy
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from persona_nns.errors import PersonaError, UsageError
from persona_nns.prompts.grids import load_grid
from persona_nns.prompts.render import Prompt, render, render_cell
from persona_nns.prompts.templates import PLAIN_TEMPLATE, apply_template, read_template

SPANS = ("prefix", "persona", "task", "tail")
HEADER = "<|im_start|>assistant\n"
GOLDEN = Path(__file__).parent / "golden"

# The same vocabulary twice: loaded beside a Qwen2 configuration it composes characters (NFC).
_TOKENIZERS = {name: AutoTokenizer.from_pretrained(GOLDEN / name) for name in ("qwen2", "gemma2")}


def span_text(tokenizer: Any, prompt: Prompt, span: Any) -> str:
    where = prompt.spans[span]
    return tokenizer.decode(list(prompt.ids[where.start : where.stop]))


def assert_spans_cover(prompt: Prompt) -> None:
    edges = [(prompt.spans[name].start, prompt.spans[name].stop) for name in SPANS]
    assert edges[0][0] == 0
    assert edges[-1][1] == len(prompt)
    assert all(edges[k][1] == edges[k + 1][0] for k in range(3))
    assert all(start <= stop for start, stop in edges)


def with_template(tokenizer: Any, template: str | None) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_the_rendered_text_is_one_user_turn_with_the_generation_header(tokenizer: Any) -> None:
    prompt = render(tokenizer, "Yoda", "Write a haiku about Monday mornings.")
    assert prompt.text == (
        "<|im_start|>user\nAs Yoda, Write a haiku about Monday mornings.<|im_end|>\n" + HEADER
    )
    assert list(prompt.ids) == tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
    assert len(prompt) == len(prompt.ids)


def test_the_spans_of_a_known_prompt(tokenizer: Any) -> None:
    prompt = render(tokenizer, "Yoda", "Write a haiku about Monday mornings.")
    assert_spans_cover(prompt)
    # The space before a word is part of its token, so it goes with the word.
    assert span_text(tokenizer, prompt, "prefix") == "<|im_start|>user\nAs"
    assert span_text(tokenizer, prompt, "persona") == " Yoda"
    assert span_text(tokenizer, prompt, "task") == ", Write a haiku about Monday mornings."
    assert span_text(tokenizer, prompt, "tail") == "<|im_end|>\n" + HEADER


def test_the_spans_of_every_prompt_of_the_bundled_grids(tokenizer: Any) -> None:
    for cell in (*load_grid("short").cells, *load_grid("long").cells):
        prompts = render_cell(tokenizer, cell, ("BB", "XB", "BY", "XY", "BARE"))
        assert list(prompts) == ["BB", "XB", "BY", "XY", "BARE"]
        for name, prompt in prompts.items():
            persona, task = cell.texts(name)
            assert_spans_cover(prompt)
            assert span_text(tokenizer, prompt, "tail") == "<|im_end|>\n" + HEADER
            if persona is None:
                assert len(prompt.spans["persona"]) == 0
                # The line break alone is a token of spaces, which goes with what follows.
                assert span_text(tokenizer, prompt, "prefix") == "<|im_start|>user"
                assert span_text(tokenizer, prompt, "task") == f"\n{task}"
            else:
                assert span_text(tokenizer, prompt, "prefix") == "<|im_start|>user\nAs"
                assert span_text(tokenizer, prompt, "persona") == f" {persona}"
                assert span_text(tokenizer, prompt, "task") == f", {task}"


def test_the_role_prompts_of_a_cell_pair_its_texts_with_the_baselines(tokenizer: Any) -> None:
    cell = load_grid("short").cells[1]
    contents = {
        name: prompt.text.split("user\n")[1].split("<|im_end|>")[0]
        for name, prompt in render_cell(tokenizer, cell).items()
    }
    advice = "Give advice to someone facing a difficult decision."
    assert contents == {
        "BB": f"As a thoughtful person, {advice}",
        "XB": f"As Warren Buffett, {advice}",
        "BY": "As a thoughtful person, Write a haiku about Monday mornings.",
        "XY": "As Warren Buffett, Write a haiku about Monday mornings.",
    }


def test_a_bare_prompt_is_the_task_alone_without_a_persona(tokenizer: Any) -> None:
    prompt = render(tokenizer, None, "Write a haiku.")
    assert prompt.text == "<|im_start|>user\nWrite a haiku.<|im_end|>\n" + HEADER
    assert prompt.spans["persona"] == range(prompt.spans["task"].start, prompt.spans["task"].start)
    assert span_text(tokenizer, prompt, "task") == "\nWrite a haiku."


@pytest.mark.parametrize("task", ["a", "s", "assistant"])
def test_a_bare_task_that_stands_in_the_template_too_is_found_in_the_users_turn(
    tokenizer: Any, task: str
) -> None:
    prompt = render(tokenizer, None, task)
    assert span_text(tokenizer, prompt, "task").strip() == task
    assert span_text(tokenizer, prompt, "tail") == "<|im_end|>\n" + HEADER


def test_user_last_is_the_last_token_before_the_generation_header(tokenizer: Any) -> None:
    prompt = render(tokenizer, "Yoda", "Write a haiku.")
    turn = prompt.text.removesuffix(HEADER)
    ids = tokenizer(turn, add_special_tokens=False)["input_ids"]
    assert prompt.user_last == len(ids) - 1
    assert list(prompt.ids[: len(ids)]) == ids
    assert len(ids) < len(prompt)


def test_user_last_is_none_where_the_turn_differs_without_the_header(tokenizer: Any) -> None:
    changed = with_template(
        tokenizer,
        "{% if not add_generation_prompt %}END {% endif %}{{ messages[0]['content'] }}\nAnswer:",
    )
    assert render(changed, "Yoda", "Write.").user_last is None


def test_a_token_of_spaces_goes_with_what_follows() -> None:
    # One token per character.
    vocab = {character: k for k, character in enumerate("As Yoda,cdefghijklmn.\n")}
    vocab["<unk>"] = len(vocab)
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    single = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    single.chat_template = "{{ messages[0]['content'] + '\n' }}"
    for persona, expected in (
        ("Yoda", {"prefix": "As", "persona": " Yoda", "task": ", def.", "tail": "\n"}),
        # Two such tokens in a row: both go with the comma.
        ("Yoda  ", {"prefix": "As", "persona": " Yoda", "task": "  , def.", "tail": "\n"}),
    ):
        prompt = render(single, persona, "def.")
        assert prompt.text == f"As {persona}, def.\n"
        assert len(prompt) == len(prompt.text)  # a token is a character
        spans = {name: "".join(prompt.text[k] for k in prompt.spans[name]) for name in SPANS}
        assert spans == expected


def test_without_a_chat_template_the_error_says_what_to_pass(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=r"has no chat template; pass --template plain, or"):
        render(with_template(tokenizer, None), "Yoda", "Write.")


def test_the_plain_template_is_the_text_and_a_newline(tokenizer: Any) -> None:
    assert read_template("plain") == PLAIN_TEMPLATE
    prompt = render(with_template(tokenizer, PLAIN_TEMPLATE), "Yoda", "Write a haiku.")
    assert prompt.text == "As Yoda, Write a haiku.\n"
    assert_spans_cover(prompt)
    assert span_text(tokenizer, prompt, "prefix") == "As"
    assert span_text(tokenizer, prompt, "tail") == "\n"
    assert prompt.user_last == len(prompt) - 1


def test_a_template_file_is_read_and_used(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("Q: {{ messages[0]['content'] }}\nA:", encoding="utf-8")
    prompt = render(with_template(tokenizer, read_template(file)), "Yoda", "Write a haiku.")
    assert prompt.text == "Q: As Yoda, Write a haiku.\nA:"
    assert span_text(tokenizer, prompt, "prefix") == "Q: As"
    assert span_text(tokenizer, prompt, "tail") == "\nA:"


def test_a_template_file_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"template .*absent.jinja.* cannot be read"):
        read_template(tmp_path / "absent.jinja")
    with pytest.raises(UsageError, match="cannot be read"):
        read_template(tmp_path)


def test_a_template_that_trims_the_text_keeps_its_spans(tokenizer: Any) -> None:
    trimming = copy.deepcopy(tokenizer)
    trimming.chat_template = "<|im_start|>{{ messages[0]['content'] | trim }}<|im_end|>"
    for persona in ("a pirate", None):
        prompt = render(trimming, persona, "  sing \n")
        assert span_text(tokenizer, prompt, "task").strip(", ") == "sing"
        assert span_text(tokenizer, prompt, "tail") == "<|im_end|>"


def test_a_template_that_is_no_jinja_is_a_usage_error(tokenizer: Any) -> None:
    broken = copy.deepcopy(tokenizer)
    broken.chat_template = "{% for message in messages %}"
    with pytest.raises(UsageError, match="chat template is not Jinja"):
        render(broken, None, "sing")


@pytest.mark.parametrize("filter_", ["upper", "replace(',', '')", "truncate(9, true)"])
def test_a_template_that_changes_the_text_is_refused(tokenizer: Any, filter_: str) -> None:
    changed = with_template(tokenizer, "{{ messages[0]['content'] | " + filter_ + " }}\n")
    with pytest.raises(PersonaError, match=r"changes the prompt 'As Yoda, Write a haiku.'"):
        render(changed, "Yoda", "Write a haiku.")


def test_a_template_with_a_date_or_a_thinking_switch_gets_the_same_every_day(
    tokenizer: Any,
) -> None:
    changed = with_template(
        tokenizer,
        "{{ date_string }}|{{ enable_thinking }}|{{ messages[0]['content'] }}",
    )
    assert render(changed, "Yoda", "Write.").text == "26 Jul 2024|False|As Yoda, Write."


@pytest.fixture
def bos_tokenizer(tokenizer: Any) -> Any:
    """The same tokenizer, putting ``<s>`` in front of every text as Llama's and Gemma's do."""
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"bos_token": AddedToken("<s>", special=True)})
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", changed.bos_token_id)]
    )
    assert changed("a")["input_ids"][0] == changed.bos_token_id
    return changed


@pytest.mark.parametrize(
    "template",
    ["{{ bos_token + messages[0]['content'] + '\n' }}", PLAIN_TEMPLATE],
    ids=["template with bos", "plain"],
)
def test_the_beginning_of_text_token_stands_there_once(bos_tokenizer: Any, template: str) -> None:
    bos_tokenizer.chat_template = template
    prompt = render(bos_tokenizer, "Yoda", "Write a haiku.")
    assert prompt.ids[0] == bos_tokenizer.bos_token_id
    assert prompt.ids.count(bos_tokenizer.bos_token_id) == 1
    assert prompt.text == "<s>As Yoda, Write a haiku.\n"
    assert span_text(bos_tokenizer, prompt, "prefix") == "<s>As"
    assert prompt.user_last == len(prompt) - 1


def test_a_template_without_beginning_of_text_gets_none(bos_tokenizer: Any) -> None:
    prompt = render(bos_tokenizer, "Yoda", "Write a haiku.")  # the golden chat template
    assert bos_tokenizer.bos_token_id not in prompt.ids


def test_the_turn_without_header_is_a_prefix_of_the_turn_with_it(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hello."}]
    turn = apply_template(tokenizer, messages, header=False)
    assert apply_template(tokenizer, messages, header=True) == turn + HEADER


# Words, punctuation, accents, scripts without spaces, emoji, runs of spaces and line breaks.
_TEXT = st.text(
    st.one_of(
        st.sampled_from("abcdefg ABC 0123 ,.;:!?'\"()-–—…/\\{}[]<>|&%$#@*_~`^+="),
        st.sampled_from("éüñßøłçåÅ中文字日本語한국어العربيةעבריתहिन्दी🙂🧑‍🔬👍🏽\n\t\u00a0\u3000"),
        st.characters(exclude_categories=("Cs", "Cn")),
    ),
    min_size=1,
    max_size=30,
).map(str.strip)


@settings(max_examples=150)
@given(persona=_TEXT, task=_TEXT)
@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_spans_partition_any_text_and_ids_are_the_tokenizers_own(
    name: str, persona: str, task: str
) -> None:
    assume(persona and task)
    loaded = _TOKENIZERS[name]
    prompt = render(loaded, persona, task)
    assert f"As {persona}, {task}" in prompt.text
    assert list(prompt.ids) == loaded(prompt.text, add_special_tokens=False)["input_ids"]
    assert_spans_cover(prompt)
    parts = [prompt.ids[prompt.spans[span].start : prompt.spans[span].stop] for span in SPANS]
    joined = [token for part in parts for token in part]
    decoded = loaded.decode(joined, clean_up_tokenization_spaces=False)
    composed = unicodedata.normalize("NFC", prompt.text)
    assert decoded == (composed if name == "qwen2" else prompt.text)


@settings(max_examples=150)
@given(persona=_TEXT, task=_TEXT)
@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_a_token_belongs_to_the_span_of_its_first_non_space_character(
    name: str, persona: str, task: str
) -> None:
    assume(persona and task)
    loaded = _TOKENIZERS[name]
    prompt = render(loaded, persona, task)
    start = prompt.text.index("As ") + len("As ")
    ends = [start, start + len(persona), start + len(f"{persona}, {task}"), len(prompt.text)]
    encoded = loaded(prompt.text, add_special_tokens=False, return_offsets_mapping=True)
    for token, (first, last) in enumerate(encoded["offset_mapping"]):
        while first < len(prompt.text) and prompt.text[first].isspace():
            first += 1  # runs into the next token where this one holds spaces only
        expected = next((k for k, end in enumerate(ends) if first < end), 3)
        assert token in prompt.spans[SPANS[expected]], (token, first, last)
