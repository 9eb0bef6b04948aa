"""A local model as judge: what it says of numbers, exactly; kept, batched, and let go of."""

import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight import TransformersModel
from random_models import GOLDEN, WINDOW, crossed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

import persona_nns as pn
from persona_nns.cli.commands import app
from persona_nns.cli.rescoring import rescore
from persona_nns.errors import PersonaError, UsageError
from persona_nns.prompts.chats import render_chat
from persona_nns.runs import plan_run
from persona_nns.traits import JudgeOptions, judge_options, judges, local_judge
from persona_nns.traits.judge_options import Scale
from persona_nns.traits.judges import COHERENCE_PROMPT, Answer, fill_prompt
from persona_nns.traits.local_judge import (
    NUMBERS,
    YES_NO,
    LocalJudge,
    NumberReplies,
    find_judge,
    reply_logprobs,
)
from persona_nns.traits.trait import load_traits

TERSE = load_traits("terse", "evaluation")[0]
ANSWERS = [
    Answer("How is tea?", text) for text in ("Fine.", "It is 85 degrees, they say.", "{answer}")
]
PROMPTS = ["Rate it.", "Rate this from 0 to 100, please, and say no more.", "A number, now!"]


@pytest.fixture(scope="session")
def splitting() -> Any:
    """A tokenizer that writes each digit as a token."""
    return AutoTokenizer.from_pretrained(GOLDEN / "qwen2")


