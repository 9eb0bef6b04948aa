"""GGUF files: each architecture against the weights it was made from, and what is refused."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import Q8_0, WIDE, write_gguf
from random_models import save_random_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import persona_nns as pn
from persona_nns.models.cache import models_folder
from persona_nns.models.checkpoints import find_checkpoint, load_weights, model_label
from persona_nns.models.load import end_tokens, load_model, record_of
from persona_nns.prompts.fetching import CACHE

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """The folder of a random model, and its GGUF file."""

    def make(of: str = "llama", *, config: Any = None, **settings: Any) -> Any:
        of_layers: dict[str, Any] = {}
        if of.startswith("gemma"):
            of_layers["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
        if of == "gemma2":  # llama.cpp knows no head of its own for it
            of_layers["tie_word_embeddings"] = True
        if of == "gemma3":  # what a file does not say, and every published model has
            of_layers["layer_types"] = ["sliding_attention"] * 3
        changes = {**WIDE, **of_layers, **(config or {})}
        folder = save_random_model(tmp_path / of, of, **changes)
        return folder, write_gguf(folder, tmp_path / f"tiny-{of}.gguf", **settings)

    return make


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(6, 46)[None]).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float32_gives_the_model_it_was_made_from(
    architecture: str, make: Callable[..., tuple[Path, Path]]
) -> None:
    folder, file = make(architecture)
    own: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    model: Any = load_weights(file, "float32")
    assert type(model) is type(own)
    weights = own.state_dict()
    for name, weight in model.state_dict().items():
        is_norm = architecture.startswith("gemma") and name.endswith("norm.weight")
        expected = (weights[name] + 1) - 1 if is_norm else weights[name]
        assert torch.equal(weight, expected), name
    torch.testing.assert_close(logits(model), logits(own), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_q8_0_is_within_its_error_and_passes_every_check(
    architecture: str, make: Callable[..., tuple[Path, Path]]
) -> None:
    folder, file = make(architecture, kind=Q8_0)
    model = load_model(file)
    own = load_file(folder / "model.safetensors")
    read = model._module.state_dict()
    for name, expected in own.items():
        weight = read[name]
        if weight.ndim == 1:
            torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)
            continue
        blocks = expected.reshape(-1, 32)
        # Half a step of 1/127 of the block's largest, and that step is rounded to float16.
        allowed = blocks.abs().amax(dim=1, keepdim=True) * (0.5 / 127 + 2**-11)
        assert ((weight.reshape(-1, 32) - blocks).abs() <= allowed + 1e-7).all(), name
    record = record_of(model)
    assert record.provenance["tensors"].keys() == {"Q8_0", "F32"}
    assert record.label == f"tiny-{architecture}"
    assert record.version == record.provenance["sha256"]


def test_loading_again_reads_the_cache_and_is_bit_equal(
    make: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = make(kind=Q8_0)
    first = load_weights(file, "float32").state_dict()

    def refuse(*_: Any) -> None:
        raise AssertionError("dequantised again")

    monkeypatch.setattr("persona_nns.models.gguf.convert", refuse)
    again = load_weights(file, "float32").state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    elsewhere = file.rename(file.with_name("other.gguf"))  # the same content, so the same model
    assert find_checkpoint(str(elsewhere))[0] == str(next(models_folder().iterdir()))


def test_another_file_of_the_same_name_is_another_model(
    make: Callable[..., tuple[Path, Path]],
) -> None:
    folder, file = make()
    before = find_checkpoint(str(file))[0]
    write_gguf(folder, file, kind=Q8_0)
    assert find_checkpoint(str(file))[0] != before


def test_a_run_says_where_its_weights_come_from(
    make: Callable[..., tuple[Path, Path]], tmp_path: Path, small_grid: Any
) -> None:
    _, file = make("qwen2", kind=Q8_0)
    asked: dict[str, Any] = {
        "layers": [1],
        "positions": ["p_last"],
        "cells": ["yoda/haiku"],
        "store": tmp_path / "s.zarr",
    }
    results = pn.run("localized_positions", load_model(file), small_grid, **asked)
    said = json.loads(results.attrs["model_provenance"])
    assert (said["file"], said["quantisation"]) == ("tiny-qwen2.gguf", "Q8_0")
    assert results.attrs["model_version"] == said["sha256"]
    assert results.attrs["model_source"] == str(file)
    again = pn.run("localized_positions", load_model(file), small_grid, **asked)
    assert again.attrs["run"] == results.attrs["run"]


def test_llama_3s_frequencies_are_read(make: Callable[..., tuple[Path, Path]]) -> None:
    config = {
        "max_position_embeddings": 131072,
        "rope_parameters": {
            **_LLAMA3,
            "rope_theta": 500000.0,
            "original_max_position_embeddings": 8192,
        },
        "head_dim": 64,
    }
    plain = 500000.0 ** -(np.arange(32) / 32)
    wavelength = 2 * np.pi / plain
    smooth = np.clip((8192 / wavelength - 1) / 3, 0, 1)
    factors = (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)
    assert np.median(factors) > 1 or factors.max() == 8
    folder, file = make(config=config, tensors={"rope_freqs.weight": factors})
    model: Any = load_weights(file, "float32")
    own: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    torch.testing.assert_close(
        model.model.rotary_emb.inv_freq, own.model.rotary_emb.inv_freq, rtol=1e-6, atol=0
    )
    write_gguf(folder, file, tensors={"rope_freqs.weight": factors[::-1].copy()})
    with pytest.raises(pn.UsageError, match="factors of its own"):
        load_weights(file, "float32")


def test_linear_scaling_is_read_and_other_scaling_refused(
    make: Callable[..., tuple[Path, Path]],
) -> None:
    scaled: dict[str, Any] = {"qwen2.rope.scaling.type": "linear"}
    folder, file = make("qwen2", metadata={**scaled, "qwen2.rope.scaling.factor": 4.0})
    model: Any = load_weights(file, "float32")
    own: Any = load_weights(folder, "float32")
    torch.testing.assert_close(
        model.model.rotary_emb.inv_freq * 4, own.model.rotary_emb.inv_freq, rtol=1e-6, atol=0
    )
    write_gguf(folder, file, metadata={"qwen2.rope.scaling.type": "yarn"})
    with pytest.raises(pn.UsageError, match="method 'yarn'"):
        load_weights(file, "float32")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architecture": "qwen2moe"}, "architecture 'qwen2moe'; GGUF files are read"),
    "foreign": ({"tensors": {"blk.0.more.weight": np.zeros(3, np.float32)}}, "no place .* blk.0"),
    "layers": ({"metadata": {"llama.block_count": 4}}, "lacks weights.*blk.3"),
    "width": ({"metadata": {"llama.feed_forward_length": 95}}, "another shape.*ffn"),
    "unsaid": ({"metadata": {"llama.attention.head_count": None}}, "head_count"),
    "parts": ({"metadata": {"split.count": 3}}, "one of 3 parts"),
    "tokenizer": ({"metadata": {"tokenizer.ggml.model": "rwkv"}}, "tokenizer .* not supported"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_not_supported_is_one_sentence_and_leaves_nothing(
    what: str, make: Callable[..., tuple[Path, Path]]
) -> None:
    settings, expected = BAD[what]
    _, file = make(**settings)
    with pytest.raises(pn.PersonaError, match=expected) as raised:
        load_model(file)
    assert "\n" not in str(raised.value)
    assert not [*models_folder().iterdir()]


@pytest.mark.parametrize("keep", [0, 3, 30, 2000, -200])
def test_a_damaged_file_is_one_sentence(keep: int, make: Callable[..., tuple[Path, Path]]) -> None:
    _, file = make()
    whole = file.read_bytes()
    file.write_bytes(whole[:keep])
    with pytest.raises(pn.UsageError, match=r"tiny-llama\.gguf") as raised:
        load_model(file)
    assert "\n" not in str(raised.value)
    other = bytearray(whole)
    other[4] = 9
    file.write_bytes(other)
    with pytest.raises(pn.UsageError, match="version 9"):
        load_model(file)


def test_an_unknown_quantisation_is_refused(make: Callable[..., tuple[Path, Path]]) -> None:
    _, file = make()
    data = bytearray(file.read_bytes())
    place = data.rindex(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    data[place : place + 4] = (999).to_bytes(4, "little")
    file.write_bytes(data)
    with pytest.raises(pn.UsageError, match="999"):
        load_model(file)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(pn.UsageError, match=r"There is no file 'nowhere\.gguf'"):
        load_model("nowhere.gguf")
    (tmp_path / "model.gguf").touch()
    with pytest.raises(pn.UsageError, match=r"Name its file: .*model\.gguf"):
        load_model(tmp_path)
    assert model_label("nowhere.gguf") == "nowhere"


BOS = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 1}


def test_a_template_without_the_token_that_texts_begin_with_is_warned_about(
    make: Callable[..., tuple[Path, Path]],
) -> None:
    _, file = make(metadata=BOS)
    with pytest.warns(UserWarning, match="does not begin with '<s>'"):
        model: Any = load_model(file)
    assert model.tokenizer("a")["input_ids"][0] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(file, template="plain")


def test_a_tokenizer_without_the_token_that_texts_begin_with_is_warned_about(
    make: Callable[..., tuple[Path, Path]],
) -> None:
    _, file = make(metadata={"tokenizer.ggml.add_bos_token": True})
    with pytest.warns(UserWarning, match="tokenizer does not have"):
        load_model(file)


def test_no_token_is_put_in_front_where_the_file_says_so(
    make: Callable[..., tuple[Path, Path]],
) -> None:
    _, file = make(metadata={**BOS, "tokenizer.ggml.add_bos_token": False})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model: Any = load_model(file)
    assert model.tokenizer("a")["input_ids"] == model.tokenizer.convert_tokens_to_ids(["a"])


def test_a_turn_ends_where_the_file_says(make: Callable[..., tuple[Path, Path]]) -> None:
    _, file = make(metadata={"tokenizer.ggml.eot_token_id": 5})
    assert end_tokens(load_model(file)) == [2, 5]


def test_an_adapter_finds_a_base_in_a_gguf_file(
    make: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    _, file = make(kind=Q8_0)
    base = load_weights(file, "float32")
    student = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    student.peft_config["default"].base_model_name_or_path = str(file)
    student.save_pretrained(tmp_path / "adapter")
    model = load_model(tmp_path / "adapter")
    assert record_of(model).provenance["file"] == file.name
