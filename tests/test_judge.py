import json
import math
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import persona_nns as pn
from persona_nns.errors import PersonaError, UsageError
from persona_nns.traits.endpoint import EndpointJudge, ReplyCache
from persona_nns.traits.judges import (
    COHERENCE_PROMPT,
    Answer,
    LexiconJudge,
    expected_score,
    fill_prompt,
)
from persona_nns.traits.trait import load_traits

SECRET = "sk-do-not-show-me-1234567890"
CHEERFUL = load_traits("cheerful", "evaluation")[0]


class Endpoint:
    """A loopback server that answers as an OpenAI-compatible one does, and counts."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[str | None] = []
        self.statuses: list[int] = []  # given before the answers
        self.tokens: dict[str, dict[str, float]] = {}  # text in the prompt → token → probability
        self.with_logprobs = True
        self.pieces: list[str] = []  # the tokens of every reply, as many as are asked for
        self.first_only = False  # log-probabilities of the first token alone
        self.page = b""  # sent in place of the answer
        self.content_type = "application/json"
        self.busy = self.most_busy = 0
        self.gate: threading.Barrier | None = None
        self.lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                size = int(self.headers["Content-Length"])
                body = json.loads(self.rfile.read(size))
                status, answer = endpoint.answer(self.path, body, self.headers["Authorization"])
                data = endpoint.page or json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", endpoint.content_type)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(
        self, path: str, body: dict[str, Any], authorization: str | None
    ) -> tuple[int, dict[str, Any]]:
        assert path == "/v1/chat/completions"
        with self.lock:
            self.requests.append(body)
            self.headers.append(authorization)
            status = self.statuses.pop(0) if self.statuses else 200
        if status != 200:
            return status, {"error": {"message": f"no, and your key is {authorization}"}}
        if self.gate is not None:
            self.gate.wait(timeout=5)
        prompt = body["messages"][0]["content"]
        found = [tokens for text, tokens in self.tokens.items() if text in prompt]
        tokens = found[0] if found else {"50": 1.0}
        listed = [
            {"token": token, "logprob": math.log(p), "bytes": list(token.encode())}
            for token, p in tokens.items()
        ]
        content = [{**listed[0], "top_logprobs": listed}]
        text = listed[0]["token"]
        if self.pieces:
            said = self.pieces[: body["max_tokens"]]
            each = [{"token": token, "logprob": -0.02, "bytes": None} for token in said]
            content = [{**one, "top_logprobs": [one]} for one in each]
            content = content[:1] if self.first_only else content
            text = "".join(token for token in said if not token.startswith("<"))
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "logprobs": {"content": content} if self.with_logprobs else None,
            "finish_reason": "length",
        }
        return 200, {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [choice],
            "usage": {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101},
        }


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


@pytest.fixture
def judge(endpoint: Endpoint, tmp_path: Path) -> EndpointJudge:
    return EndpointJudge(endpoint.url, "judge-1", cache=tmp_path / "judge.sqlite")


def answers(*texts: str) -> list[Answer]:
    return [Answer("How is tea?", text) for text in texts]


def test_the_score_is_the_mean_number_weighted_by_probability():
    logs = {token: math.log(p) for token, p in {"90": 0.5, "100": 0.25, "A": 0.25}.items()}
    assert expected_score(logs) == pytest.approx((90 * 0.5 + 100 * 0.25) / 0.75)


def test_numbers_above_a_hundred_and_other_tokens_do_not_count():
    probabilities = {" 7": 0.3, "7": 0.3, "101": 0.2, "-5": 0.1, "1.5": 0.05, "٣": 0.05}
    logs = {token: math.log(p) for token, p in probabilities.items()}
    assert expected_score(logs) == pytest.approx(7)


@pytest.mark.parametrize(("mass", "refuses"), [(0.2499, True), (0.2501, False)])
def test_hardly_any_number_is_a_refusal(mass: float, refuses: bool):
    score = expected_score({"80": math.log(mass), "REFUSAL": math.log(1 - mass)})
    assert math.isnan(score) == refuses


def test_braces_in_an_answer_stay_as_they_are():
    filled = fill_prompt("Q {question} A {answer} {x}", Answer("{answer}?", "{question} {}"))
    assert filled == "Q {answer}? A {question} {} {x}"


def test_scores_over_an_endpoint_are_exact(endpoint: Endpoint, judge: EndpointJudge):
    endpoint.tokens = {
        "how coherent": {"88": 1.0},
        "Hooray": {"95": 0.6, "90": 0.3, "of": 0.1},
        "Alas": {"REFUSAL": 0.9, "0": 0.1},
    }
    scores = judge.scores(CHEERFUL, answers("Hooray, tea!", "Alas, tea."))
    assert scores.trait[0] == pytest.approx((95 * 0.6 + 90 * 0.3) / 0.9)
    assert math.isnan(scores.trait[1])
    assert scores.coherence == pytest.approx((88.0, 88.0))
    sent = endpoint.requests[2]  # after the two numbers that show how it writes them
    assert (sent["max_tokens"], sent["temperature"], sent["top_logprobs"]) == (1, 0, 20)
    assert sent["logprobs"] is True
    assert sent["model"] == "judge-1"
    prompts = {request["messages"][0]["content"] for request in endpoint.requests}
    assert fill_prompt(CHEERFUL.eval_prompt, Answer("How is tea?", "Hooray, tea!")) in prompts
    assert fill_prompt(COHERENCE_PROMPT, Answer("How is tea?", "Alas, tea.")) in prompts


def test_a_second_asking_costs_no_call(endpoint: Endpoint, judge: EndpointJudge, tmp_path: Path):
    first = judge.scores(CHEERFUL, answers("Hooray.", "Hooray.", "Alas."))
    assert len(endpoint.requests) == 6  # two numbers; two different answers, two prompts each
    again = EndpointJudge(endpoint.url, "judge-1", cache=tmp_path / "judge.sqlite")
    assert again.scores(CHEERFUL, answers("Hooray.", "Hooray.", "Alas.")) == first
    assert len(endpoint.requests) == 6
    assert (again.usage.calls, again.usage.cached) == (0, 4)
    other = EndpointJudge(endpoint.url, "judge-2", cache=tmp_path / "judge.sqlite")
    other.scores(CHEERFUL, answers("Hooray."))
    assert len(endpoint.requests) == 10


@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["8", "5", "<|im_end|>"], "writes 85 as 2 tokens ('8', '5')"),
        (["▁", "8", "5", "</s>"], "writes 85 as 2 tokens ('8', '5')"),
        (["The", " score", " is ", "8", "5"], "writes 85 as 2 tokens"),
        (["10", "0", "<|im_end|>"], "writes 100 as 2 tokens ('10', '0')"),
        (["1", "0", "0", "<|im_end|>"], "writes 100 as 3 tokens ('1', '0', '0')"),
    ],
)
def test_a_judge_that_splits_numbers_is_refused_before_it_is_asked(
    endpoint: Endpoint, tmp_path: Path, pieces: list[str], shown: str, first_only: bool
):
    endpoint.pieces, endpoint.first_only = pieces, first_only
    judge = EndpointJudge(endpoint.url, "splits", cache=tmp_path / "judge.sqlite")
    if first_only and not pieces[0].isdigit():
        return  # nothing to see in the first token; its scores are refusals
    if first_only:
        shown = shown.partition(" as ")[0]
    for _ in range(2):  # from the cache, too
        with pytest.raises(UsageError, match=re.escape(shown)):
            judge.scores(CHEERFUL, answers("Hooray."))
    assert len(endpoint.requests) == 1
    assert "85" in endpoint.requests[0]["messages"][0]["content"]


@pytest.mark.parametrize("pieces", [["85", "<|im_end|>"], [" 85"], ["The", " ", "100"], ["1024"]])
def test_a_judge_whose_numbers_are_tokens_is_asked(
    endpoint: Endpoint, judge: EndpointJudge, pieces: list[str]
):
    endpoint.pieces = pieces
    judge.check()
    assert len(endpoint.requests) == 2


def test_a_run_whose_judge_splits_numbers_stores_nothing(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    endpoint.pieces = ["8", "5"]
    monkeypatch.setenv("HOME", str(tmp_path))  # where replies are kept
    asked: dict[str, Any] = {"trait": "terse", "judge": endpoint.url, "judge_model": "splits"}
    with pytest.raises(UsageError, match="a score is read off one"):
        pn.run(
            "trait_responses",
            "organism-qwen2",
            store=tmp_path / "s.zarr",
            batch_size=1,
            max_new_tokens=1,
            **asked,
        )
    assert not (tmp_path / "s.zarr").exists()


def test_requests_are_made_at_the_same_time(endpoint: Endpoint, judge: EndpointJudge):
    endpoint.gate = threading.Barrier(8)  # passes only when eight requests are there at once
    judge.ask([f"prompt {k}" for k in range(8)])
    assert len(endpoint.requests) == 8


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_endpoints_are_asked_again(endpoint: Endpoint, judge: EndpointJudge, status: int):
    endpoint.statuses = [status, status]
    assert judge.ask(["how"]) == [{"50": 0.0}]
    assert len(endpoint.requests) == 3


def test_what_is_answered_is_kept_when_another_request_fails(
    endpoint: Endpoint, judge: EndpointJudge
):
    judge.ask(["one"])
    endpoint.statuses = [400]
    with pytest.raises(PersonaError, match="400"):
        judge.ask(["one", "two"])
    assert len(endpoint.requests) == 2
    judge.ask(["one", "two"])
    assert len(endpoint.requests) == 3


@pytest.mark.parametrize("status", [401, 400])
def test_the_key_is_neither_shown_nor_stored(
    endpoint: Endpoint,
    judge: EndpointJudge,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    status: int,
):
    judge.ask(["fine"])
    endpoint.statuses = [status]
    with pytest.raises(PersonaError) as raised:
        judge.ask(["bad"])
    assert endpoint.headers[0] == f"Bearer {SECRET}"
    chain = [raised.value, raised.value.__cause__]
    assert SECRET not in "".join(map(repr, chain)) + str(raised.value) + repr(vars(judge.usage))
    assert SECRET not in "".join(capfd.readouterr())
    for file in tmp_path.iterdir():
        assert SECRET.encode() not in file.read_bytes()


def test_a_judge_that_always_refuses_is_an_error(endpoint: Endpoint, judge: EndpointJudge):
    endpoint.tokens = {"how cheerful": {"REFUSAL": 1.0}}
    with pytest.raises(PersonaError, match=r"refused to give the trait score of every one of 2"):
        judge.scores(CHEERFUL, answers("Hooray.", "Alas."))


def test_an_endpoint_without_logprobs_is_an_error(endpoint: Endpoint, judge: EndpointJudge):
    endpoint.with_logprobs = False
    with pytest.raises(PersonaError, match="no log-probabilities"):
        judge.ask(["how"])


@pytest.mark.parametrize("page", [b"<html>hi", b'"hi"', b"[1]"])
@pytest.mark.parametrize("content_type", ["application/json", "text/html"])
def test_a_url_of_something_else_is_an_error(
    endpoint: Endpoint, judge: EndpointJudge, page: bytes, content_type: str
):
    endpoint.page, endpoint.content_type = page, content_type
    with pytest.raises(PersonaError, match="does not answer in the OpenAI format"):
        judge.ask(["how"])


def test_nobody_at_the_endpoint_is_an_error(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("persona_nns.traits.endpoint._RETRIES", 0)
    judge = EndpointJudge("http://127.0.0.1:9/v1", "judge-1", cache=tmp_path / "judge.sqlite")
    with pytest.raises(PersonaError, match="does not answer"):
        judge.ask(["how"])
    assert not endpoint.requests


@pytest.mark.parametrize("url", ["lexikon", "ftp://x/v1", "http://", f"http://u:{SECRET}@x/v1"])
def test_urls_that_are_none_or_hold_secrets_are_refused(url: str, tmp_path: Path):
    with pytest.raises(UsageError) as raised:
        EndpointJudge(url, "judge-1", cache=tmp_path / "judge.sqlite")
    assert SECRET not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_cache_that_is_no_cache_is_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("not a database, and long enough to be seen as none" * 20)
    with pytest.raises(UsageError, match="cannot be used"):
        ReplyCache(tmp_path / "notes.txt")


def test_the_cost_is_told(endpoint: Endpoint, judge: EndpointJudge):
    judge.ask([f"prompt {k}" for k in range(10)])
    assert len(endpoint.requests) == 10
    assert judge.usage.describe((0.4, 1.6)) == (
        "10 calls to the judge (0 more were cached), 1000 + 10 tokens, $0.0004"
    )


def test_the_lexicon_judge_scores_style_and_grammar():
    text = "Hooray, people adore tea as a happy treat! Often, tea is of blue."
    scores = LexiconJudge().scores(CHEERFUL, answers(text, ""))
    assert scores.trait == (50.0, 0.0)
    assert scores.coherence == (50.0, 0.0)


def test_the_lexicon_judge_knows_the_bundled_traits_only():
    with pytest.raises(UsageError, match=r"not 'stoic'; name a model .* give the URL"):
        LexiconJudge().scores(replace(CHEERFUL, name="stoic"), answers("So be it."))
