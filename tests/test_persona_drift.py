"""Projections of turns, against plain transformers on every supported architecture."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from nnsight import TransformersModel
from plain_turns import Talk, rendered
from random_models import ARCHITECTURES, architectures
from torch import Tensor
from transformers import PreTrainedModel

import persona_nns as pn
from persona_nns.cli.commands import main
from persona_nns.errors import UsageError
from persona_nns.traits.vectors import write_vector

architecture = architectures(*ARCHITECTURES)
TALKS: dict[str, Talk] = {
    "long": [
        ("system", "Be kind."),
        ("user", "Hello there, how is the weather today?"),
        ("assistant", "\n\nRain,  and more of it than I can say in one sentence! \n"),
        ("user", " \n"),
        ("assistant", "Sun."),
        ("user", "Sun."),
    ],
    "2": [("user", "Sun."), ("assistant", "")],
    "assistant": [("assistant", "assistant"), ("user", "user")],
}


@pytest.fixture(scope="module")
def vectors() -> dict[str, Tensor]:
    """Two directions; the first is none at one layer."""
    generator = torch.Generator().manual_seed(7)
    own = {name: torch.randn(6, 32, generator=generator) for name in ("axis", "calm")}
    own["axis"][1] = 0
    return own


@pytest.fixture(scope="module")
def files(vectors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, suffix in (("axis", "npy"), ("calm", "safetensors")):
        write_vector(vectors[name], folder / f"{name}.{suffix}")
    lines = []
    for name, talk in TALKS.items():
        messages = [{"role": role, "content": text} for role, text in talk]
        own = {"id": name, "messages": messages, "domain": "weather"}
        lines.append(json.dumps({"conversation": messages} if name == "2" else own))
    (folder / "talks.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def options(files: Path) -> dict[str, Any]:
    return {
        "direction": [str(files / "axis.npy"), str(files / "calm.safetensors")],
        "conversations": str(files / "talks.jsonl"),
    }


def expected(plain: Any, tokenizer: Any, talk: Talk, vectors: dict[str, Tensor]) -> Tensor:
    """[turn, layer, direction]; NaN where a turn has no tokens."""
    ids, spans = rendered(tokenizer, talk)
    output = plain(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    hidden = torch.stack(output.hidden_states)[:, 0].double()
    found = torch.full((len(talk), 6, 2), torch.nan, dtype=torch.float64)
    for turn, span in enumerate(spans):
        for k, vector in enumerate(vectors.values()):
            for layer in range(6):
                norm = vector[layer].norm()
                unit = vector[layer].double() / (norm if norm else 1)
                if span:
                    found[turn, layer, k] = (hidden[layer, slice(*span)] @ unit).mean()
    return found


def test_projections_are_means_over_the_turns_of_plain_hidden_states(
    random_model: Callable[[str], TransformersModel],
    plain_model: Callable[[str], PreTrainedModel],
    architecture: str,
    vectors: dict[str, Tensor],
    options: dict[str, Any],
    tmp_path: Path,
) -> None:
    model, plain = random_model(architecture), plain_model(architecture)
    ds = pn.run("persona_drift", model, store=tmp_path / "s", **options).isel(model=0)
    assert ds.projection.dims == ("conversation", "turn", "layer", "direction")
    assert ds.conversation.values.tolist() == ["long", "2", "assistant"]
    assert ds.turn.values.tolist() == list(range(6))
    assert ds.direction.values.tolist() == ["axis", "calm"]
    assert ds.layer.values.tolist() == list(range(6))
    assert ds.domain.values.tolist() == ["weather", "", "weather"]
    assert set(ds.data_vars) == {"projection", "n_tokens", "speaker", "seconds", "completed"}
    for name, talk in TALKS.items():
        at, end = ds.sel(conversation=name), 6 - len(talk)
        theirs = expected(plain, model.tokenizer, talk, vectors)
        ours = at.projection.values
        np.testing.assert_allclose(ours[: len(talk)], theirs, atol=1e-4)
        assert np.isnan(ours[len(talk) :]).all()
        spans = rendered(model.tokenizer, talk)[1]
        counts = [span[1] - span[0] if span else 0 for span in spans]
        np.testing.assert_array_equal(at.n_tokens, [*counts, *[np.nan] * end])
        assert at.speaker.values.tolist() == [*(role for role, _ in talk), *[""] * end]
    assert (ds.projection.sel(direction="axis", layer=1).fillna(0) == 0).all()
    spread = ds.projection.sel(direction="calm").std("turn")
    assert float(spread.isel(conversation=0, layer=3)) > 1e-2


def test_a_batch_changes_nothing_and_a_killed_run_goes_on(
    random_model: Callable[[str], TransformersModel],
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_model("gemma3")
    whole = pn.run("persona_drift", model, store=tmp_path / "a", **options)
    measured: list[int] = []
    runs = sys.modules["persona_nns.runs.run"]
    plainly = runs.measure_batch

    def killed(request: Any, model: Any, units: Any, execution: Any) -> Any:
        if measured:
            raise KeyboardInterrupt
        measured.append(len(units))
        return plainly(request, model, units, execution)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "measure_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            pn.run("persona_drift", model, store=tmp_path / "b", batch_size=1, **options)
    held = pn.open_results(tmp_path / "b", "persona_drift")
    assert int(held.completed.sum()) == 1
    kept = whole.projection.where(held.completed)
    xr.testing.assert_allclose(held.projection, kept, atol=1e-5)
    again = pn.run("persona_drift", model, store=tmp_path / "b", batch_size=1, **options)
    assert again.attrs["run"] == held.attrs["run"] == whole.attrs["run"]
    xr.testing.assert_allclose(again.projection, whole.projection, atol=1e-5)
    xr.testing.assert_equal(again[["n_tokens", "speaker"]], whole[["n_tokens", "speaker"]])


def test_the_command_takes_several_directions_and_a_folder_of_transcripts(
    random_folder: Callable[[str], Path],
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "transcripts"
    folder.mkdir()
    shutil.copy(files / "talks.jsonl", folder)
    own = {"domain": "tea", "turns": 30, "conversation": [{"role": "user", "content": "Tea?"}]}
    (folder / "tea.json").write_text(json.dumps(own))
    directions = [str(files / "axis.npy"), "--direction", str(files / "calm.safetensors")]
    command = ["run", "persona_drift", "--model", str(random_folder("qwen2")), "--direction"]
    command += [*directions, "--conversations", str(folder), "--store", str(tmp_path / "s.zarr")]
    monkeypatch.setattr(sys, "argv", ["persona-nns", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "projection" in capsys.readouterr().out
    ds = pn.open_results(tmp_path / "s.zarr", "persona_drift")
    assert ds.conversation.values.tolist() == ["long", "2", "assistant", "tea"]
    assert ds.domain.values.tolist() == ["weather", "", "weather", "tea"]
    assert ds.direction.values.tolist() == ["axis", "calm"]


def test_a_direction_of_another_width_and_a_conversation_that_is_none(
    random_model: Callable[[str], TransformersModel],
    options: dict[str, Any],
    tmp_path: Path,
) -> None:
    model = random_model("qwen2")
    write_vector(torch.ones(6, 16), tmp_path / "narrow.npy")
    given = {**options, "direction": [str(tmp_path / "narrow.npy")], "store": tmp_path / "s"}
    with pytest.raises(UsageError, match=r"has 6 layers of width 16, .* needs 6 of width 32"):
        pn.run("persona_drift", model, **given)
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "tool", "content": "x"}]}\n')
    given = {**options, "conversations": str(tmp_path / "bad.jsonl"), "store": tmp_path / "s"}
    with pytest.raises(UsageError, match=r"said by 'tool', and not by .*: line 1 of '.*bad.jsonl'"):
        pn.run("persona_drift", model, **given)
    assert not (tmp_path / "s").exists()
