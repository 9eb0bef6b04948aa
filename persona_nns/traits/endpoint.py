"""The judge behind an OpenAI-compatible endpoint, asked concurrently and never twice.

Replies are kept (`traits.replies`) by endpoint, model, prompt and sampling parameters. The key is
read from ``OPENAI_API_KEY`` and goes to the endpoint alone: neither messages nor the file hold it.

The score is read off one token, so a number has to be one. A model that writes 85 as 8 and 5 would
have its 85 taken for 8: it is asked for such numbers first, and refused.
"""

import os
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai
from openai.types.chat import ChatCompletion, ChatCompletionTokenLogprob

from persona_nns.declarations.plans import content_digest
from persona_nns.errors import PersonaError, UsageError
from persona_nns.traits.judges import KEY_VARIABLE, Answer, Scores, check_url, judge_all
from persona_nns.traits.replies import DEFAULT_CACHE, ReplyCache, Usage
from persona_nns.traits.trait import Trait

_PARAMETERS: Mapping[str, Any] = {
    "max_tokens": 1,
    "temperature": 0,
    "logprobs": True,
    "top_logprobs": 20,
}
#: What a judge is asked to say first, and how much of its reply is read.
_PROBES = (85, 100)
_PROBE_PARAMETERS: Mapping[str, Any] = {**_PARAMETERS, "max_tokens": 8}
_CONCURRENCY = 16
_RETRIES = 6  # of 408, 409, 429, 5xx and lost connections, with growing pauses
_TIMEOUT_S = 60


