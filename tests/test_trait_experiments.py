"""The trait experiments on a bundled model: what is stored, resumed, refused."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from nnsight import TransformersModel
from shared import printed

import persona_nns as pn
from persona_nns.cli.commands import main
from persona_nns.declarations import load_experiment
from persona_nns.errors import PersonaError, UsageError
from persona_nns.figures.drawing import draw
from persona_nns.figures.traits import correlation
from persona_nns.models.load import load_model
from persona_nns.organism.bundled import load_artifact
from persona_nns.prompts import render_chat
from persona_nns.results.reading import RunInfo
from persona_nns.runs import plan_run, verify_store
from persona_nns.tracing import NucleusSampling
from persona_nns.traits import JudgeOptions, TraitOptions, load_traits
from persona_nns.traits import judging as answers
from persona_nns.traits.directions import load_vector
from persona_nns.traits.judges import Scores
from persona_nns.traits.responses import Response
from persona_nns.traits.rows import keep_pairs
from persona_nns.traits.vectors import read_vector, write_vector

ASK = {"trait": "terse", "max_new_tokens": 24}


@pytest.fixture(scope="module")
def model() -> TransformersModel:
    return load_model("organism-qwen2")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, model: TransformersModel) -> str:
    """A store with answers and vectors, made in two goes."""
    store = str(tmp_path_factory.mktemp("traits") / "s.zarr")
    judged: list[int] = []
    plainly = answers.judge_tokens

    def counted(tokenizer: Any, trait: Any, questions: Any, *rest: Any) -> Any:
        if len(judged) == 2:
            raise KeyboardInterrupt
        judged.append(len(questions))
        return plainly(tokenizer, trait, questions, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "judge_tokens", counted)
        with pytest.raises(KeyboardInterrupt):
            pn.run("trait_vectors", model, store=store, **ASK)
        assert judged == [4, 4]
        assert int(pn.open_results(store, "trait_responses").completed.sum()) == 8
        with pytest.raises(UsageError, match="not complete"):
            pn.run("trait_vectors", model, trait="terse", responses=store, store=store)
        judged[:] = [0]  # allow one batch more, then go on without the limit
        judged.extend([0] * 10)
        pn.run("trait_vectors", model, store=store, **ASK)
        assert judged[11:] == [4, 4, 4]  # twenty questions, eight of them were there
        pn.run("trait_vectors", model, store=store, **ASK)
        assert len(judged) == 14
    return store


@pytest.fixture(scope="module")
def vectors(store: str) -> xr.Dataset:
    return pn.open_results(store, "trait_vectors").isel(model=0, trait=0)


def test_answers_and_scores_stand_beside_the_vector(store: str, vectors: xr.Dataset) -> None:
    asked = pn.open_results(store, "trait_responses").isel(model=0, trait=0)
    assert asked.response.dims == ("question", "pair", "label", "sample")
    score = asked.score.mean(("question", "pair", "sample"))
    assert float(score.sel(label="pos") - score.sel(label="neg")) >= 50
    assert vectors.sizes["row"] == 200
    one = vectors.isel(row=3)
    there = asked.sel(
        question=int(one.row_question_id),
        pair=int(one.row_pair),
        label=str(one.row_label.item()),
        sample=int(one.row_sample),
    )
    assert one.row_response.item() == there.response.item()
    assert float(one.row_score) == float(there.score)
    assert one.row_system.item().startswith("You are a ")


def test_only_pairs_that_show_the_contrast_count(vectors: xr.Dataset) -> None:
    pos, neg = (vectors.isel(row=vectors.row_label.values == label) for label in ("pos", "neg"))
    shows = (
        (pos.row_score.values >= 50)
        & (neg.row_score.values < 50)
        & (pos.row_coherence.values >= 50)
        & (neg.row_coherence.values >= 50)
    )
    assert 0 < shows.sum() < 100
    assert pos.kept.values.tolist() == neg.kept.values.tolist() == shows.astype(int).tolist()


def test_the_vector_is_that_of_the_kept_rows_given_as_a_file(
    vectors: xr.Dataset, model: TransformersModel, tmp_path: Path
) -> None:
    kept = vectors.isel(row=vectors.kept.values == 1)
    names = ("pair", "question_id", "label", "system", "question", "response")
    rows = [
        Response(**{name: kept[f"row_{name}"].values.tolist()[k] for name in names})
        for k in range(kept.sizes["row"])
    ]
    lines = "".join(f"{json.dumps(vars(row))}\n" for row in rows)
    (tmp_path / "terse.jsonl").write_text(lines)
    given: dict[str, Any] = {"responses": str(tmp_path / "terse.jsonl"), "judge": "none"}
    again = pn.run("trait_vectors", model, store=tmp_path / "s", **given).isel(model=0, trait=0)
    np.testing.assert_allclose(again["vector"], vectors["vector"], atol=1e-4, rtol=1e-5)
    judged = pn.run(
        "trait_vectors", model, store=tmp_path / "s", responses=given["responses"], judge="lexicon"
    ).isel(model=0, trait=0)
    np.testing.assert_allclose(judged["vector"], again["vector"], atol=1e-6)
    np.testing.assert_allclose(judged.row_score, kept.row_score, rtol=1e-6)


def test_steering_is_the_same_in_any_batch_and_nothing_at_zero(
    store: str, model: TransformersModel, tmp_path: Path
) -> None:
    options = {
        **ASK,
        "vector": store,
        "layers": "0,4",
        "alphas": "0,2",
        "position_sets": "all,prompt",
        "n_samples": 2,
    }
    first = pn.run("trait_steering", model, store=tmp_path / "a", batch_size=20, **options)
    other = pn.run("trait_steering", model, store=tmp_path / "b", batch_size=3, **options)
    first, other = (each.isel(model=0, trait=0) for each in (first, other))
    assert first.score.dims == ("layer", "alpha", "position_set", "question", "sample")
    assert (first.response.values == other.response.values).mean() > 0.97  # ties may fall
    assert "score" in printed(first.expand_dims(["model", "trait"]))
    by_site = ("layer", "position_set", "question", "sample")
    zero = first.response.sel(alpha=0).transpose(*by_site).values.reshape(4, -1)
    assert (zero == zero[0]).all()
    moved = first.response.sel(alpha=2).transpose(*by_site).values.reshape(4, -1)
    assert (moved != zero).mean() > 0.5
    scores = first.score.mean(("question", "sample"))
    assert float(scores.sel(alpha=2).max() - scores.sel(alpha=0).max()) > 10
    assert set(draw(first.expand_dims(["model", "trait"]), "trait_steering")) == {"sweep"}


def test_steered_answers_are_the_same_without_a_cache(model: TransformersModel) -> None:
    module = sys.modules[load_experiment("trait_steering").measure.__module__]
    questions = load_traits("terse", "evaluation")[0].questions[:3]
    ids = [render_chat(model.tokenizer, question).ids for question in questions]
    prompts = [
        module.SteeredPrompt(ids[k % 3], k, alpha, tokens)
        for k, (alpha, tokens) in enumerate(product((0.0, 3.0), ("all", "prompt", "response")))
    ]
    direction = torch.randn(128, generator=torch.Generator().manual_seed(0))
    widths: list[int] = []
    block = model._module.model.layers[3]
    with block.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1])):
        said = [
            module.answer(
                model, 3, direction, prompts, NucleusSampling(6, temperature=1.0), reuse=reuse
            )
            for reuse in (True, False)
        ]
    assert torch.equal(*said)
    assert len(said[0].unique(dim=0)) > 3
    cached, whole = widths[: len(widths) // 2], widths[len(widths) // 2 :]
    assert sorted(set(cached))[0] == 1
    assert min(whole) > 1


@pytest.mark.parametrize("n_pairs", [3, 7])
def test_a_run_says_every_system_prompt_that_it_used(
    model: TransformersModel, monkeypatch: pytest.MonkeyPatch, n_pairs: int
) -> None:
    trait = load_traits("terse", "extraction")[0]
    pairs = tuple((f"Be {k}.", f"Be not {k}.") for k in range(n_pairs))
    module = sys.modules[load_experiment("trait_responses").measure.__module__]
    monkeypatch.setattr(TraitOptions, "load", lambda *_: replace(trait, pairs=pairs))
    planned = module.plan(
        model.tokenizer, model="m", chosen=TraitOptions("terse"), judging=JudgeOptions()
    )
    assert planned.attrs["systems"] == [
        [f"You are a terse assistant. {pos}", f"You are a helpful assistant. {neg}"]
        for pos, neg in pairs
    ]


def test_monitoring_reads_the_last_prompt_token(
    store: str, model: TransformersModel, tmp_path: Path
) -> None:
    found = pn.run("trait_monitoring", model, vector=store, store=tmp_path / "s", **ASK)
    direction = load_vector(store, "terse", "response_avg", "organism-qwen2")
    direction = direction / direction.norm(dim=-1, keepdim=True)
    question = str(found.question_text.values[3])
    messages = [
        {"role": "system", "content": "You are a very terse assistant."},
        {"role": "user", "content": question},
    ]
    tokenizer = model.tokenizer
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    hidden = model._module(ids, output_hidden_states=True).hidden_states
    expected = (torch.stack(hidden)[:, 0, -1] * direction).sum(-1)
    ours = found.projection.isel(model=0, trait=0).sel(question=3, degree="very")
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    overall = correlation(found).overall.isel(model=0)
    x = found.projection.isel(model=0, trait=0).sel(layer=8).values.ravel()
    y = found.score.isel(model=0, trait=0).mean("sample").values.ravel()
    assert float(overall.sel(layer=8)) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-5)
    assert set(draw(found, "trait_monitoring")) == {"correlation"}


def test_a_student_is_distilled_and_opens(
    store: str, model: TransformersModel, tmp_path: Path
) -> None:
    options = {
        "trait": "terse",
        "vector": store,
        "layer": 1,
        "alpha": 2.0,
        "position_set": "prompt",
        "students": "r2,full",
        "curve": "r2",
        "trajectories": "4,8",
        "n_samples": 1,
        "steps": 3,
        "rows": 4,
        "accumulation": 1,
        "max_new_tokens": 12,
        "lora_learning_rate": 1e-2,
        "full_learning_rate": 1e-3,
        "output": str(tmp_path / "students"),
        "store": tmp_path / "s",
    }
    found = pn.run("trait_distillation", model, **options)
    assert found.condition.values.tolist() == ["baseline", "steered", "r2/4", "r2/8", "full/8"]
    ds = found.isel(model=0, trait=0)
    assert float(ds.kl.sel(condition="steered")) == 0
    start = float(ds.kl.sel(condition="baseline"))
    for student in ("r2/4", "r2/8", "full/8"):
        assert 0 < float(ds.kl.sel(condition=student)) < start
        per_token = ds.token_kl.sel(condition=student)
        assert float(per_token.mean()) == pytest.approx(
            float(ds.kl.sel(condition=student)), rel=1e-5
        )
        said = ds.teacher_token.sel(condition=student) >= 0
        assert bool((per_token.notnull() == said).all())
    folders = sorted((tmp_path / "students").glob("*/*/adapter_model.safetensors"))
    assert len(folders) == 2
    adapter = load_model(folders[0].parent)
    assert "terse" in folders[0].parts[-3]
    # The stored KL is the opened student's, on the teacher's stored words.
    unsteered = adapter._module
    whole = load_vector(store, "terse", "response_avg", "organism-qwen2")
    name = {"r2-4": "r2/4", "r2-8": "r2/8"}[folders[0].parts[-2].rsplit("-", 1)[0]]
    question = str(ds.question_text.values[0])
    text = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    prompt = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    said = [t for t in ds.teacher_token.sel(condition=name).values[0].tolist() if t >= 0]
    ids = torch.tensor([[*prompt, *said]])

    def steer(_: Any, args: Any) -> Any:
        hidden = args[0].clone()
        hidden[:, : len(prompt)] += 2.0 * whole[1]
        return (hidden, *args[1:])

    handle = model._module.model.layers[1].register_forward_pre_hook(steer)
    teacher = model._module(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    handle.remove()
    student = unsteered(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = (teacher.exp() * (teacher - student)).sum(-1)
    ours = ds.token_kl.sel(condition=name).values[0][: len(said)]
    np.testing.assert_allclose(ours, expected, atol=2e-4, rtol=1e-3)
    assert set(draw(found, "trait_distillation")) == {"curves", "kl_by_token"}
    tables = printed(found)
    assert "training_kl" in tables
    assert all(label in tables for label in ("baseline", "r2/4", "full/8"))
    before = written(tmp_path / "students")
    again = pn.run("trait_distillation", model, **{**options, "output": str(tmp_path / "other")})
    assert again.attrs["run"] == found.attrs["run"]
    (verdict,) = verify_store(tmp_path / "s")
    assert (verdict.problems, verdict.n_recomputed) == ((), 0)
    assert written(tmp_path / "students") == before
    assert not (tmp_path / "other").exists()


def written(folder: Path) -> dict[Path, int]:
    """When each file below a folder was last written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_folder_for_students_is_not_in_the_identity(
    model: TransformersModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_vector(torch.ones(9, 128), "v.npy")
    options: dict[str, Any] = {"vector": "v.npy", "layer": 1, "judge": "none", "trajectories": "4"}
    plans = [
        plan_run("trait_distillation", model, store="s", **options, output=output)
        for output in ("here", "there")
    ]
    one, other = (planned.request.block.attrs for planned in plans)
    assert one["identity"] == other["identity"]
    assert one["parameters"] == other["parameters"]
    assert "output" not in one["parameters"]
    assert (one["plan_options"]["output"], other["plan_options"]["output"]) == ("here", "there")
    assert plans[1].request.measuring({})["output"] == "there"  # where students do go
    group: Any = None
    assert RunInfo("x", "r", one, group).kin == RunInfo("x", "r", other, group).kin


@pytest.mark.parametrize(
    ("experiment", "options", "why"),
    [
        ("trait_responses", {}, "judged at http://x/v1, which may cost money"),
        ("trait_monitoring", {"vector": "v.npy"}, "may cost money"),
        ("trait_steering", {"vector": "v.npy"}, "may cost money"),
        ("trait_steering", {"vector": "v.npy", "responses": "terse.jsonl"}, ""),
        ("trait_distillation", {"vector": "v.npy", "layer": 1, "trajectories": "4"}, "rewrite"),
    ],
)
def test_a_run_that_verifying_would_harm_says_why(
    model: TransformersModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    experiment: str,
    options: dict[str, Any],
    why: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_vector(torch.ones(9, 128), "v.npy")
    row = vars(Response(0, 0, "pos", "", "Why?", "Tea is good."))
    Path("terse.jsonl").write_text(json.dumps(row))
    for judge in ("http://x/v1", "none"):
        planned = plan_run(experiment, model, store="s", trait="terse", judge=judge, **options)
        said = planned.request.block.attrs.get("unverifiable", "")
        assert (why in said) if judge != "none" else (bool(said) == (why == "rewrite"))
        assert bool(said) == bool(planned.request.plan.unverifiable)


@pytest.mark.parametrize(
    ("experiment", "options", "message"),
    [
        ("trait_vectors", {"judge": "none"}, "rows have to be given"),
        ("trait_vectors", {"trait": "stoic"}, "There is no trait 'stoic'"),
        ("trait_vectors", {"trait": "stoic", "judge": "http://x/v1"}, "There is no trait 'stoic'"),
        ("trait_vectors", {"judge": "gpt"}, "has to be 'lexicon', 'none', the URL"),
        ("trait_vectors", {"responses": "none.jsonl", "judge": "none"}, "cannot be read"),
        ("trait_vectors", {"judge": "http://x/v1", "judge_prices": "1"}, "not two numbers"),
        ("trait_steering", {"vector": "wide.npy"}, "9 layers of width 64, but the model"),
        ("trait_steering", {"vector": "good.npy", "alphas": "1,x"}, "not numbers such as"),
        ("trait_steering", {"vector": "good.npy", "alphas": "nan"}, "not finite"),
        ("trait_steering", {"vector": "good.npy", "alphas": "1,1.0"}, "given twice"),
        ("trait_steering", {"vector": "good.npy", "position_sets": "some"}, "Unknown position set"),
        ("trait_steering", {"vector": "gone.npy"}, "does not exist"),
        ("trait_steering", {}, "needs the option 'vector'"),
        ("trait_steering", {"vector": "empty.zarr"}, "no Zarr store"),
        ("trait_distillation", {"vector": "good.npy", "layer": 8}, "Layer 8 is out of range"),
        ("trait_distillation", {"vector": "good.npy", "layer": 1, "students": "big"}, "big"),
    ],
)
def test_wrong_requests_are_said_and_write_nothing(
    model: TransformersModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    experiment: str,
    options: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_vector(torch.ones(9, 64), tmp_path / "wide.npy")
    write_vector(torch.ones(9, 128), tmp_path / "good.npy")
    before = set(tmp_path.iterdir())
    with pytest.raises(UsageError, match=message):
        pn.run(experiment, model, store="s.zarr", **options)
    assert set(tmp_path.iterdir()) == before


def test_a_vector_whose_rows_were_judged_at_an_endpoint_is_not_verified(
    model: TransformersModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Paid:
        def scores(self, _: Any, answers: Any) -> Scores:
            shown = tuple(100.0 * answer.answer.startswith("Yes") for answer in answers)
            return Scores(shown, (100.0,) * len(answers))

    monkeypatch.setattr("persona_nns.traits.rows.open_judge", lambda _: Paid())
    said = (Response(0, 0, "pos", "", "Why?", "Yes."), Response(0, 0, "neg", "", "Why?", "No."))
    rows = list(map(vars, said))
    (tmp_path / "terse.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked: dict[str, Any] = {"responses": str(tmp_path / "terse.jsonl"), "store": tmp_path / "s"}
    pn.run("trait_vectors", model, judge="http://x/v1", **asked)
    monkeypatch.setattr("persona_nns.traits.rows.open_judge", lambda _: pytest.fail("it costs"))
    (verdict,) = verify_store(tmp_path / "s")
    assert "may cost money" in verdict.info.attrs["unverifiable"]
    assert (verdict.problems, verdict.n_recomputed) == ((), 0)


def test_a_filter_that_leaves_nothing_is_an_error() -> None:
    rows = [Response(0, 0, label, "s", "q", "r") for label in ("pos", "neg")]
    with pytest.raises(PersonaError, match=r"out of 1: the mean score of 'pos' is 40.0"):
        keep_pairs(rows, [0, 0], [40.0, 0.0], [100.0, 100.0], "terse")
    assert [r.kept for r in keep_pairs(rows, [0, 0], [50.0, 49.9], [50.0, 50.0], "x")] == [True] * 2
    for scores, coherence in (
        ([50.0, 50.0], [99.0, 99.0]),
        ([90.0, 0.0], [99.0, 49.0]),
        ([np.nan, 0.0], [99.0, 99.0]),
    ):
        with pytest.raises(PersonaError, match="No pair of answers"):
            keep_pairs(rows, [0, 0], scores, coherence, "terse")


@pytest.mark.parametrize("experiment", ["trait_steering", "trait_monitoring", "trait_distillation"])
def test_questions_that_a_vector_is_made_from_are_not_evaluated(
    model: TransformersModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experiment: str
) -> None:
    """A question of the extraction split, and one that a store's rows say the vector is made of."""
    monkeypatch.chdir(tmp_path)
    seen, held_out = (load_artifact("terse", split) for split in ("extraction", "evaluation"))
    rows = [
        {"pair": 0, "question_id": 0, "label": label, "system": "", "response": "Tea is good.",
         "question": held_out["questions"][7]}
        for label in ("pos", "neg")
    ]  # fmt: skip
    Path("terse.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pn.run("trait_vectors", model, responses="terse.jsonl", judge="none", store="v.zarr")
    write_vector(torch.ones(9, 128), "v.npy")
    options: dict[str, Any] = {"layer": 1} if experiment == "trait_distillation" else {}
    with pytest.raises(UsageError, match=re.escape(repr(held_out["questions"][7]))):
        pn.run(experiment, model, vector="v.zarr", trait="terse", store="s.zarr", **options)
    held_out["questions"][3] = seen["questions"][5]
    for split, trait in (("extraction", seen), ("evaluation", held_out)):
        Path("own", split).mkdir(parents=True)
        Path("own", split, "terse.json").write_text(json.dumps(trait))
    options |= {"artifacts": "own", "judge": "none", "trait": "terse"}
    with pytest.raises(UsageError, match=r"have to be held out"):
        pn.run(experiment, model, vector="v.npy", store="s.zarr", **options)
    assert not Path("s.zarr").exists()
    Path("own/extraction/terse.json").unlink()  # what a vector was made from is not known then
    if experiment != "trait_distillation":
        plan_run(experiment, model, vector="v.npy", store="s.zarr", **options)


def test_every_answer_is_read_once(model: TransformersModel, tmp_path: Path) -> None:
    rows = [
        {"pair": 0, "question_id": k, "label": label, "system": "", "question": "Why?",
         "response": f"Tea is {'very ' * k}good."}
        for k in range(5)
        for label in ("pos", "neg")
    ]  # fmt: skip
    (tmp_path / "calm.jsonl").write_text("\n".join(map(json.dumps, rows)))
    n_read = 0

    def count(_: Any, args: Any) -> None:
        nonlocal n_read
        n_read += len(args[0])

    asked: dict[str, Any] = {"responses": str(tmp_path / "calm.jsonl"), "judge": "none"}
    with model._module.model.layers[0].register_forward_pre_hook(count):
        ds = pn.run("trait_vectors", model, store=tmp_path / "s", **asked).isel(model=0, trait=0)
    assert n_read == len(rows)
    # Both labels say the same, so that there is no direction, and nothing to project on.
    assert float(abs(ds["vector"]).max()) < 1e-5
    assert not ds["vector"].sel(layer=0, average="prompt_last").values.any()


def test_a_vector_of_another_model_is_not_taken_from_a_store(
    store: str, golden_model: Callable[[str], TransformersModel], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="no trait_vectors of 'terse' for the model 'qwen2'"):
        pn.run("trait_steering", golden_model("qwen2"), trait="terse", vector=store, store=tmp_path)


def test_the_command_line_runs_vectors_and_steering(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "pair": 0,
            "question_id": k,
            "label": label,
            "system": "S.",
            "question": "Why?",
            "response": answer,
        }
        for k in range(2)
        for label, answer in (("pos", "Yes, do tea."), ("neg", "Often, tea is a common habit."))
    ]
    Path("calm.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def command(*arguments: str) -> int:
        whole = ["run", *arguments, "--store", "s.zarr"]
        if arguments[0] == "export-vector":
            whole = list(arguments)
        monkeypatch.setattr(sys, "argv", ["persona-nns", *whole])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    both = ("--model", "organism-qwen2", "--model", "organism-gemma2")
    given = ("--responses", "calm.jsonl", "--judge", "none")
    assert command("trait_vectors", *both, *given) == 0
    for name in ("organism-qwen2", "organism-gemma2"):
        run = next(i.run for i in pn.list_runs("s.zarr") if i.attrs["model"] == name)
        plainly = xr.open_zarr("s.zarr", group=f"trait_vectors/{run}", consolidated=False)
        assert plainly["vector"].sizes == {
            "model": 1,
            "trait": 1,
            "average": 3,
            "layer": 9,
            "d_model": 128,
        }
    asked = ("export-vector", "s.zarr", "calm", "--model", "organism-qwen2")
    for file in ("v.pt", "v.npy", "v.safetensors"):
        assert command(*asked, "-o", file, "--average", "prompt_last") == 0
        exported = read_vector(file)
        stored = load_vector("s.zarr", "calm", "prompt_last", "organism-qwen2")
        assert torch.equal(exported, stored)
    assert command(*asked, "-o", "v.csv") == 2
    assert command(*asked, "-o", "nowhere/v.pt") == 2
    sweep = ("--layers", "0,3", "--alphas", "0,1", "--position-sets", "all,prompt,response")
    assert command("trait_steering", *both, *given, *sweep, "--vector", "s.zarr") == 0
    ds = pn.open_results("s.zarr", "trait_steering")
    assert ds.logp.dims == ("model", "trait", "row", "layer", "alpha", "position_set")
    assert ds.logp_all_layers.dims == ("model", "trait", "row", "alpha", "position_set")
    assert ds.logp_ablate.dims == ("model", "trait", "row", "layer")
    assert bool(ds.logp.notnull().all())
    assert "score" not in ds
    capsys.readouterr()
    assert command("trait_steering", *both, *given, "--vector", "gone.npy") == 2
    assert "does not exist" in capsys.readouterr().err
