"""The space of roles against plain transformers and numpy, written from the protocol.

Rows are made so that roles differ in how many answers and questions they have.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from nnsight import TransformersModel
from plain_hooks import residuals
from random_models import crossed
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import persona_nns as pn
from persona_nns.organism.bundled import organism_folder

ROLES = ("default", "pirate", "ghost", "chef", "judge", "poet")
WORDS = "sea rope sauce law moon rhyme wind plate court night"
QUESTIONS = [f"What do you say of {word}?" for word in ("rain", "money", "home", "time", "love")]


def given_rows(n_samples: int = 1) -> list[dict[str, Any]]:
    """Answers of six roles to five questions, but for some; two system prompts each."""
    rng = np.random.default_rng(3)
    rows: list[dict[str, Any]] = []
    for number, role in enumerate(ROLES):
        own = WORDS.split()[2 * number % 10 :][:3]
        for k, question in enumerate(QUESTIONS):
            if (number + k) % 4 == 3:
                continue
            for system in ("", f"You are a {role}.")[: 1 + k % 2]:
                for _ in range(n_samples):
                    words = rng.choice([*own, *WORDS.split()], size=rng.integers(3, 9))
                    text = f"I say {' '.join(words)}."
                    row = {"role": role, "system": system, "question_id": 7 * k}
                    rows.append({**row, "question": question, "response": text})
    return rows


def write(folder: Path, rows: list[dict[str, Any]], name: str = "given.jsonl") -> str:
    (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(folder / name)


def plain_ids(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], int]:
    """Token ids of prompt and answer, and how many are the prompt's."""
    messages = [{"role": "user", "content": row["question"]}]
    if row["system"]:
        messages.insert(0, {"role": "system", "content": row["system"]})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert row["system"] in text
    except Exception:
        content = f"{row['system']}\n\n{row['question']}"
        messages = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    said = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
    return [*prompt, *said], len(prompt)


