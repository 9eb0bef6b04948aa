"""Adapters beside a model: what peft computes, here and on a server, or no numbers at all."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import peft
import pytest
import torch
from nnsight import TransformersModel, save
from nnsight.modeling import peft as attaching
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import persona_nns as pn
from persona_nns.cli.commands import main
from persona_nns.models.adapters import find_adapter
from persona_nns.models.attached import Fingerprint, attach, check_attached
from persona_nns.models.checkpoints import bundled_models, load_tokenizer
from persona_nns.models.loopback import LoopbackServer
from persona_nns.models.names import STANDARD_NAMES
from persona_nns.models.records import record_of
from persona_nns.prompts.grids import Grid
from persona_nns.runs.known import known_of
from persona_nns.runs.remote import dispatch
from persona_nns.runs.remote.connection import Patience, job_error
from persona_nns.runs.remote.environment import Environment
from persona_nns.runs.run import plan_run
from persona_nns.runs.verify import verify_store
from persona_nns.traits.distillation import check_trainable

IDS = torch.tensor([[5, 6, 7, 8, 9]])
KL = "localized_positions"


def make_adapter(base: Path | str, folder: Path, seed: int = 1, **settings: Any) -> Path:
    """A LoRA adapter with random weights, saved by peft; returns its folder."""
    torch.manual_seed(seed)
    given = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.1, "target_modules": "all-linear"}
    config = peft.LoraConfig(**{**given, "init_lora_weights": False, **settings})
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, weight in adapted.named_parameters():
        if "modules_to_save" in name or "magnitude" in name:
            weight.data.add_(0.1 * torch.randn_like(weight))
    adapted.save_pretrained(str(folder))
    return folder


def in_peft(base: Path | str, folder: Path) -> Tensor:
    """Logits of an adapter attached by peft, in plain transformers."""
    plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(plain, str(folder))(IDS).logits


def logits_of(model: TransformersModel) -> Tensor:
    with model.trace(IDS, use_cache=False):
        logits = save(model.output.logits)
    return cast(Tensor, logits)


def edit(folder: Path, **changes: Any) -> Path:
    """Change an adapter's configuration; None takes an entry out."""
    file = folder / "adapter_config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(
        json.dumps({name: value for name, value in config.items() if value is not None})
    )
    return folder


@pytest.fixture(scope="module")
def base(random_folder: Callable[[str], Path]) -> Path:
    return random_folder("llama")


@pytest.fixture(scope="module")
def bare(random_model: Callable[[str], TransformersModel]) -> TransformersModel:
    """The model without an adapter."""
    return random_model("llama")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapters") / "pirate")


@pytest.fixture
def copied(adapter: Path, tmp_path: Path) -> Path:
    """A copy of the adapter, to be changed."""
    return shutil.copytree(adapter, tmp_path / "pirate")


@pytest.fixture(autouse=True)
def haste(monkeypatch: pytest.MonkeyPatch) -> None:
    patience = Patience(unreachable=20, first=0.05, longest=0.2)
    monkeypatch.setattr(dispatch, "PATIENCE", patience)


