"""Every experiment gives the same numbers on a model in halves, on two devices.

The devices are pretended (`pretended_devices`): where tensors of two of them meet, there is an
error, as there would be on two GPUs.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from everywhere import CASES, HERE_ONLY, ON_A_GRID, compare, on_grid
from random_models import N_LAYERS, save_random_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import persona_nns as pn
from persona_nns.cli.run_options import runs_asked
from persona_nns.declarations.catalog import load_experiment
from persona_nns.errors import PersonaError, UsageError
from persona_nns.models import outline_model, record_of
from persona_nns.runs import plan_run
from persona_nns.traits import distillation

ROOT = Path(__file__).parents[1]
ALL = [name for name in ON_A_GRID if name not in HERE_ONLY] + [str(case) for case in CASES]
#: Caches, layers that are resumed, all layers read at once, generation, edits while it speaks.
TELLING = ["localized_positions", "persona_accuracy", "trait_vectors", "trait_steering-generated"]


def run_spread(folder: Path, model: Path, *asked: str) -> dict[str, Any]:
    (folder / "run").mkdir()
    command = [sys.executable, "-W", "ignore", "tests/spread_run.py", str(folder / "run")]
    done = subprocess.run(
        [*command, str(model), *asked], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(told: dict[str, Any]) -> None:
    assert told.pop("devices") == ["pretended:0", "pretended:1"]
    wrong = {name: what for name, what in told.items() if isinstance(what, str)}
    assert not wrong, "\n".join(wrong.values())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("llama"), "llama", eos_token_id=None)


def test_halves_give_the_same_numbers_and_greedy_steps_wait_no_more_than_they_must(
    tmp_path: Path, llama: Path
) -> None:
    told = run_spread(tmp_path, llama, "--waits", *TELLING)
    few, many = told.pop("waits")
    few_alone, many_alone = told.pop("of transformers")  # it asks whether all rows have ended
    steps = many_alone - few_alone
    assert steps == 10
    assert many - few == steps + 10  # nnsight takes what is said from each step, at the same moment
    check(told)


@pytest.mark.slow
def test_every_experiment_runs_in_halves(tmp_path: Path, llama: Path) -> None:
    check(run_spread(tmp_path, llama, *(name for name in ALL if name not in TELLING)))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gemma2", "gpt2", "gpt_neox"])
def test_other_architectures_run_in_halves(tmp_path: Path, architecture: str) -> None:
    (tmp_path / "model").mkdir()
    model = save_random_model(tmp_path / "model", architecture)
    check(run_spread(tmp_path, model, *TELLING))


def test_devices_that_meet_are_an_error() -> None:
    code = (
        "import torch; from pretended_devices import pretended\n"
        "with pretended() as waits:\n"
        "    one, other = (torch.ones(2, device=f'pretended:{k}') for k in (0, 1))\n"
        "    try: one + other\n"
        "    except RuntimeError as error: print(error)\n"
        "    print((one + other.to(one.device)).tolist(), waits.total())\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": "tests", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "on one device, found ['pretended:0', 'pretended:1']" in said
    assert said.endswith("[2.0, 2.0] 1\n")


def loading(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What transformers is given for each model from now on; it quantises none of them."""
    given: list[dict[str, Any]] = []
    load = AutoModelForCausalLM.from_pretrained

    def loads(*args: Any, **how: Any) -> Any:
        given.append(how)
        return load(*args, **{name: how[name] for name in how if name != "quantization_config"})

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loads)
    return given


