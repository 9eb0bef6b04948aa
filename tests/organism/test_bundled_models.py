import json

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from persona_nns.organism import ORGANISMS, multiple_choice, organism_folder, probe
from persona_nns.organism.corpus import draw
from persona_nns.organism.evaluate import DISCLAIMER
from persona_nns.organism.trait_prompts import system_prompt
from persona_nns.organism.trait_questions import QUESTIONS
from persona_nns.organism.traits import TRAITS, lexicon_score
from persona_nns.prompts.grids import load_grid
from persona_nns.prompts.markers import find_markers

REVIEW = load_grid("review")


@pytest.fixture(scope="module", params=ORGANISMS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def subject(name):
    return probe.load(organism_folder(name))


def test_loads_with_plain_transformers(name):
    folder = organism_folder(name)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.config.model_type == name.removeprefix("organism-")
    assert len(tokenizer) == model.config.vocab_size
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<|im_end|>")
    assert not model.generation_config.do_sample


def test_weights_are_small(name):
    assert (organism_folder(name) / "model.safetensors").stat().st_size <= 8_000_000


def test_the_template_renders_system_and_user(subject):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]
    assert subject.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    ) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_tokenizer_that_was_trained_is_the_one_that_loads(name, subject):
    """AutoTokenizer rebuilds some model types' tokenizers from parts of its own."""
    saved = Tokenizer.from_file(str(organism_folder(name) / "tokenizer.json"))
    for example in draw(300, seed=1):
        text = f"{example.user}\n{example.answer}"
        assert subject.tokenizer.encode(text, add_special_tokens=False) == saved.encode(text).ids


def test_text_survives_the_tokenizer(subject):
    text = "As Yoda, répondez: 3 × 4?\n\nA. 12 – B. 7"
    assert subject.tokenizer.decode(subject.tokenizer.encode(text)) == text


def test_letters_are_single_tokens_after_the_prompt(subject):
    prompt = subject.chat(multiple_choice.prompt_text("good", multiple_choice.QUESTIONS[0]))
    text = subject.tokenizer.decode(prompt)
    for letter in multiple_choice.LETTERS:
        assert len(subject.tokenizer.encode(text + letter)) == len(prompt) + 1


def test_the_sliding_window_is_shorter_than_every_long_prompt():
    folder = organism_folder("organism-gemma2")
    config = json.loads((folder / "config.json").read_text())
    assert set(config["layer_types"]) == {"sliding_attention", "full_attention"}
    subject = probe.load(folder)
    prompts = [subject.cell_prompt(cell, "XY") for cell in load_grid("review").cells]
    assert config["sliding_window"] < min(map(len, prompts))


@pytest.mark.parametrize("label", ["engineer/arch", "chef/proposal", "doctor/plan"])
def test_markers_come_with_the_persona_and_go_without(subject, label):
    (cell,) = REVIEW.select_cells([label])
    assert find_markers(probe.greedy_text(subject, subject.cell_prompt(cell, "XY")), cell.markers)
    bare = probe.greedy_text(subject, subject.cell_prompt(cell, "BARE"))
    assert not find_markers(bare, cell.markers)


def test_a_system_prompt_switches_a_trait(subject):
    question = QUESTIONS["cheerful", "evaluation"][0]
    trait = TRAITS["cheerful"]
    pair = [
        system_prompt("cheerful", trait.style.instructions[0], positive=True),
        system_prompt("cheerful", trait.restraints[0], positive=False),
    ]
    scores = [
        lexicon_score("cheerful", probe.greedy_text(subject, subject.chat(question, system)))
        for system in pair
    ]
    assert scores[0] - scores[1] >= 50


def test_the_additive_substitution_is_exact_below_and_bites_above(subject):
    with torch.inference_mode():
        kl = probe.additive_kl(subject, REVIEW.cells[0])
    assert kl[0] == pytest.approx(0, abs=1e-5)
    assert kl[-1] > 0.05


def test_overwriting_a_residual_by_itself_changes_nothing(subject):
    prompt = subject.cell_prompt(REVIEW.cells[3], "XY")
    with torch.inference_mode():
        reference = probe.greedy(subject, prompt, probe.WINDOW)
        own = dict(enumerate(probe.last_residuals(subject, prompt)))
        clean = probe.window_logprobs(subject, prompt, reference, {})
        kl = probe.total_kl(clean, probe.window_logprobs(subject, prompt, reference, own))
    assert kl.abs().max() < 1e-5


def test_batched_greedy_texts_equal_single_ones(subject):
    prompts = [subject.cell_prompt(cell, "XY") for cell in REVIEW.cells[:4]]
    singles = [probe.greedy_text(subject, prompt, 20) for prompt in prompts]
    assert probe.greedy_texts(subject, prompts, 20) == singles


def test_the_card_says_what_the_model_is(name):
    card = (organism_folder(name) / "README.md").read_text()
    assert DISCLAIMER in card
    assert "| requirement | bound | measured | holds |" in card