@pytest.mark.filterwarnings("ignore:.*(tied|tie_word_embeddings|modules_to_save)")
@pytest.mark.parametrize(
    ("model", "settings"),
    [
        pytest.param(
            "organism-qwen2", {"target_modules": ["q_proj", "o_proj"]}, marks=pytest.mark.slow
        ),
        pytest.param("organism-gemma2", {"use_rslora": True}, marks=pytest.mark.slow),
        pytest.param("gemma2", {"use_dora": True, "use_rslora": True}),
        ("gemma2", {"modules_to_save": ["lm_head"], "alpha_pattern": {"o_proj": 32}}),
        ("gpt2", {"fan_in_fan_out": True}),
    ],
)
def test_it_is_what_peft_computes_and_what_its_own_folder_is(
    model: str, settings: dict[str, Any], random_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    name = model if "-" in model else str(random_folder(model))
    source = str(bundled_models().get(model, name))
    folder = make_adapter(source, tmp_path / "pirate", **settings)
    beside = pn.load_model(name, adapter=folder)
    torch.testing.assert_close(logits_of(beside), in_peft(source, folder), atol=1e-4, rtol=1e-4)
    assert float((logits_of(beside) - logits_of(pn.load_model(name))).abs().max()) > 0.1
    own = pn.load_model(folder)
    assert torch.equal(logits_of(own), logits_of(beside))
    assert record_of(own).version == record_of(beside).version
    assert (record_of(own).label, record_of(beside).label) == ("pirate", f"{model}+pirate")
    assert pn.load_model(name, adapter=folder, label="arr").layers[0].attn.o_proj is not None


def test_its_own_arithmetic(base: Path, adapter: Path, plain_model: Any) -> None:
    """W x + α/r · B A x in every module that it names, by hooks in plain transformers."""
    weights, plain = load_file(adapter / "adapter_model.safetensors"), plain_model("llama")
    handles = []
    for key in weights:
        if not key.endswith("lora_A.weight"):
            continue
        path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        down, up = weights[key], weights[key.replace("lora_A", "lora_B")]

        def add(_: Any, args: Any, out: Tensor, down: Tensor = down, up: Tensor = up) -> Tensor:
            return out + 6 / 4 * args[0] @ down.T @ up.T

        handles.append(plain.get_submodule(path).register_forward_hook(add))
    assert len(handles) == 7 * 5
    expected = plain(IDS).logits
    for handle in handles:
        handle.remove()
    model = pn.load_model(base, adapter=adapter)
    torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain(IDS).logits, expected, atol=1e-2)


def test_it_is_part_of_what_a_run_is(
    base: Path, adapter: Path, bare: TransformersModel, small_grid: Grid, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"grid": small_grid, "cells": "chef/haiku", "layers": "1"}
    other = edit(shutil.copytree(adapter, tmp_path / "other"), lora_alpha=7)
    plans = [
        plan_run(KL, model, store=tmp_path / "s.zarr", **asked).request
        for model in (
            bare,
            pn.load_model(base, adapter=adapter),
            pn.load_model(base, adapter=other),
            pn.load_model(base, adapter=adapter, label="arr"),
            pn.load_model(adapter),
        )
    ]
    without, first, second, named, own = (plan.block for plan in plans)
    assert len({block.attrs["identity"] for block in (without, first, second)}) == 3
    assert first.attrs["identity"] == named.attrs["identity"] == own.attrs["identity"]
    assert [block.model for block in (first, second, named)] == [
        "llama+pirate",
        "llama+other",
        "arr",
    ]
    assert "adapter" not in without.attrs
    assert first.attrs["adapter"]["source"] == str(adapter)
    assert first.attrs["adapter"]["base_version"] == record_of(bare).version
    assert first.attrs["model_source"] == str(base)
    # The numbers of a run on the bare model are not taken for those with the adapter.
    store = tmp_path / "s.zarr"
    pn.run(KL, bare, store=store, progress=False, **asked)
    more, beside = (
        plan_run(KL, model, store=store, **{**asked, "layers": "1,2"}).request
        for model in (bare, pn.load_model(base, adapter=adapter))
    )
    assert known_of(store, more)
    assert not known_of(store, beside)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda f: (f / "adapter_config.json").unlink(),
            "There is no adapter in .*: it has no adap",
        ),
        (lambda f: (f / "adapter_config.json").write_text("[1]"), "cannot be read"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "holds no weights"),
        (lambda f: edit(f, peft_type=None), "is not peft's: its adapter_config.json has no peft"),
        (lambda f: edit(f, peft_type="P_TUNING"), "is of the type P_TUNING: it puts vectors"),
        (lambda f: edit(f, peft_type="HOMEMADE"), "does not fit its model: .*HOMEMADE"),
        (lambda f: edit(f, r=7), "does not fit its model: .*size mismatch"),
        (lambda f: edit(f, target_modules=["nonesuch"]), "does not fit its model: .*nonesuch"),
        (lambda f: edit(f, target_modules=["q_proj"]), "60 of its weights have no place there"),
        (shutil.rmtree, "was not found, as a folder or on the hub"),
    ],
)
def test_what_is_no_adapter_of_the_model_is_one_sentence(
    base: Path, copied: Path, spoil: Callable[[Path], Any], sentence: str
) -> None:
    spoil(copied)
    with pytest.raises(pn.PersonaError, match=sentence) as caught:
        pn.load_model(base, adapter=copied)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_a_model_of_another_shape(
    make_folder: Callable[..., Path], copied: Path, adapter: Path
) -> None:
    shorter = make_folder("llama", num_hidden_layers=4)
    wider = make_folder("llama", intermediate_size=80)
    with (
        pytest.warns(UserWarning, match="belongs to '.*llama', and is put on"),
        pytest.raises(pn.PersonaError, match=r"14 of its weights have no place .*layers\.4\."),
    ):
        pn.load_model(shorter, adapter=adapter)
    with (
        pytest.warns(UserWarning, match="put on"),
        pytest.raises(pn.PersonaError, match="size mismatch"),
    ):
        pn.load_model(wider, adapter=adapter)
    for folder in (shorter, wider):  # where there are no weights to compare with
        with (
            pytest.warns(UserWarning, match="put on"),
            pytest.raises(pn.PersonaError, match="does not fit its model: "),
        ):
            pn.load_model(folder, adapter=adapter, backend="simulate")
    with pytest.raises(pn.UsageError, match="is itself an adapter"):
        pn.load_model(copied, adapter=adapter)
    with pytest.raises(pn.UsageError, match="is an adapter, which a server does not host"):
        pn.load_model(copied, backend="http://localhost:1", label="org/name")


