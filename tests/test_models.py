"""Loading a model: names, precision, templates, and what a bad request is told."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight import TransformersModel
from random_models import copy_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPTJConfig,
    PreTrainedModel,
)

from persona_nns.errors import PersonaError, UsageError
from persona_nns.models.checkpoints import model_label
from persona_nns.models.checks import check_model
from persona_nns.models.load import STANDARD_NAMES, load_model, record_of
from persona_nns.prompts.templates import PLAIN_TEMPLATE
from persona_nns.tracing.continuations import end_tokens


def parameter_dtypes(model: TransformersModel) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model._module.parameters()}


def test_no_parameter_takes_gradients_in_any_architecture(
    random_model: Callable[[str], TransformersModel], architecture: str
) -> None:
    model = random_model(architecture)
    assert not any(parameter.requires_grad for parameter in model._module.parameters())
    with model.trace(torch.tensor([[5, 6, 7]]), use_cache=False):
        logits = model.output.logits.save()
    assert not logits.requires_grad


def test_what_was_loaded_is_written_down(make_folder: Callable[..., Path]) -> None:
    folder = make_folder("qwen2")
    record = record_of(load_model(folder))
    assert record.label == folder.name
    assert record.source == str(folder)
    assert record.architecture == "Qwen2ForCausalLM"
    assert record.precision == "float32"
    assert record.attn_implementation == "eager"
    assert (record.n_layers, record.d_model) == (5, 32)
    assert len(record.version) == 64


def test_the_version_follows_the_weights_and_configuration(
    make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_folder("llama")
    version = record_of(load_model(folder)).version
    copied = shutil.copytree(folder, tmp_path / "copied")
    assert record_of(load_model(copied)).version == version
    weights = copied / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # the sign or an exponent bit of one weight
    weights.write_bytes(content)
    assert record_of(load_model(copied)).version != version
    configured = shutil.copytree(folder, tmp_path / "configured")
    config = json.loads((configured / "config.json").read_text())
    (configured / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert record_of(load_model(configured)).version != version


def test_a_model_that_was_not_loaded_here_has_no_record(module: Any, folder: Path) -> None:
    with pytest.raises(UsageError, match="was not loaded by persona_nns; load it with"):
        record_of(wrap(module, folder))


def test_the_label_is_the_folders_name_unless_another_is_given(
    make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(make_folder("qwen2"), tmp_path / "my-model")
    assert record_of(load_model(folder)).label == "my-model"
    assert record_of(load_model(folder, label="other")).label == "other"
    assert model_label(str(folder)) == model_label(f"{folder}/") == "my-model"
    monkeypatch.chdir(folder)
    assert model_label(".") == "my-model"
    assert model_label("org/name") == "org/name"


@pytest.mark.parametrize(
    ("architecture", "saved", "loaded"),
    [
        ("qwen2", torch.bfloat16, "bfloat16"),
        ("qwen2", torch.float32, "float32"),
        ("qwen2", torch.float16, "float32"),
        ("gemma2", torch.bfloat16, "float32"),
        ("gemma2", torch.float32, "float32"),
        ("gemma3", torch.bfloat16, "bfloat16"),
    ],
)
def test_the_default_precision(
    make_folder: Callable[..., Path], architecture: str, saved: torch.dtype, loaded: str
) -> None:
    model = load_model(make_folder(architecture, dtype=saved))
    assert record_of(model).precision == loaded
    assert parameter_dtypes(model) == {getattr(torch, loaded)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_precision_that_is_asked_for(make_folder: Callable[..., Path], dtype: str) -> None:
    model = load_model(make_folder("qwen2", dtype=torch.bfloat16), dtype=dtype)
    assert record_of(model).precision == dtype
    assert parameter_dtypes(model) == {getattr(torch, dtype)}


def test_every_architecture_passes_its_check_in_bfloat16(
    random_folder: Callable[[str], Path], architecture: str
) -> None:
    model = load_model(random_folder(architecture), dtype="bfloat16")
    assert parameter_dtypes(model) == {torch.bfloat16}


def test_float16_is_refused_with_its_reason_unless_forced(
    random_folder: Callable[[str], Path],
) -> None:
    folder = random_folder("qwen2")
    with pytest.raises(UsageError, match=r"float16 overflows .* NaN, so 'qwen2' is not loaded"):
        load_model(folder, dtype="float16")
    model = load_model(folder, dtype="float16", allow_float16=True)
    assert record_of(model).precision == "float16"
    assert parameter_dtypes(model) == {torch.float16}


def test_an_unknown_precision_backend_or_device_is_named(
    random_folder: Callable[[str], Path],
) -> None:
    folder = random_folder("qwen2")
    with pytest.raises(UsageError, match="Unknown dtype 'int8'; use float32, bfloat16, float16"):
        load_model(folder, dtype="int8")
    with pytest.raises(UsageError, match="Unknown backend 'cloud'; use"):
        load_model(folder, backend="cloud")
    with pytest.raises(UsageError, match="The device 'toaster' cannot be used: "):
        load_model(folder, device="toaster")
    with pytest.raises(UsageError, match="The device 'cuda:99' cannot be used: "):
        load_model(folder, device="cuda:99")


@pytest.mark.parametrize("name", ["organism", "organism-llama", "a/b/c", "./absent", "~/absent"])
def test_what_is_no_model_is_named_beside_what_could_be(name: str) -> None:
    with pytest.raises(UsageError, match=r"^Unknown model .*neither bundled .*nor a folder"):
        load_model(name)
    with pytest.raises(UsageError, match="Unknown model"):
        model_label(name)


def test_a_hub_model_that_cannot_be_found_is_one_sentence() -> None:
    with pytest.raises(UsageError, match=r"^The model 'nobody/nothing' was not found") as caught:
        load_model("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_configuration_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no model: it has no config\.json\.$"):
        load_model(tmp_path)


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "nonesuch"}'])
def test_a_broken_configuration_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(PersonaError) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_is_one_sentence(
    random_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(random_folder("qwen2"), tmp_path / "weightless")
    (folder / "model.safetensors").unlink()
    with pytest.raises(PersonaError, match="'weightless' could not be loaded: ") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_weights_that_are_damaged_are_one_sentence(
    random_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(random_folder("llama"), tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(PersonaError, match="'damaged' could not be loaded: "):
        load_model(folder)


def test_a_checkpoint_that_lacks_layers_is_refused(
    random_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(random_folder("llama"), tmp_path / "partial")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    with pytest.raises(PersonaError, match="partial"):
        load_model(folder)


@pytest.mark.filterwarnings("ignore:Module .*nnsight already serves")
def test_a_model_that_is_no_decoder_is_one_sentence(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 1024,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    config = BertConfig(**sizes, intermediate_size=8)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(__file__).parent / "golden" / "qwen2" / name, tmp_path / name)
    with pytest.raises(PersonaError, match="is not supported: it has no module that answers to"):
        load_model(tmp_path)


def test_a_template_replaces_the_models_own(
    random_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = random_folder("qwen2")
    assert "im_start" in (load_model(folder).tokenizer.chat_template or "")
    assert load_model(folder, template="plain").tokenizer.chat_template == PLAIN_TEMPLATE
    file = tmp_path / "mine.jinja"
    file.write_text("Q: {{ messages[0]['content'] }}")
    model = load_model(folder, template=file)
    assert model.tokenizer.chat_template == "Q: {{ messages[0]['content'] }}"
    with pytest.raises(UsageError, match="cannot be read"):
        load_model(folder, template=tmp_path / "absent.jinja")


def test_a_model_without_a_template_loads_and_takes_one(
    random_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(random_folder("llama"), tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    assert load_model(folder).tokenizer.chat_template is None
    assert load_model(folder, template="plain").tokenizer.chat_template == PLAIN_TEMPLATE


def test_end_tokens_are_those_of_generation(
    make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_folder("qwen2")
    assert end_tokens(load_model(folder)) == [2]
    several = shutil.copytree(folder, tmp_path / "several")
    (several / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    assert end_tokens(load_model(several)) == [2, 9]


def wrap(module: PreTrainedModel, folder: Path, **names: str) -> Any:
    """A model with standard names, before any check."""
    return TransformersModel(
        module, tokenizer=AutoTokenizer.from_pretrained(folder), rename=names or STANDARD_NAMES
    )


@pytest.fixture
def folder(random_folder: Callable[[str], Path]) -> Path:
    return random_folder("llama")


@pytest.fixture
def module(folder: Path) -> Any:
    """A model that a test may break, in plain transformers."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return loaded.eval().requires_grad_(False)