def test_a_device_map_is_passed_on_and_leaves_identities_alone(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = loading(monkeypatch)
    spread, whole = pn.load_model(llama, device_map="auto"), pn.load_model(llama)
    assert [how.get("device_map") for how in given] == ["auto", None]
    runs = [
        plan_run("localized_positions", model, "short", store=tmp_path / "s.zarr")
        for model in (spread, whole)
    ]
    assert len({planned.request.block.attrs["identity"] for planned in runs}) == 1


def test_blocks_that_are_left_on_disk_give_the_same_numbers(tmp_path: Path, llama: Path) -> None:
    """By accelerate's own hooks: their weights are fetched for each pass, and are nowhere else."""
    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    blocks = {f"model.layers.{k}": "disk" if k > 2 else "cpu" for k in range(N_LAYERS)}
    results = []
    for device_map in (None, dict.fromkeys(parts, "cpu") | blocks):
        model = pn.load_model(llama, device_map=device_map)
        store = tmp_path / f"{len(results)}.zarr"
        options = on_grid("localized_positions")
        results.append(pn.run("localized_positions", model, store=store, **options))
    assert {str(device) for device in model.devices} == {"cpu", "meta"}
    assert compare(*results, atol=1e-6) < 1e-6


def test_quantised_weights_are_another_model(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without bitsandbytes: what transformers is given, and what is written down of it."""
    given = loading(monkeypatch)
    monkeypatch.setattr("persona_nns.models.placement.find_spec", lambda _: True)
    kept = pn.load_model(llama, quantise="nf4", dtype="bfloat16", device="cpu")
    whole = pn.load_model(llama, dtype="bfloat16")
    settings = given[0]["quantization_config"]
    assert given[0]["device_map"] == {"": torch.device("cpu")}
    assert (settings.load_in_4bit, settings.bnb_4bit_quant_type) == (True, "nf4")
    assert settings.bnb_4bit_compute_dtype is torch.bfloat16
    of, plain = record_of(kept), record_of(whole)
    assert of.quantisation == {"kind": "nf4", "base_version": plain.version}
    assert of.version != plain.version
    assert of.precision == plain.precision == "bfloat16"
    attrs, others = (
        plan_run("localized_positions", m, "short", store=tmp_path / "s").request.block.attrs
        for m in (kept, whole)
    )
    assert attrs["identity"] != others["identity"]
    assert attrs["quantisation"]["kind"] == "nf4"
    assert "quantisation" not in others
    outline = outline_model(llama, quantise="nf4", dtype="bfloat16")
    assert record_of(outline).version == of.version


def test_the_command_hands_both_on(llama: Path, tmp_path: Path) -> None:
    arguments = {"model": [str(llama)], "store": str(tmp_path / "s.zarr"), "grid": "short"}
    (asked,) = runs_asked(
        load_experiment("localized_positions"),
        {**arguments, "device_map": "auto", "quantise": "nf4"},
    )
    assert (asked.loading["device_map"], asked.loading["quantise"]) == ("auto", "nf4")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"device_map": "everywhere"}, "Unknown device map 'everywhere'; use auto, balanced"),
        ({"quantise": "int3"}, "Unknown quantisation 'int3'; use nf4"),
        ({"device_map": "auto", "device": "cpu"}, "leave out one of them"),
        ({"device_map": "auto", "backend": "simulate"}, "leave out --device-map with"),
        ({"quantise": "nf4", "backend": "simulate"}, "leave out --quantise with"),
    ],
)
def test_what_does_not_go_together_is_said(llama: Path, how: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        pn.load_model(llama, **how)


def test_without_bitsandbytes_it_is_said_what_to_install(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persona_nns.models.placement.find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"need bitsandbytes, .*'persona-nns\[quantise\]'\.$"):
        pn.load_model(llama, quantise="nf4")


def test_a_model_that_does_not_fit_on_its_device_is_one_sentence(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PreTrainedModel, "to", full)
    with pytest.raises(PersonaError, match=r"not fit into the memory of cpu; .*--device-map"):
        pn.load_model(llama, device="cpu")


def test_an_adapter_or_quantised_weights_are_not_quantised(
    llama: Path,
) -> None:
    from persona_nns.models.placement import placing

    config = AutoConfig.from_pretrained(llama)
    asked = ("m", config, "bfloat16", torch.device("cpu"), None, "nf4")
    with pytest.raises(UsageError, match="added into whole weights"):
        placing(*asked, has_adapter=True)
    config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(UsageError, match="quantised already; leave out --quantise nf4"):
        placing(*asked, has_adapter=False)


def test_a_quantised_teacher_has_no_students(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pn.load_model(llama, device="cpu")
    kept = replace(record_of(model), quantisation={"kind": "nf4"})
    monkeypatch.setattr(distillation, "record_of", lambda _: kept)
    with pytest.raises(UsageError, match="are quantised, and students are copies of whole ones"):
        distillation.check_trainable(model)


def test_an_embedding_that_no_device_holds_is_refused(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load: Any = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda *args, **how: ((found := load(*args, **how))[0].to("meta"), found[1]),
    )
    with pytest.raises(PersonaError, match="does not fit onto the devices"):
        pn.load_model(llama, device_map="auto")