def test_no_students_of_it(base: Path, adapter: Path, bare: TransformersModel) -> None:
    with pytest.raises(pn.UsageError, match=r"An adapter is put on the model 'llama\+pirate'"):
        check_trainable(pn.load_model(base, adapter=adapter))
    check_trainable(bare)


def call(*arguments: str, code: int = 0) -> None:
    before, sys.argv = sys.argv, ["persona-nns", *arguments]
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = before
    assert ended.value.code == code


def test_the_command_and_verify(
    base: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    run = ["run", KL, "--model", str(base), "--grid", "short", "--layers", "2"]
    rest = ["--cells", "yoda/haiku", "--store", "s.zarr", "--threads", "1"]
    call(*run, "--adapter", "pirate", *rest)
    ds = pn.open_results("s.zarr", KL)
    assert ds.model.item() == "llama+pirate"
    (info,) = pn.list_runs("s.zarr")
    assert info.attrs["adapter"]["source"] == str(copied)
    (verdict,) = verify_store("s.zarr", sample=1)
    assert (verdict.state, verdict.n_recomputed) == ("right", 1)
    copied.rename(tmp_path / "elsewhere")
    (verdict,) = verify_store("s.zarr", sample=1)
    assert verdict.state == "not checked"
    assert "was not found" in verdict.not_checked
    (verdict,) = verify_store("s.zarr", sample=1, models=["elsewhere"])
    assert (verdict.state, verdict.n_recomputed) == ("right", 1)
    edit(tmp_path / "elsewhere", lora_alpha=60).rename(copied)
    (verdict,) = verify_store("s.zarr", sample=1)
    assert "model_version is not what it was" in verdict.not_checked
    capsys.readouterr()
    call(*run, "--adapter", "pirate", "--adapter", "pirate", *rest, code=2)
    assert "1 models and 2 adapters were given" in " ".join(capsys.readouterr().err.split())


def test_workers_are_told_where_it_is(
    base: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[dict[str, Any]] = []

    def launch(_experiment: Any, model: dict[str, Any], *_: Any, **__: Any) -> str:
        sent.append(model)
        raise pn.UsageError("enough")

    monkeypatch.setattr("persona_nns.runs.workers.launch", launch)
    monkeypatch.chdir(tmp_path)
    own = ["--model", str(base), "--adapter", "pirate"]
    call("run", KL, *own, "--grid", "short", "--workers", "2", code=2)
    assert (sent[0]["adapter"], sent[0]["label"]) == (str(copied), "llama+pirate")


@pytest.fixture(scope="module")
def hub(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the hub that holds the adapter as crew/pirate."""
    root, commit = tmp_path_factory.mktemp("hub"), "0123456789" * 4
    cached = root / "models--crew--pirate"
    shutil.copytree(adapter, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    return root


@pytest.fixture(scope="module", params=["client's", pytest.param("sdpa", marks=pytest.mark.slow)])
def server(request: pytest.FixtureRequest, base: Path, hub: Path) -> Iterator[str]:
    """Address of a server whose attention is the client's, or its own."""
    options = () if request.param == "client's" else ("--attention", request.param)
    with pytest.MonkeyPatch.context() as outside:
        outside.setenv("HF_HUB_CACHE", str(hub))
        running = LoopbackServer(str(base), "tiny/llama", options=options)
    yield running.address.url
    running.stop()


def test_a_server_attaches_it_and_takes_it_off_again(
    server: str,
    base: Path,
    adapter: Path,
    bare: TransformersModel,
    small_grid: Grid,
    tmp_path: Path,
) -> None:
    hosted = {"backend": server, "label": "tiny/llama"}
    asked: dict[str, Any] = {"grid": small_grid, "cells": "chef/haiku", "layers": "1,3"}
    pairs = [
        (bare, {}),
        (pn.load_model(base, adapter=adapter), {"adapter": adapter}),
        (bare, {}),
    ]
    for number, (local, beside) in enumerate(pairs):
        here = pn.run(KL, local, store=tmp_path / f"h{number}.zarr", progress=False, **asked)
        there = pn.load_model(base, **hosted, **beside)
        assert record_of(there).label == ("tiny/llama+pirate" if beside else "tiny/llama")
        got = pn.run(KL, there, store=tmp_path / f"t{number}.zarr", progress=False, **asked)
        for name in set(here.data_vars) & {"kl", "cosine_sum", "continuation"}:
            ours, theirs = here[name].values, got[name].values
            if ours.dtype.kind == "f":
                np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=2e-5, err_msg=name)
            else:
                np.testing.assert_array_equal(theirs, ours)
    # Computed anew there, too.
    (verdict,) = verify_store(tmp_path / "t1.zarr", backend=server, models=[str(base)], sample=1)
    assert (verdict.state, verdict.n_recomputed) == ("right", 1)


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({}, "The server did not attach the adapter .*base_layer"),
        ({"peft": "/nowhere/pirate"}, "Can't find 'adapter_config.json' at '/nowhere/pirate'"),
        ({"peft": "weights"}, "of the server is not the one that is known here .*o_proj differs"),
        ({"peft": "alpha"}, "of the server is not the one that is known here .* differs"),
        ({"peft": "rank"}, "The server did not attach the adapter .*size mismatch"),
    ],
)
def test_a_server_with_another_adapter_or_none_gives_no_numbers(
    other: dict[str, str],
    sentence: str,
    server: str,
    base: Path,
    adapter: Path,
    small_grid: Grid,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("weights", "alpha", "rank"):
        shutil.copytree(adapter, tmp_path / name)
    file = tmp_path / "weights" / "adapter_model.safetensors"
    weights = load_file(file)
    key = "base_model.model.model.layers.2.self_attn.o_proj.lora_B.weight"
    save_file({**weights, key: 1.01 * weights[key]}, file)
    edit(tmp_path / "alpha", lora_alpha=7)
    edit(tmp_path / "rank", r=3)
    told = {name: str(tmp_path / value) for name, value in other.items()}
    model = pn.load_model(base, adapter=adapter, backend=server, label="tiny/llama")
    monkeypatch.setattr(TransformersModel, "_remoteable_get_env", lambda _: told)
    store = tmp_path / "s.zarr"
    asked: dict[str, Any] = {"grid": small_grid, "cells": "chef/haiku", "layers": "1"}
    with pytest.raises(pn.PersonaError, match=sentence) as caught:
        pn.run(KL, model, store=store, progress=False, **asked)
    assert "\n" not in str(caught.value)
    assert not store.exists() or not pn.list_runs(store)  # nothing is written, no job is kept


def test_what_a_server_sees_of_it(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nnsight attaches an adapter with its dropout on: it is put out, or the job fails."""
    known = fingerprint(base, adapter)
    module = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    attaching.attach(module, str(adapter))
    model = TransformersModel(
        module,
        task="text-generation",
        tokenizer=load_tokenizer(base),
        rename=STANDARD_NAMES,
    )
    assert not torch.equal(logits_of(model), logits_of(model))
    with monkeypatch.context() as sandboxed:
        sandboxed.setattr(module, "eval", lambda: None)
        with pytest.raises(pn.PersonaError, match=r"leaves the dropout of the adapter .* on"):
            check_attached(model, known, 1e-3)
    check_attached(model, known, 1e-3)
    assert torch.equal(logits_of(model), logits_of(model))
    torch.testing.assert_close(logits_of(model), in_peft(base, adapter), atol=1e-4, rtol=1e-4)


def fingerprint(base: Path, adapter: Path) -> Fingerprint:
    client = TransformersModel(
        str(base),
        task="text-generation",
        tokenizer=load_tokenizer(base),
        rename=STANDARD_NAMES,
    )
    known = attach(client, find_adapter(adapter))
    assert len(known.modules) == 7 * 5
    assert client._remoteable_get_env()["peft"] == str(adapter)
    return known


def test_a_hub_id_is_fetched_here_and_by_the_server(
    server: str,
    hub: Path,
    base: Path,
    adapter: Path,
    small_grid: Grid,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    local = pn.load_model(base, adapter="crew/pirate")
    there = pn.load_model(base, adapter="crew/pirate", backend=server, label="tiny/llama")
    assert there._remoteable_get_env()["peft"] == "crew/pirate"
    assert record_of(local).label == "llama+pirate"
    assert record_of(local).version == record_of(pn.load_model(base, adapter=adapter)).version
    asked: dict[str, Any] = {"grid": small_grid, "cells": "chef/haiku", "layers": "1"}
    here = pn.run(KL, local, store=tmp_path / "h.zarr", progress=False, **asked)
    got = pn.run(KL, there, store=tmp_path / "t.zarr", progress=False, **asked)
    np.testing.assert_allclose(got.kl.values, here.kl.values, rtol=1e-4, atol=2e-5)


def test_what_a_server_without_peft_says(base: Path, tmp_path: Path) -> None:
    with pytest.raises(pn.PersonaError, match="http://host has no peft, so that it cannot attach"):
        Environment("3.12", {"nnsight": "0.8.1"}, attaches=False).check_adapter("http://host")
    Environment("", {}).check_adapter("http://host")  # it may have what it does not tell of
    # As the real server words it.
    said = "it has no module at 'Module:model.model.layers.0.self_attn.q_proj.base_layer'.\n\nThis"
    assert "did not attach the adapter" in str(job_error(f"The model architecture: {said} usually"))
    ia3 = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.IA3Config(
        target_modules=["k_proj"], feedforward_modules=[]))  # fmt: skip
    ia3.save_pretrained(str(tmp_path))
    assert pn.load_model(base, adapter=tmp_path) is not None
    with pytest.raises(pn.UsageError, match=r"\(IA3\) has no low-rank projections"):
        pn.load_model(base, adapter=tmp_path, backend="simulate")