def test_a_sound_model_passes_its_check(module: Any, folder: Path) -> None:
    check_model(wrap(module, folder), "sound")


def test_a_block_whose_output_ignores_its_input_is_rejected(module: Any, folder: Path) -> None:
    block = module.model.layers[3]
    block.forward = lambda hidden, *_, **__: torch.ones_like(hidden)
    with pytest.raises(
        PersonaError, match=r"'deaf'.*overwriting the residual of layer 0 does not change"
    ):
        check_model(wrap(module, folder), "deaf")


def test_a_block_that_is_fed_past_its_input_is_rejected(module: Any, folder: Path) -> None:
    # Block 2 computes from what block 1 gave, whatever stands at its input.
    first, second = module.model.layers[1], module.model.layers[2]
    run_first, run_second = first.forward, second.forward
    passed: list[torch.Tensor] = []

    def give(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        passed[:] = [run_first(hidden, *args, **kwargs)]
        return passed[0].clone()

    def ignore(_: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return run_second(passed[0], *args, **kwargs)

    first.forward, second.forward = give, ignore
    with pytest.raises(
        PersonaError, match=r"'bypassed'.*overwriting the residual of layer 2 does not change"
    ):
        check_model(wrap(module, folder), "bypassed")


def test_blocks_that_are_never_called_are_rejected(module: Any, folder: Path) -> None:
    module.model.decoys = copy.deepcopy(module.model.layers)
    names = {key: name for key, name in STANDARD_NAMES.items() if name != "layers"}
    model = wrap(module, folder, **names, **{"*.decoys": "layers"})
    with pytest.raises(PersonaError, match=r"'decoy' .*is not supported"):
        check_model(model, "decoy")


def test_blocks_that_return_more_than_the_residual_stream_are_rejected(tmp_path: Path) -> None:
    config = GPTJConfig(vocab_size=1024, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    copy_tokenizer(tmp_path)
    with pytest.raises(PersonaError, match="is not supported: its block 0 returns more than"):
        load_model(tmp_path)


def test_a_model_whose_output_moves_by_itself_is_rejected(module: Any, folder: Path) -> None:
    block = module.model.layers[2]
    run = block.forward

    def add_noise(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return run(hidden + torch.randn_like(hidden), *args, **kwargs)

    block.forward = add_noise
    with pytest.raises(
        PersonaError, match=r"'noisy'.*writing back the residual of layer 0 changes its output"
    ):
        check_model(wrap(module, folder), "noisy")


def test_a_residual_that_is_not_the_hidden_state_is_rejected(module: Any, folder: Path) -> None:
    inner = module.model
    run = inner.forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        output = run(*args, **kwargs)
        if output.hidden_states is not None:
            states = list(output.hidden_states)
            states[2] = states[2] + 1e-3
            output.hidden_states = tuple(states)
        return output

    inner.forward = shifted
    with pytest.raises(
        PersonaError, match=r"residual read at layer 2 is not transformers' hidden_states\[2\]"
    ):
        check_model(wrap(module, folder), "shifted")


def test_a_model_that_gives_nan_is_rejected(module: Any, folder: Path) -> None:
    module.model.layers[4].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(PersonaError, match="'broken' is not finite at layer 5"):
        check_model(wrap(module, folder), "broken")


def test_a_model_that_gives_nan_is_told_that_it_is_not_finite(module: Any, folder: Path) -> None:
    module.model.layers[4].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(PersonaError, match=r"'broken' .*finite"):
        check_model(wrap(module, folder), "broken")


def test_a_model_without_the_names_is_rejected(module: Any, folder: Path) -> None:
    names = {key: name for key, name in STANDARD_NAMES.items() if name != "attn"}
    with pytest.raises(
        PersonaError,
        match=r"'nameless' \(LlamaForCausalLM\) is not supported: .*answers to layers\[0\]\.attn",
    ):
        check_model(wrap(module, folder, **names), "nameless")
    names = {key: name for key, name in STANDARD_NAMES.items() if name != "final_norm"}
    with pytest.raises(PersonaError, match="no module that answers to final_norm"):
        check_model(wrap(module, folder, **names), "nameless")


def test_a_model_that_changes_its_embedding_before_the_first_block_is_rejected(
    make_folder: Callable[..., Path],
) -> None:
    folder = make_folder("gpt2")
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    check_model(wrap(module, folder), "positions")
    # Without the name of what adds them, the positions come from nowhere.
    names = {key: name for key, name in STANDARD_NAMES.items() if name != "embed_dropout"}
    with pytest.raises(PersonaError, match="is not what its embedding puts out"):
        check_model(wrap(module, folder, **names), "positions")