@pytest.fixture(scope="session")
def whole(splitting: Any) -> Any:
    """A tokenizer with a token for each number, and for each number behind a space."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    numbers = [f"{n}\n {n}\n {n} user assistant Rate this number please" for n in range(101)]
    backend.train_from_iterator(numbers * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    tokenizer.chat_template = splitting.chat_template
    return tokenizer


CASES = [("qwen2", "splitting"), ("gemma2", "splitting"), ("gpt_neox", "whole"), ("llama", "whole")]


def rows_of(tokenizer: Any, prompts: list[str] = PROMPTS) -> list[tuple[int, ...]]:
    return [render_chat(tokenizer, prompt).ids for prompt in prompts]


def asked(model: Any, tokenizer: Any, rows: Any, scale: Any = "0-100") -> list[dict[str, float]]:
    replies: dict[int, dict[str, float]] = {}
    for batch, found in reply_logprobs(model, tokenizer, rows, scale):
        replies |= dict(zip(batch, found, strict=True))
    return [replies[row] for row in range(len(rows))]


def brute_force(model: PreTrainedModel, tokenizer: Any, prompt: str, number: str) -> float:
    """p(number): a pass over the whole text for each number and each way to begin it."""
    messages = [{"role": "user", "content": prompt}]
    head = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    n_head = len(tokenizer(head, add_special_tokens=False)["input_ids"])
    digits = [k for k in range(len(tokenizer)) if tokenizer.decode([k])[:1] in set("0123456789")]
    total = 0.0
    for text in (number, f" {number}"):
        ids = tokenizer(head + text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        probabilities = model(ids).logits[0].double().softmax(-1)
        path = [probabilities[k - 1, ids[0, k]] for k in range(n_head, ids.shape[1])]
        goes_on = probabilities[-1, [k for k in digits if k < probabilities.shape[1]]].sum()
        total += float(torch.stack(path).prod() * (1 - goes_on))
    return total


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_number_has_the_probability_of_its_tokens_with_no_digit_behind(
    name: str,
    kind: str,
    plain_model: Callable[[str], PreTrainedModel],
    request: pytest.FixtureRequest,
) -> None:
    model, tokenizer = plain_model(name), request.getfixturevalue(kind)
    replies = NumberReplies.of(tokenizer)
    assert len(replies.plain.texts) == len(replies.spaced.texts) == 101
    assert [len(replies.plain.texts[k]) for k in (7, 85, 100)] == (
        [1, 2, 3] if kind == "splitting" else [1, 1, 1]
    )
    for prompt, found in zip(
        PROMPTS[1:], asked(model, tokenizer, rows_of(tokenizer))[1:], strict=True
    ):
        expected = {number: brute_force(model, tokenizer, prompt, number) for number in NUMBERS}
        assert list(found) == list(expected)
        for number in NUMBERS:
            assert math.exp(found[number]) == pytest.approx(expected[number], rel=5e-4), number
        assert sum(expected.values()) < 1
        score = sum(int(n) * p for n, p in expected.items()) / sum(expected.values())
        of_found = {n: math.exp(logprob) for n, logprob in found.items()}
        mean = sum(int(n) * p for n, p in of_found.items()) / sum(of_found.values())
        assert mean == pytest.approx(score, abs=1e-3)


@pytest.mark.parametrize("name", crossed("mistral", "phi3", "gemma3"))
def test_every_architecture_reads_all_numbers_in_one_pass(
    name: str, plain_model: Callable[[str], PreTrainedModel], splitting: Any
) -> None:
    (row,) = rows_of(splitting, PROMPTS[1:2])
    assert len(row) > WINDOW
    (found,) = asked(plain_model(name), splitting, [row])
    for number in ("0", "7", "40", "85", "100"):
        expected = brute_force(plain_model(name), splitting, PROMPTS[1], number)
        assert math.exp(found[number]) == pytest.approx(expected, rel=5e-4), number


def test_an_architecture_that_heeds_no_mask_is_refused(
    plain_model: Callable[[str], PreTrainedModel], splitting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persona_nns.traits.continuations._masks", lambda *_: None)
    with pytest.raises(PersonaError, match=r"another log-probability among others .* by itself"):
        asked(plain_model("qwen2"), splitting, rows_of(splitting))


@pytest.mark.parametrize(("name", "kind"), CASES[1:3])
def test_batches_give_what_single_prompts_give(
    name: str,
    kind: str,
    plain_model: Callable[[str], PreTrainedModel],
    request: pytest.FixtureRequest,
) -> None:
    model, tokenizer = plain_model(name), request.getfixturevalue(kind)
    rows = rows_of(tokenizer)
    assert len({len(row) for row in rows}) == 3
    for scale in ("0-100", "yes-no"):
        together = asked(model, tokenizer, rows, scale)
        alone = [asked(model, tokenizer, [row], scale)[0] for row in rows]
        for one, two in zip(together, alone, strict=True):
            assert one == pytest.approx(two, abs=2e-4)


def test_a_space_that_hardly_begins_a_reply_is_left_out(
    plain_model: Callable[[str], PreTrainedModel], splitting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = plain_model("qwen2"), rows_of(splitting)
    both = asked(model, splitting, rows)
    monkeypatch.setattr(local_judge, "_LEAST_SPACE", 1.1)
    plain = asked(model, splitting, rows)
    for one, two in zip(both, plain, strict=True):
        assert all(one[number] > two[number] for number in NUMBERS)


@pytest.mark.parametrize(("name", "kind"), CASES[:3:2])
def test_yes_no_is_the_logistic_of_the_log_odds_of_the_first_token(
    name: str,
    kind: str,
    plain_model: Callable[[str], PreTrainedModel],
    request: pytest.FixtureRequest,
) -> None:
    model, tokenizer = plain_model(name), request.getfixturevalue(kind)
    for prompt, found in zip(
        PROMPTS, asked(model, tokenizer, rows_of(tokenizer), "yes-no"), strict=True
    ):
        ids = torch.tensor([render_chat(tokenizer, prompt).ids])
        logits = model(ids).logits[0, -1]
        yes, no = (
            tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No")
        )
        expected = 100 * torch.sigmoid(logits[yes] - logits[no])
        assert judges.log_odds_score(found) == pytest.approx(float(expected), abs=1e-3)


def test_log_odds_do_not_overflow() -> None:
    for odds, score in ((0.0, 50.0), (math.log(3), 75.0), (2000.0, 100.0), (-2000.0, 0.0)):
        assert judges.log_odds_score({"Yes": odds, "No": 0.0}) == pytest.approx(score)


@pytest.fixture
def judge_folder(random_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random model, of which no answer is a refusal."""
    monkeypatch.setattr(judges, "LEAST_MASS", 0.0)
    return random_folder("qwen2")


