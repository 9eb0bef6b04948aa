"""Tokenizers that cannot be the model's are refused, and adapters use their model's own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from persona_nns.errors import PersonaError
from persona_nns.models.checkpoints import load_tokenizer
from persona_nns.models.load import load_model
from persona_nns.organism.bundled import organism_folder
from persona_nns.prompts.grids import load_grid
from persona_nns.prompts.render import render, render_cell

BASE = organism_folder("organism-qwen2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BASE, tmp_path / "copied"))


@pytest.mark.parametrize("kept", ["", "tokenizer_config.json", "chat_template.jinja"])
def test_a_folder_without_its_tokenizer_is_refused(folder: Path, kept: str) -> None:
    for file in (*folder.glob("tokenizer*"), *folder.glob("*.jinja")):
        if file.name != kept:
            file.unlink()
    with pytest.raises(PersonaError, match="tokenizer of 'copied'"):
        load_tokenizer(folder)


@pytest.mark.parametrize("embedded", [1024, 2048 + 300, 50_257])
def test_another_models_tokenizer_is_refused(folder: Path, embedded: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": embedded}))
    with pytest.raises(PersonaError, match=f"2,048 tokens, and the model {embedded:,}"):
        load_tokenizer(folder)


@pytest.mark.parametrize("embedded", [2048, 2048 - 1, 2048 + 128])
def test_padded_embeddings_and_a_token_more_are_taken(folder: Path, embedded: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": embedded}))
    assert len(load_tokenizer(folder)) == 2048


@pytest.mark.parametrize(
    ("persona", "task", "what"), [("", "Sing.", "persona"), (None, " ", "task")]
)
def test_a_text_without_a_token_of_its_own_is_refused(
    persona: str | None, task: str, what: str
) -> None:
    tokenizer = load_tokenizer("organism-qwen2")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}<|im_end|>"
    )
    with pytest.raises(PersonaError, match=f"The {what} .* has no token of its own"):
        render(tokenizer, persona, task)


def test_a_tokenizer_that_makes_nothing_of_a_text_is_noticed_in_the_prompt() -> None:
    tokenizer: Any = load_tokenizer("organism-qwen2")
    tokenizer.backend_tokenizer.model = type(tokenizer.backend_tokenizer.model)(vocab={}, merges=[])
    with pytest.raises(PersonaError, match="has no token of its own"):
        render_cell(tokenizer, load_grid("short").cells[0])


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    def make(base: str = str(BASE), *, tokens: int | None = None, **config: Any) -> Path:
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        if tokens is not None:
            module.resize_token_embeddings(tokens)
        kind = config.pop("kind", peft.LoraConfig)
        settings = {"r": 2, "target_modules": ["q_proj"]} if kind is peft.LoraConfig else {}
        adapted: Any = peft.get_peft_model(
            module, kind(task_type="CAUSAL_LM", **{**settings, **config})
        )
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
        folder = tmp_path / "adapter"
        adapted.save_pretrained(folder)
        file = folder / "adapter_config.json"
        saved = json.loads(file.read_text())
        file.write_text(json.dumps({**saved, "base_model_name_or_path": base}))
        return folder

    return make


@pytest.mark.parametrize("base", [str(BASE), "organism-qwen2"])
def test_an_adapter_without_a_tokenizer_has_its_models(
    adapter: Callable[..., Path], base: str
) -> None:
    model = load_model(adapter(base))
    assert len(model.tokenizer) == 2048
    assert model.tokenizer.chat_template == load_tokenizer("organism-qwen2").chat_template
    plain = load_model("organism-qwen2")
    ids = torch.tensor([[5, 6, 7]])
    with model.trace(ids):
        adapted = model.output.logits.save()
    with plain.trace(ids):
        logits = plain.output.logits.save()
    assert not torch.allclose(adapted, logits)


def test_the_model_of_an_adapter_that_cannot_be_had_is_named(
    adapter: Callable[..., Path],
) -> None:
    folder = adapter("some-org/not-in-the-cache")
    with pytest.raises(PersonaError, match=r"'some-org/not-in-the-cache', which the adapter"):
        load_model(folder)


def test_an_adapter_of_a_resized_model_resizes_it(adapter: Callable[..., Path]) -> None:
    folder = adapter(tokens=2100, modules_to_save=["embed_tokens", "lm_head"])
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.add_tokens([f"<persona {k}>" for k in range(52)])
    tokenizer.save_pretrained(folder)
    model = load_model(folder)
    assert model.config.vocab_size == 2100
    assert len(model.tokenizer) == 2100


def test_an_adapter_that_does_not_fit_says_why(adapter: Callable[..., Path]) -> None:
    folder = adapter()
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 7}))
    with pytest.raises(PersonaError, match=r"does not fit its model: .*size mismatch"):
        load_model(folder)


def test_an_adapter_of_vectors_before_the_prompt_is_refused(
    adapter: Callable[..., Path],
) -> None:
    folder = adapter(kind=peft.PromptTuningConfig, num_virtual_tokens=4)
    with pytest.raises(PersonaError, match="PROMPT_TUNING"):
        load_model(folder)


def test_an_adapter_without_weights_is_one_sentence(adapter: Callable[..., Path]) -> None:
    folder = adapter()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(PersonaError, match="holds no weights"):
        load_model(folder)


def test_a_text_that_would_run_on_behind_its_end_is_warned_of(folder: Path) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": 3}))
    with pytest.warns(UserWarning, match=r"ends an answer with '<\|im_end\|>', but 'copied' stops"):
        load_model(folder)


@pytest.mark.filterwarnings("error")
def test_a_model_that_ends_where_its_template_does_is_not_warned_of() -> None:
    load_model("organism-qwen2")


@pytest.mark.filterwarnings("ignore:.*return_dict_in_generate")
def test_what_generation_returns_does_not_depend_on_the_checkpoint(folder: Path) -> None:
    file = folder / "generation_config.json"
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), **asked}))
    model = load_model(folder)
    with model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2) as tracer:
        said = tracer.result.save()
    assert said.shape == (1, 5)
