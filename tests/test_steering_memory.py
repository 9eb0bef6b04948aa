"""What the cache remembers of steering, against plain transformers on every supported architecture.

What is expected comes from `plain_turns`, which shares nothing with the library.
"""

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr
from nnsight import TransformersModel
from plain_turns import Talk, scores
from random_models import ARCHITECTURES, architectures
from torch import Tensor
from transformers import PreTrainedModel

import persona_nns as pn
from persona_nns.errors import UsageError
from persona_nns.traits.vectors import write_vector

architecture = architectures(*ARCHITECTURES)
LAYER, ALPHAS, SYSTEM = 2, (0.0, 1.5), "Be rude, and say so."
TALKS: dict[str, Talk] = {
    "long": [
        ("system", "Be kind."),
        ("user", "Hello there, how is the weather today?"),
        ("assistant", "Rain, and more of it than I can say in one sentence!"),
        ("user", " \n"),
        ("assistant", "Sun."),
        ("user", "Sun."),
        ("assistant", "Then let us go for a walk, you and I."),
    ],
    "short": [("user", "Sun."), ("assistant", " And the moon. \n")],
    "empty": [("user", "Sun."), ("assistant", ""), ("user", "Well?"), ("assistant", "Well.")],
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
    talks = [
        {"id": name, "messages": [{"role": role, "content": text} for role, text in talk]}
        for name, talk in TALKS.items()
    ]
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)))
    return folder


@pytest.fixture(scope="module")
def given(model: TransformersModel, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return pn.run(
        "steering_memory",
        model,
        vector=str(files / "v.npy"),
        conversations=str(files / "talks.jsonl"),
        layers=str(LAYER),
        alphas=",".join(map(str, ALPHAS)),
        system=SYSTEM,
        store=tmp_path_factory.mktemp("given") / "s",
    ).isel(model=0)


def test_conditions_equal_explicit_caches_in_plain_transformers(
    model: TransformersModel, plain: Any, vector: Tensor, given: xr.Dataset
) -> None:
    assert given.logp.dims == ("conversation", "turn", "condition", "alpha")
    conditions = ["none", "steered", "clean_kv", "dirty_kv", "system"]
    assert given.condition.values.tolist() == conditions
    assert set(given.data_vars) == {"logp", "kl", "n_tokens", "seconds", "completed"}
    scored: set[tuple[str, int]] = set()
    for name, talk in TALKS.items():
        for alpha in ALPHAS:
            add = {LAYER: lambda hidden, step=alpha * vector[LAYER]: hidden + step}
            of_turn = scores(plain, model.tokenizer, talk, add, SYSTEM)
            for turn, of_condition in of_turn.items():
                ours = given.sel(conversation=name, turn=turn, alpha=alpha)
                for condition, (logp, kl) in of_condition.items():
                    at = ours.sel(condition=condition)
                    assert float(at.logp) == pytest.approx(logp, abs=1e-3)
                    assert float(at.kl) == pytest.approx(kl, abs=1e-3)
                scored.add((name, turn))
            if alpha and name == "long":  # the five are five
                for one, other in combinations(conditions, 2):
                    apart = [abs(at[one][0] - at[other][0]) for at in of_turn.values()]
                    assert max(apart) > 3e-3
    missing = given.logp.isnull() & given.kl.isnull()
    assert (given.logp.isnull() == given.kl.isnull()).all()
    for name in TALKS:
        for turn in given.turn.values.tolist():
            there = (name, turn) in scored
            assert bool(missing.sel(conversation=name, turn=turn).all()) == (not there)
            assert bool(missing.sel(conversation=name, turn=turn).any()) == (not there)


def test_without_a_coefficient_all_but_the_system_text_are_equal(given: xr.Dataset) -> None:
    zero = given.sel(alpha=0.0)
    others = zero.sel(condition=["none", "steered", "clean_kv", "dirty_kv"])
    spread = others.logp.max("condition") - others.logp.min("condition")
    assert float(spread.max()) < 1e-5
    assert float(others.kl.max()) < 1e-6
    assert float(zero.kl.sel(condition="system").max()) > 1e-2
    assert float(given.kl.sel(condition="clean_kv").max()) == pytest.approx(0, abs=1e-7)
    unmoved = given.logp.sel(condition=["none", "system"])
    assert float((unmoved.max("alpha") - unmoved.min("alpha")).max()) < 1e-5


def test_runs_at_other_layers_are_other_results(
    random_model: Callable[[str], TransformersModel], files: Path, tmp_path: Path
) -> None:
    model = random_model("qwen2")
    given: dict[str, Any] = {
        "vector": str(files / "v.npy"),
        "conversations": str(files / "talks.jsonl"),
    }
    given |= {"alphas": "2", "store": str(tmp_path / "s")}
    apart = [pn.run("steering_memory", model, layers=layers, **given) for layers in ("1", "3")]
    both = pn.run("steering_memory", model, layers="1,3", **given)
    steered = [float(ds.logp.sel(condition="steered").sum()) for ds in (*apart, both)]
    assert len({round(each, 3) for each in steered}) == 3
    unsteered = [float(ds.logp.sel(condition="none").sum()) for ds in (*apart, both)]
    assert max(unsteered) - min(unsteered) < 1e-4
    for ds in (*apart, both):
        again = pn.open_results(tmp_path / "s", "steering_memory", run=ds.attrs["run"])
        xr.testing.assert_identical(again.logp, ds.logp)
    with pytest.raises(UsageError, match="Several runs of the model"):
        pn.open_results(tmp_path / "s", "steering_memory")
    assert bool(both.logp.sel(condition="system").isnull().all())  # nobody gave a system text
