"""The space of roles against plain transformers and numpy, written from the protocol.

Rows are made so that roles differ in how many answers and questions they have.
"""

import json
import sys
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
from persona_nns.cli.commands import main
from persona_nns.declarations import load_experiment
from persona_nns.errors import UsageError
from persona_nns.figures import draw
from persona_nns.organism.bundled import organism_folder
from persona_nns.runs import verify_store
from persona_nns.traits import (
    RoleAnswers,
    RoleOptions,
    describe_space,
    read_role_responses,
    role_judging,
    role_space,
)
from persona_nns.traits.role_judging import role_score

ROLES: tuple[str, ...] = ("default", "pirate", "ghost", "chef", "judge", "poet")
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
    layer = 5
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


def test_roles_without_a_difference_lie_within_their_null() -> None:
    """Labels that are exchanged within each question are one more draw of the null."""
    rows, rng = given_rows(4), np.random.default_rng(1)
    roles = list(ROLES)
    asked = torch.tensor([row["question_id"] // 7 for row in rows])
    true = torch.tensor([roles.index(row["role"]) for row in rows])
    x = torch.tensor(rng.normal(size=(len(rows), 12)), dtype=torch.float32)
    x += torch.tensor(rng.normal(size=(6, 12)), dtype=torch.float32)[true]
    x += 2 * torch.tensor(rng.normal(size=(5, 12)), dtype=torch.float32)[asked]
    found = describe_space(RoleAnswers(true, asked, 6, 0, 2), x, seed=0)
    assert found["variance"] > 1.2 * found["variance_null"]
    above, axes = 0, []
    for _ in range(8):
        drawn = true.clone()
        for question in range(5):  # the default's labels too: so is the axis one by chance
            here = (asked == question).nonzero()[:, 0]
            drawn[here] = true[here[torch.tensor(rng.permutation(len(here)))]]
        again = describe_space(RoleAnswers(drawn, asked, 6, 0, 2), x, seed=0)
        above += int(again["variance"] > again["variance_null"])
        axes.append(float(again["axis"].norm()))
    assert above <= 2
    assert float(found["axis"].norm()) > max(axes)


@pytest.mark.usefixtures("few_draws")
def test_a_question_that_one_role_answers_tells_nothing_of_chance(tmp_path: Path) -> None:
    rows = given_rows()
    for row in rows:
        row |= {"question_id": f"{row['role']} {row['question_id']}"}
    options = {"responses": write(tmp_path, rows), "store": tmp_path / "s.zarr"}
    with pytest.warns(UserWarning, match="No question was put to two roles"):
        ds = pn.run("persona_space", "organism-qwen2", **options)
    np.testing.assert_allclose(ds.variance_null, ds.variance, rtol=1e-4)


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what does not look at nulls and intervals."""
    monkeypatch.setattr(role_space, "DRAWS", 5)


@pytest.fixture(scope="module")
def model() -> TransformersModel:
    return pn.load_model("organism-qwen2")


@pytest.mark.usefixtures("few_draws")
def test_scores_and_counts_decide_who_is_in(model: TransformersModel, tmp_path: Path) -> None:
    rows = given_rows()
    scores = {"pirate": 3, "ghost": 2, "chef": None, "judge": 1.5, "poet": 3}
    of_judge = [k for k, row in enumerate(rows) if row["role"] == "judge"]
    for k, row in enumerate(rows):
        if row["role"] != "default" and scores[row["role"]] is not None:
            row["score"] = 3 if k == of_judge[0] else scores[row["role"]]
    options = {"responses": write(tmp_path, rows), "store": tmp_path / "s.zarr"}
    with pytest.warns(UserWarning, match=r"Fewer than 2 answers count of ghost \(0 of 5\), judge"):
        ds = pn.run("persona_space", model, **options).isel(model=0)
    n = {role: sum(row["role"] == role for row in rows) for role in ROLES}
    kept = [n["default"], n["pirate"], 0, n["chef"], 1, n["poet"]]
    assert ds.n_kept.values.tolist() == kept
    assert ds.n_answers.values.tolist() == list(n.values())
    for name in ("role_mean", "loading", "projection", "cos_roles", "projection_interval"):
        dead = ds[name].isnull().all([dim for dim in ds[name].dims if dim != "role"])
        assert dead.values.tolist() == [False, False, True, False, True, False], name
    assert ds.sizes["component"] == 2
    one = pn.run("persona_space", model, min_answers=1, **options).isel(model=0)
    assert one.role_mean.sel(role="judge").notnull().all()
    assert one.sizes["component"] == 3
    low = pn.run("persona_space", model, keep=1, **options).isel(model=0)
    assert low.n_kept.values.tolist() == list(n.values())
    with pytest.warns(UserWarning, match=r"count of default \(5 of 5\), "):
        lost = pn.run("persona_space", model, keep=1, min_answers=6, **options).isel(model=0)
    assert lost.axis.isnull().all()
    assert lost.cos_axis_interval.isnull().all()
    assert lost.explained.notnull().all()
    # The live roles are as if the others had never been.
    live = [row for row in rows if row["role"] not in ("ghost", "judge")]
    alone = pn.run(
        "persona_space", model, **{**options, "responses": write(tmp_path, live, "live.jsonl")}
    ).isel(model=0)
    for name in ("axis", "component", "explained", "variance", "cos_axis"):
        np.testing.assert_allclose(ds[name], alone[name], atol=1e-5, err_msg=name)


ASK = {"grid": "short", "max_new_tokens": 10, "n_samples": 2}


@pytest.mark.usefixtures("few_draws")
def test_reuse_changes_no_answer_and_a_killed_run_goes_on(
    model: TransformersModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pn.run("persona_responses", model, store=tmp_path / "p.zarr", reuse=False, **ASK)
    module = sys.modules[load_experiment("persona_responses").measure.__module__]
    asked: list[int] = []
    answer = module.answer

    def dies(model: Any, prompts: Any, *rest: Any) -> Any:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(prompts.rows))
        return answer(model, prompts, *rest)

    monkeypatch.setattr(module, "answer", dies)
    store = tmp_path / "s.zarr"
    with pytest.raises(KeyboardInterrupt):
        pn.run("persona_responses", model, store=store, batch_size=1, **ASK)
    assert int(pn.open_results(store, "persona_responses").completed.sum()) == 2
    asked[:] = [0] * 3
    ds = pn.run("persona_space", model, store=store, **ASK).isel(model=0)
    assert sum(asked) == 24  # three of five were left
    there = pn.open_results(store, "persona_responses")
    assert (there.response.values == plain.response.values).all()
    np.testing.assert_allclose(there.answer_mean, plain.answer_mean, atol=2e-5, rtol=1e-5)
    assert len({*there.response.values.ravel().tolist()}) > 20
    assert ds.role.values.tolist() == ["default", "buffett", "marx", "yoda", "angelou"]
    assert sorted(set(ds.answer_question_id.values.tolist())) == sorted(
        ["baseline", "policy", "haiku", "recommend"]
    )
    assert ds.answer_system.values[-1].startswith("You are ")
    # What was made, given back, is the same space.
    names = ("role", "system", "question_id", "question", "response")
    columns = [ds[f"answer_{name}"].values.tolist() for name in names]
    rows: list[dict[str, Any]] = [
        dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)
    ]
    given = write(tmp_path, [row for row in rows if row["response"]])
    again = pn.run("persona_space", model, store=tmp_path / "g.zarr", responses=given)
    for name in ("axis", "component", "variance", "variance_null"):
        np.testing.assert_allclose(again[name].isel(model=0), ds[name], atol=1e-4, err_msg=name)


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize("sampled", [True, False])
def test_a_server_gives_the_same_space(sampled: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"grid": "short", "max_new_tokens": 5, "temperature": 0}
    if not sampled:
        options = {"responses": write(tmp_path, given_rows())}
    here = pn.run("persona_space", "organism-qwen2", store=tmp_path / "h.zarr", **options)
    there = pn.load_model("organism-qwen2", backend="simulate")
    away = pn.run("persona_space", there, store=tmp_path / "t.zarr", **options)
    assert bool(away.completed.all())
    for name in ("axis", "component", "variance", "variance_null", "cos_axis_interval"):
        np.testing.assert_allclose(away[name], here[name], atol=1e-4, rtol=1e-4, err_msg=name)


def test_bundled_roles_are_in_the_public_format() -> None:
    roles = RoleOptions().load_roles()
    assert len(roles) == 25
    assert roles[0].name == "default"
    assert all(len(role.instructions) == 5 for role in roles)
    assert "" in roles[0].instructions
    assert all(role.eval_prompt for role in roles)
    texts = [text for role in roles for text in role.instructions]
    assert len(set(texts)) == 125
    prompts = RoleOptions().prompts(None, "tiny", 1)
    assert [len(prompt.questions) for prompt in prompts] == [20] * 125
    assert "You are tiny." in [prompt.system for prompt in prompts]
    few = RoleOptions(n_instructions=1, n_questions=5).prompts(None, "tiny", 2)
    assert [len(prompt.questions) for prompt in few] == [10] * 25


def test_own_questions_are_numbered_by_text(tmp_path: Path) -> None:
    for role, questions in {"bard": ["Why?", "How?"], "chef": ["How?", "When?"]}.items():
        file = {"instruction": [{"pos": f"Be {role}, {{model_name}}."}], "questions": questions}
        (tmp_path / f"{role}.json").write_text(json.dumps(file))
    (tmp_path / "default.json").write_text('{"instruction": [{"pos": ""}]}')
    prompts = RoleOptions(roles=str(tmp_path)).prompts(None, "m", 1)
    assert [(p.role, p.system, [q.id for q in p.questions]) for p in prompts] == [
        ("default", "", ["0", "1", "2"]),
        ("bard", "Be bard, m.", ["0", "1"]),
        ("chef", "Be chef, m.", ["1", "2"]),
    ]


def test_the_score_is_the_number_that_is_most_likely() -> None:
    said = {"3": -0.3, "2": -2.0, "x": -3.0}
    assert role_score(said) == 3
    assert role_score({" 2": -0.9, "2": -1.2, "3": -0.95}) == 2
    assert np.isnan(role_score({"3": -2.0, "4": -0.2}))


class Refusing:
    """A judge that gives numbers to the pirate alone."""

    def ask(self, prompts: list[str]) -> list[dict[str, float]]:
        return [{"3": -0.1} if "pirate" in prompt else {"I": -0.1} for prompt in prompts]


@pytest.mark.usefixtures("few_draws")
def test_a_judge_is_asked_by_the_rubrics_of_roles(
    model: TransformersModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(role_judging, "open_judge", lambda _: Refusing())
    rows = [row for row in given_rows() if row["role"] in ("default", "pirate", "ghost")]
    for role in ("default", "pirate", "ghost"):
        file = {"instruction": [{"pos": "x"}], "eval_prompt": f"{role}: {{question}} {{answer}}"}
        (tmp_path / f"{role}.json").write_text(json.dumps(file))
    given = write(tmp_path, rows)
    options = {"responses": given, "judge": "http://localhost:9", "store": tmp_path / "s.zarr"}
    with pytest.warns(UserWarning, match="gave no number for 5 of 11 answers"):
        ds = pn.run("persona_space", model, roles=str(tmp_path), **options).isel(model=0)
    scores = dict(zip(ds.answer_role.values.tolist(), ds.answer_score.values.tolist(), strict=True))
    assert scores["pirate"] == 3
    assert np.isnan(scores["ghost"])
    assert np.isnan(scores["default"])
    with pytest.raises(UsageError, match="There is no rubric for the role 'pirate'"):
        pn.run("persona_space", model, **options)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"question": "Another?"}, "question_id '7' stands for .* and, in line 2"),
        ({"response": ""}, "The response is empty: line 2"),
        ({"role": 3}, "'role' is 3 and not a text: line 2"),
        ({"score": "high"}, "'score' is 'high' and not a number: line 2"),
        ({"score": float("nan")}, "'score' is nan; leave it out where there is none: line 2"),
        ({"question_id": None}, "'question_id' is None and no number or text"),
    ],
)
def test_what_is_no_answer_is_one_sentence(
    change: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    rows = [row for row in given_rows() if row["question_id"] == 7][:3]
    rows[1] |= change
    with pytest.raises(UsageError, match=sentence):
        read_role_responses(write(tmp_path, rows))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"grid": "short", "roles": "bundled"}, "leave out --roles and --questions"),
        ({"responses": "{given}", "n_questions": 2}, "leave out --n-questions"),
        ({"responses": "{given}", "min_answers": 7}, "two roles beside 'default' with at least 7"),
        ({"responses": "{few}"}, "that count, and there are 1; ask more"),
        ({"responses": "given.csv"}, "Answers are read from a .jsonl"),
        ({"responses": "nowhere.zarr"}, "There is no Zarr store"),
        ({"roles": "nowhere"}, "holds no role"),
        ({"judge": "lexicon"}, "knows traits, not roles"),
        ({"responses": "{odd}"}, "has no role 'default'"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    options: dict[str, Any], sentence: str, model: TransformersModel, tmp_path: Path
) -> None:
    files = {
        "{given}": write(tmp_path, given_rows()),
        "{odd}": write(tmp_path, given_rows()[6:], "odd.jsonl"),
        "{few}": write(
            tmp_path, [row for row in given_rows() if row["role"] in ROLES[:2]], "few.jsonl"
        ),
    }
    asked: dict[str, Any] = {name: files.get(value, value) for name, value in options.items()}
    with pytest.raises(UsageError, match=sentence):
        pn.run("persona_space", model, store=tmp_path / "s.zarr", **asked)


@pytest.mark.usefixtures("few_draws")
def test_the_command_draws_what_it_has_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = str(tmp_path / "s.zarr")
    command = ["run", "persona_space", "--model", "organism-qwen2", "--store", store]
    command += ["--responses", write(tmp_path, given_rows()), "--judge", "none"]
    monkeypatch.setattr(sys, "argv", ["persona-nns", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "variance between roles" in capsys.readouterr().out
    results = pn.open_results(store, "persona_space")
    figures = draw(results, "persona_space")
    assert set(figures) == {"map", "scree", "ranking", "cosines"}
    boxes = [text.get_window_extent() for text in figures["map"].axes[0].texts if text.get_text()]
    assert len(boxes) == 6
    assert not any(one.overlaps(other) for k, one in enumerate(boxes) for other in boxes[k + 1 :])
    assert all(each.state == "right" for each in verify_store(store, sample=1))