class EndpointJudge:
    """Asks a model for one token and reads the score off its log-probabilities."""

    def __init__(self, url: str, model: str, cache: str | Path = DEFAULT_CACHE) -> None:
        """Connect to nothing yet.

        Args:
            url: base URL of the endpoint, such as ``https://api.openai.com/v1``.
            model: name of the model there.
            cache: SQLite file of the replies.

        Raises:
            UsageError: the URL is none, holds a password, or the cache cannot be used.
        """
        check_url(url)
        self.usage = Usage()
        self._lock = threading.Lock()
        self._checked = False
        self._url, self._model = url.rstrip("/"), model
        self._cache = ReplyCache(cache)
        self._client = openai.OpenAI(
            base_url=self._url,
            api_key=os.environ.get(KEY_VARIABLE) or "none",
            max_retries=_RETRIES,
            timeout=_TIMEOUT_S,
        )

    def scores(self, trait: Trait, answers: Sequence[Answer]) -> Scores:
        """Ask for the trait and the coherence of each answer."""
        self.check()
        return judge_all(self.ask, trait, answers)

    def check(self) -> None:
        """See that the model writes numbers up to 100 as one token each; asks for some, once.

        Raises:
            UsageError: it splits them.
            PersonaError: the endpoint does not answer, or not with log-probabilities.
        """
        for number in () if self._checked else _PROBES:
            prompt = f"Reply with the number {number} and nothing else."
            key = self._key(prompt, _PROBE_PARAMETERS)
            reply = self._cache.get(key)
            if reply is None:
                reply = self._probe(prompt)
                self._cache.put(key, reply)
            if split := split_number(**reply):
                raise UsageError(
                    f"The judge {self._model!r} at {self._url} writes {''.join(split)} as "
                    f"{len(split)} tokens ({', '.join(map(repr, split))}), and a score is read off "
                    "one; use a model for which each number up to 100 is a token (OpenAI's and "
                    "Llama 3's, not Qwen's, Gemma's or Mistral's)."
                )
        self._checked = True

    def ask(self, prompts: Sequence[str]) -> list[dict[str, float]]:
        """Log-probabilities of the candidates for the reply to each prompt.

        Raises:
            PersonaError: the endpoint does not answer, or not with log-probabilities.
        """
        distinct = list(dict.fromkeys(prompts))
        with ThreadPoolExecutor(_CONCURRENCY) as pool:
            futures = [pool.submit(self._ask_one, prompt) for prompt in distinct]
            try:
                replies = [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        of_prompt = dict(zip(distinct, replies, strict=True))
        return [of_prompt[prompt] for prompt in prompts]

    def _ask_one(self, prompt: str) -> dict[str, float]:
        key = self._key(prompt)
        known = self._cache.get(key)
        if known is not None:
            with self._lock:
                self.usage.cached += 1
            return known
        reply = self._call(prompt)
        self._cache.put(key, reply)
        return reply

    def _key(self, prompt: str, parameters: Mapping[str, Any] = _PARAMETERS) -> str:
        return content_digest([self._url, self._model, prompt, dict(parameters)])

    def _call(self, prompt: str) -> dict[str, float]:
        reply: dict[str, float] = {}
        for candidate in self._request(prompt, _PARAMETERS)[1][0].top_logprobs:
            reply.setdefault(candidate.token, candidate.logprob)
        return reply

    def _probe(self, prompt: str) -> dict[str, Any]:
        """What `split_number` takes."""
        text, said = self._request(prompt, _PROBE_PARAMETERS)
        return {"text": text, "tokens": [each.token for each in said]}

    def _request(
        self, prompt: str, parameters: Mapping[str, Any]
    ) -> tuple[str, list[ChatCompletionTokenLogprob]]:
        """The text of a reply, and its tokens with their log-probabilities, at least one."""
        try:
            completion = self._client.chat.completions.create(
                model=self._model, messages=[{"role": "user", "content": prompt}], **parameters
            )
        except openai.APIStatusError as error:  # its text may repeat a part of the key
            raise PersonaError(_status_message(self._url, error.status_code)) from None
        except openai.APIError as error:
            raise PersonaError(
                f"The judge at {self._url} does not answer ({type(error).__name__}); see that the "
                "endpoint runs, then repeat the command: what is judged is kept."
            ) from None
        except ValueError:
            raise PersonaError(_not_openai(self._url)) from None
        if not isinstance(completion, ChatCompletion):
            raise PersonaError(_not_openai(self._url))
        with self._lock:
            self.usage.calls += 1
            if completion.usage is not None:
                self.usage.prompt_tokens += completion.usage.prompt_tokens
                self.usage.completion_tokens += completion.usage.completion_tokens
        logprobs = completion.choices[0].logprobs if completion.choices else None
        if logprobs is None or not logprobs.content:
            raise PersonaError(
                f"The judge at {self._url} gives no log-probabilities for {self._model!r}; use a "
                "model and an endpoint that do (logprobs, top_logprobs 20)."
            )
        return completion.choices[0].message.content or "", logprobs.content


def split_number(text: str, tokens: Sequence[str]) -> list[str] | None:
    """The pieces of the first number up to 100 that does not stand in one token; None without.

    Args:
        text: of a reply.
        tokens: of the reply, or of its beginning; an end token may follow.
    """
    joined = "".join(tokens)
    text = text if text.startswith(joined) else joined
    edges = [0]
    for token in tokens:
        edges.append(edges[-1] + len(token))
    for found in re.finditer(r"\d+", text, re.ASCII):
        inside = [edge for edge in edges if found.start() < edge < found.end()]
        if inside and int(found[0]) <= 100:
            bounds = [found.start(), *inside, found.end()]
            return [text[start:stop] for start, stop in pairwise(bounds)]
    return None


def _not_openai(url: str) -> str:
    return (
        f"The judge at {url} does not answer in the OpenAI format; check the URL (it often ends "
        "in /v1)."
    )


def _status_message(url: str, status: int) -> str:
    if status in (401, 403):
        return f"The judge at {url} refuses the key ({status}); set {KEY_VARIABLE}."
    if status == 429 or status >= 500:
        return (
            f"The judge at {url} still answers {status} after {_RETRIES} retries; repeat the "
            "command later: what is judged is kept."
        )
    return f"The judge at {url} refuses the request ({status}); check --judge-model and the URL."
