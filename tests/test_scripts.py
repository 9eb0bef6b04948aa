"""What a model answers turn by turn while an operation acts, token by token as without a cache."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight import TransformersModel
from plain_turns import Edit, Talk, answers, rendered, scores
from random_models import architectures
from torch import Tensor
from transformers import PreTrainedModel

import persona_nns as pn
from persona_nns.errors import UsageError
from persona_nns.traits.vectors import write_vector

architecture = architectures("qwen2", "gemma3", "gpt2")
SYSTEM, N_TOKENS = "Be rude, and say so.", 5
SCRIPTS = {
    "three": ["How is the day?", "And the night?", "Why?"],
    "two": ["Who are you, and what do you want?", "No."],
}
ACTS = {
    "none": (False, False),
    "steered": (True, True),
    "clean_kv": (False, True),
    "dirty_kv": (True, False),
    "system": (False, False),
}


@pytest.fixture(scope="module")
def model(random_model: Callable[[str], TransformersModel], architecture: str) -> TransformersModel:
    return random_model(architecture)


@pytest.fixture(scope="module")
def plain(plain_model: Callable[[str], PreTrainedModel], architecture: str) -> Any:
    return plain_model(architecture)


@pytest.fixture(scope="module")
def vector() -> Tensor:
    return 0.7 * torch.randn(6, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def files(vector: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_vector(vector, folder / "v.npy")
    lines = [json.dumps({"id": name, "turns": turns}) for name, turns in SCRIPTS.items()]
    (folder / "script.jsonl").write_text("\n".join(lines))
    return folder


def test_every_condition_answers_for_itself(
    model: TransformersModel, plain: Any, vector: Tensor, files: Path, tmp_path: Path
) -> None:
    alpha, add = 1.0, {2: lambda hidden: hidden + vector[2]}
    ours = pn.run(
        "steering_memory",
        model,
        vector=str(files / "v.npy"),
        script=str(files / "script.jsonl"),
        layers="2",
        alphas="1",
        system=SYSTEM,
        max_new_tokens=N_TOKENS,
        judge="none",
        store=tmp_path / "s",
    ).isel(model=0)
    assert set(ours.data_vars) == {"logp", "kl", "n_tokens", "text", "seconds", "completed"}
    for name, script in SCRIPTS.items():
        said = ours.text.sel(conversation=name, alpha=alpha)
        for condition, acts in ACTS.items():
            system = SYSTEM if condition == "system" else None
            expected = answers(plain, model.tokenizer, script, acts, add, N_TOKENS, system)
            texts = said.sel(condition=condition).values.tolist()
            assert texts[1 : 2 * len(script) : 2] == expected
            assert {*texts[::2], *texts[2 * len(script) :]} == {""}
        of_steered = said.sel(condition="steered").values.tolist()[1::2]
        talk: Talk = []
        for asked, answer in zip(script, of_steered, strict=False):
            talk += [("user", asked), ("assistant", answer)]
        for turn, of_condition in scores(plain, model.tokenizer, talk, add, SYSTEM).items():
            at = ours.sel(conversation=name, turn=turn, alpha=alpha)
            for condition, (logp, kl) in of_condition.items():
                assert float(at.logp.sel(condition=condition)) == pytest.approx(logp, abs=1e-3)
                assert float(at.kl.sel(condition=condition)) == pytest.approx(kl, abs=1e-3)
    said = ours.text.sel(alpha=alpha)
    whole = {(*said[0, :, k].values, *said[1, :, k].values) for k in range(len(ACTS))}
    assert len(whole) >= 3


@pytest.mark.parametrize(
    ("operation", "options", "edits", "reuse"),
    [
        ("none", {}, {}, True),
        ("add", {"alpha": 1.5}, {2: "add"}, True),
        ("add", {"alpha": 1.5}, {2: "add"}, False),
        ("cap", {"tau": -1.0, "layers": "1,3"}, {1: "cap", 3: "cap"}, True),
    ],
)
def test_drift_answers_under_an_operation_and_is_read_without_it(
    operation: str,
    options: dict[str, Any],
    edits: dict[int, str],
    reuse: bool,
    model: TransformersModel,
    plain: Any,
    vector: Tensor,
    files: Path,
    tmp_path: Path,
) -> None:
    def edit(kind: str, layer: int) -> Edit:
        v = vector[layer]
        unit = v / v.norm()
        if kind == "add":
            return lambda hidden: hidden + 1.5 * v
        return lambda hidden: hidden - ((hidden @ unit) + 1.0).clamp(min=0)[..., None] * unit

    ours = pn.run(
        "persona_drift",
        model,
        direction=[str(files / "v.npy")],
        script=str(files / "script.jsonl"),
        operation=operation,
        max_new_tokens=N_TOKENS,
        reuse=reuse,
        store=tmp_path / "s",
        **{"layers": "2", **options},
    ).isel(model=0, direction=0)
    unit = vector / vector.norm(dim=-1, keepdim=True)
    for name, script in SCRIPTS.items():
        own = {layer: edit(kind, layer) for layer, kind in edits.items()}
        expected = answers(plain, model.tokenizer, script, (True, True), own, N_TOKENS)
        at = ours.sel(conversation=name)
        n_turns = 2 * len(script)
        assert at.text.values.tolist()[1:n_turns:2] == expected
        assert at.text.values.tolist()[:n_turns:2] == script
        assert at.speaker.values.tolist()[:n_turns] == ["user", "assistant"] * len(script)
        talk = list(zip(at.speaker.values.tolist(), at.text.values.tolist(), strict=True))[:n_turns]
        ids, spans = rendered(model.tokenizer, talk)
        output = plain(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
        for turn, span in enumerate(spans):
            assert float(at.n_tokens[turn]) == (span[1] - span[0] if span else 0)
            for layer, hidden in enumerate(output.hidden_states):
                if span:
                    mean = float((hidden[0, slice(*span)] @ unit[layer]).mean())
                    assert float(at.projection[turn, layer]) == pytest.approx(mean, abs=1e-4)


def test_options_that_do_not_go_together(
    model: TransformersModel, files: Path, tmp_path: Path
) -> None:
    talk = tmp_path / "talk.jsonl"
    talk.write_text(json.dumps({"messages": [{"role": "user", "content": "Hello."}]}))
    given: dict[str, Any] = {"direction": [str(files / "v.npy")], "store": tmp_path / "s"}
    script = str(files / "script.jsonl")
    for options, message in (
        ({}, "Give either conversations"),
        ({"conversations": str(talk), "script": script}, "Give either conversations"),
        ({"conversations": str(talk), "operation": "add"}, "'add' acts while the model answers"),
        ({"script": script, "operation": "cap"}, "'cap' needs a threshold"),
        ({"script": script, "operation": "add", "tau": 1.0}, "'cap' needs a threshold"),
        ({"script": script, "direction": given["direction"] * 2}, "have the same name"),
    ):
        with pytest.raises(UsageError, match=message):
            pn.run("persona_drift", model, **{**given, **options})
    write_vector(torch.ones(4, 32), tmp_path / "w.npy")
    other = str(tmp_path / "w.npy")
    for direction, message in (
        ([*given["direction"], other], "they have to be of one shape"),
        ([other], "The vector has 4 layers of width 32, but the model"),
    ):
        options = {**given, "script": script, "direction": direction}
        with pytest.raises(UsageError, match=message):
            pn.run("persona_drift", model, **options)
    assert not (tmp_path / "s").exists()