class Loads:
    """Counts how often weights are loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.models: list[weakref.ref[PreTrainedModel]] = []
        plainly = local_judge.load_weights

        def load(*arguments: Any) -> PreTrainedModel:
            model = plainly(*arguments)
            self.models.append(weakref.ref(model))
            return model

        monkeypatch.setattr(local_judge, "load_weights", load)


def test_trait_and_coherence_are_asked_with_the_same_rubrics_as_at_an_endpoint(
    judge_folder: Path,
    plain_model: Callable[[str], PreTrainedModel],
    splitting: Any,
    tmp_path: Path,
) -> None:
    scales: list[tuple[Scale, str, Any]] = [
        ("0-100", "", judges.expected_score),
        ("yes-no", YES_NO, judges.log_odds_score),
    ]
    for scale, suffix, read in scales:
        judge = LocalJudge(find_judge(str(judge_folder)), scale, tmp_path / f"{scale}.sqlite")
        scores = judge.scores(TERSE, ANSWERS)
        for prompt, given in (
            (TERSE.eval_prompt, scores.trait),
            (COHERENCE_PROMPT, scores.coherence),
        ):
            texts = [fill_prompt(prompt, answer) + suffix for answer in ANSWERS]
            replies = asked(plain_model("qwen2"), splitting, rows_of(splitting, texts), scale)
            assert given == pytest.approx([read(reply) for reply in replies], abs=1e-3)


def test_what_was_asked_once_is_not_asked_again_and_the_model_is_let_go_of(
    judge_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, file = Loads(monkeypatch), tmp_path / "judge.sqlite"
    judge = LocalJudge(find_judge(str(judge_folder)), "0-100", file)
    first = judge.scores(TERSE, ANSWERS)
    assert len(loads.models) == 1
    gc.collect()
    assert loads.models[0]() is None
    assert (judge.usage.calls, judge.usage.cached) == (6, 0)
    monkeypatch.setattr(local_judge, "load_weights", lambda *_: pytest.fail("it is known"))
    again = LocalJudge(find_judge(str(judge_folder)), "0-100", file)
    assert again.scores(TERSE, ANSWERS) == first
    assert (again.usage.calls, again.usage.cached) == (0, 6)
    for other in (
        LocalJudge(find_judge(str(judge_folder)), "yes-no", file),
        LocalJudge(replace(find_judge(str(judge_folder)), version="other"), "0-100", file),
    ):
        with pytest.raises(pytest.fail.Exception, match="it is known"):
            other.scores(TERSE, ANSWERS)


def test_a_judge_that_hardly_says_a_number_refuses(random_folder: Any, tmp_path: Path) -> None:
    judge = LocalJudge(find_judge(str(random_folder("qwen2"))), "0-100", tmp_path / "c.sqlite")
    with pytest.raises(PersonaError, match="refused to give the trait score of every one of 3"):
        judge.scores(TERSE, ANSWERS)
    (reply, *_) = judge.ask([fill_prompt(TERSE.eval_prompt, ANSWERS[0])])
    assert sum(map(math.exp, reply.values())) < 0.25
    assert math.isnan(judges.expected_score(reply))


def test_a_prompt_that_the_judge_cannot_hold_is_said(judge_folder: Path, tmp_path: Path) -> None:
    judge = LocalJudge(find_judge(str(judge_folder)), "yes-no", tmp_path / "c.sqlite")
    with pytest.raises(PersonaError, match=r"longest prompt .* and the model takes 512"):
        judge.scores(TERSE, [Answer("How?", "well " * 900)])


def test_the_judge_is_known_by_what_its_files_hold(
    random_folder: Callable[[str], Path], make_folder: Callable[..., Path]
) -> None:
    folder = random_folder("qwen2")
    copy = make_folder("qwen2")
    other = make_folder("qwen2", hidden_size=64)
    known = JudgeOptions(str(folder)).identity
    assert known[0] == "model"
    assert known == JudgeOptions(str(copy)).identity
    assert known != JudgeOptions(str(other)).identity
    assert known != JudgeOptions(str(folder), scale="yes-no").identity
    (copy / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    assert known != JudgeOptions(str(copy)).identity
    assert JudgeOptions(str(folder)).unverifiable == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (JudgeOptions("gpt-4o"), "has to be 'lexicon', 'none', the URL .*Unknown model 'gpt-4o'"),
        (JudgeOptions("localhost:80/v1"), "the URL of .* such as https://.*Unknown model"),
        (JudgeOptions("lexicon", scale="yes-no"), "not of 'lexicon'; leave out --scale, or name"),
        (
            JudgeOptions("http://x/v1", scale="yes-no"),
            "'yes-no' is one of a model that judges here",
        ),
    ],
)
def test_what_cannot_judge_is_said_before_anything_runs(
    options: JudgeOptions, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        options.check("terse")


def test_a_model_without_a_chat_template_cannot_be_asked(make_folder: Callable[..., Path]) -> None:
    folder = make_folder("qwen2")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UsageError, match="has no chat template; use a model that was trained to"):
        JudgeOptions(str(folder)).check("terse")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of every judge that a run opens."""
    file = tmp_path / "kept.sqlite"
    made = LocalJudge.__init__
    judge_options._local_judge.cache_clear()
    monkeypatch.setattr(
        LocalJudge, "__init__", lambda self, model, scale: made(self, model, scale, file)
    )
    return file