def plain_means(plain: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> np.ndarray:
    """[answer, layer, d_model]."""
    found = []
    for row in rows:
        ids, n_prompt = plain_ids(tokenizer, row)
        found.append(residuals(plain, ids)[:, n_prompt:].double().mean(1).numpy())
    return np.stack(found)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def means_by(x: np.ndarray, labels: np.ndarray, roles: list[str]) -> np.ndarray:
    return np.stack([x[labels == role].mean(0) for role in roles])


def plain_space(x: np.ndarray, rows: list[dict[str, Any]], roles: list[str]) -> dict[str, Any]:
    """Section 9 at a layer, for live roles; ``x`` is [answer, d_model]."""
    labels = np.array([row["role"] for row in rows])
    others = [role for role in roles if role != "default"]
    means = means_by(x, labels, others)
    m = means.mean(0)
    axis = x[labels == "default"].mean(0) - m
    _, s, vt = np.linalg.svd(means - m, full_matrices=False)
    n = min(10, len(others) - 1)
    component = vt[:n] * np.where(vt[:n] @ axis >= 0, 1, -1)[:, None]
    centred = means_by(x, labels, roles) - m
    return {
        "axis": axis,
        "component": component,
        "explained": s[:n] ** 2 / (s**2).sum(),
        "variance": ((means - m) ** 2).sum(1).mean(),
        "loading": centred @ component.T,
        "projection": centred @ unit(axis),
        "cos_roles": unit(centred) @ unit(centred).T,
        "cos_axis": component @ unit(axis),
    }


def plain_null(
    x: np.ndarray, rows: list[dict[str, Any]], roles: list[str], seed: int
) -> tuple[np.ndarray, float]:
    rng = np.random.default_rng(seed)
    others = [role for role in roles if role != "default"]
    labels = np.array([row["role"] for row in rows])
    kept = np.isin(labels, others)
    x, labels = x[kept], labels[kept]
    asked = np.array([row["question_id"] for row in rows])[kept]
    shares, variances = [], []
    for _ in range(200):
        drawn = labels.copy()
        for question in set(asked.tolist()):
            here = np.flatnonzero(asked == question)
            drawn[here] = labels[rng.permutation(here)]
        means = means_by(x, drawn, others)
        s = np.linalg.svd(means - means.mean(0), compute_uv=False)
        shares.append(s**2 / (s**2).sum())
        variances.append((s**2).sum() / len(others))
    n = min(10, len(others) - 1)
    return np.percentile(shares, 95, axis=0)[:n], float(np.percentile(variances, 95))


def plain_intervals(
    x: np.ndarray, rows: list[dict[str, Any]], roles: list[str], seed: int
) -> np.ndarray:
    rng = np.random.default_rng(seed)
    labels = np.array([row["role"] for row in rows])
    asked = np.array([row["question_id"] for row in rows])
    full = plain_space(x, rows, roles)["component"]
    found: list[np.ndarray] = []
    while len(found) < 200:
        drawn = rng.choice(np.unique(asked), size=len(np.unique(asked)))
        index = np.concatenate([np.flatnonzero(asked == question) for question in drawn])
        present = [role for role in roles if role in labels[index]]
        if "default" not in present or len(present) < 3:
            continue
        again = plain_space(x[index], [rows[k] for k in index], present)
        cosines = full @ again["component"].T
        best = np.abs(cosines).argmax(1)
        signs = np.sign(cosines[np.arange(len(full)), best])
        found.append(again["cos_axis"][best] * signs)
    return np.percentile(found, [2.5, 97.5], axis=0).T


@pytest.fixture(scope="module", params=["organism-qwen2", "organism-gemma2"])
def organism(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def measured(organism: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[xr.Dataset, Any]:
    """The space of the given rows, and their means by plain transformers."""
    folder = tmp_path_factory.mktemp("space")
    rows = given_rows()
    ds = pn.run(
        "persona_space", organism, responses=write(folder, rows), store=folder / "s.zarr"
    ).isel(model=0)
    plain = AutoModelForCausalLM.from_pretrained(organism_folder(organism), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(organism_folder(organism))
    return ds, plain_means(plain.eval().requires_grad_(False), tokenizer, rows)


def test_the_space_is_that_of_plain_numpy(measured: tuple[xr.Dataset, np.ndarray]) -> None:
    ds, x = measured
    rows, roles = given_rows(), list(ROLES)
    assert ds.role.values.tolist() == ds.other_role.values.tolist() == roles
    labels = np.array([row["role"] for row in rows])
    for layer in ds.layer.values:
        at = ds.sel(layer=layer)
        wanted = plain_space(x[:, layer], rows, roles)
        role_mean = means_by(x[:, layer], labels, roles)
        np.testing.assert_allclose(at.role_mean, role_mean, atol=1e-5)
        cosines = (at["component"].values * wanted.pop("component")).sum(1)
        assert cosines.min() > 0.9999, layer
        for name, value in wanted.items():
            np.testing.assert_allclose(at[name], value, atol=1e-4, err_msg=f"{name} at {layer}")
    assert ds["component"].dims == ("layer", "component", "d_model")
    assert ds.sizes["component"] == 4
    assert ds.n_kept.values.tolist() == [(labels == role).sum() for role in roles]
    # Towards the default, which is what the sign means.
    assert (ds.loading.sel(role="default") >= 0).all()
    assert (ds.cos_axis >= 0).all()


def test_nulls_and_intervals_are_those_of_another_shuffle(
    measured: tuple[xr.Dataset, np.ndarray],
) -> None:
    ds, x = measured
    rows, roles = given_rows(), list(ROLES)
    for layer in (1, 5):
        seeds = [plain_null(x[:, layer], rows, roles, seed) for seed in range(10)]
        for place, name in enumerate(("explained_null", "variance_null")):
            of_seeds = np.stack([seed[place] for seed in seeds])
            spread = 4 * of_seeds.std(0) + 0.01 * of_seeds.mean(0)
            assert (np.abs(ds[name].sel(layer=layer) - of_seeds.mean(0)) <= spread).all(), name
        found = np.stack([plain_intervals(x[:, layer], rows, roles, seed) for seed in range(10)])
        away = np.abs(ds.cos_axis_interval.sel(layer=layer) - found.mean(0))
        assert (away <= 4 * found.std(0) + 0.02).all()
    assert ds.cos_axis_interval.bound.values.tolist() == ["low", "high"]
    inside = ds.projection_interval.sel(bound="low") <= ds.projection_interval.sel(bound="high")
    assert inside.all()


@pytest.mark.parametrize("name", crossed("gemma2", "gpt2"))
def test_answer_means_of_every_architecture(
    name: str,
    random_model: Callable[[str], TransformersModel],
    plain_model: Callable[[str], PreTrainedModel],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    rows = given_rows()[::3]
    wanted = plain_means(plain_model(name), tokenizer, rows)
    for reuse in (True, False):
        given = {"responses": write(tmp_path, rows), "max_new_tokens": 1, "reuse": reuse}
        ds = pn.run(
            "persona_responses", random_model(name), store=tmp_path / f"{reuse}.zarr", **given
        ).isel(model=0)
        there = [
            (prompt, answer)
            for prompt in range(ds.sizes["prompt"])
            for answer in range(ds.sizes["answer"])
            if ds.response.values[prompt, answer]
        ]
        assert len(there) == len(rows)
        for prompt, answer in there:
            at = ds.isel(prompt=prompt, answer=answer)
            place = next(
                k
                for k, row in enumerate(rows)
                if (row["role"], row["system"], row["response"], str(row["question_id"]))
                == (
                    *(str(at[of].item()) for of in ("prompt_role", "prompt_system", "response")),
                    at.question_id.item(),
                )
            )
            np.testing.assert_allclose(at.answer_mean, wanted[place], atol=2e-5, rtol=1e-5)