def test_a_run_is_judged_by_a_model_from_the_start_or_later(
    judge_folder: Path,
    own_cache: Path,
    golden_model: Callable[[str], TransformersModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loads, model = Loads(monkeypatch), golden_model("qwen2")
    asking: dict[str, Any] = {"trait": "terse", "split": "evaluation", "max_new_tokens": 4}
    store = str(tmp_path / "s.zarr")
    by_model: dict[str, Any] = {"judge": str(judge_folder), "scale": "yes-no"}
    planned = plan_run("trait_responses", model, store=store, **asking, **by_model)
    attrs = planned.request.block.attrs
    assert attrs["judge"] == JudgeOptions(str(judge_folder), scale="yes-no").identity
    assert attrs["plan_options"]["scale"] == "yes-no"
    pn.run("trait_responses", model, store=store, judge="none", **asking)
    assert not loads.models
    named = rescore(store, "trait_responses", JudgeOptions(str(judge_folder), scale="yes-no"))
    n_loads = len(loads.models)
    assert n_loads == 5  # once a batch of four questions
    assert named == attrs["run"]
    scored = pn.open_results(store, "trait_responses", run=named)
    assert bool(scored.completed.all())
    assert 0 < float(scored.score.min()) < float(scored.score.max()) < 100
    from_start = pn.run(
        "trait_responses", model, store=str(tmp_path / "t.zarr"), **asking, **by_model
    )
    assert len(loads.models) == n_loads  # every reply is known
    assert from_start.score.equals(scored.score)
    assert own_cache.is_file()


def test_rescore_takes_a_model_on_the_command_line(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["rescore", "--help"]).output
    assert "--scale" in shown
    assert ".gguf" in shown
    called = [
        "rescore",
        str(tmp_path / "s.zarr"),
        "trait_responses",
        "--judge",
        "x",
        "--scale",
        "no",
    ]
    assert CliRunner().invoke(app, called).exit_code == 2
