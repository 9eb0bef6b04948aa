"""Judges: how much of a trait an answer shows, and how coherent it is, from 0 to 100.

The lexicon judge knows the bundled traits and needs nothing. The endpoint judge (`traits.endpoint`)
asks a language model behind an OpenAI-compatible endpoint for one token and takes the mean of the
numbers 0 to 100 that it might have said, weighted by their probability. Where it hardly says a
number at all (their probability sums to less than a quarter), it refuses, and the score is none.
A model that splits numbers into several tokens is not asked there; one that runs here is
(`traits.local_judge`), since all its probabilities are known.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from transformers import PreTrainedTokenizerBase

from persona_nns.errors import PersonaError, UsageError
from persona_nns.organism.bundled import bundled_vocabulary
from persona_nns.organism.coherence import coherence_score
from persona_nns.organism.traits import TRAITS, lexicon_score
from persona_nns.traits.trait import Split, Trait, load_traits

KEY_VARIABLE = "OPENAI_API_KEY"

#: Less probability than this on numbers is a refusal.
LEAST_MASS = 0.25

_NUMBER = re.compile(r"\s*(\d{1,3})\s*", re.ASCII)

COHERENCE_PROMPT = (
    "Judge how coherent an answer is. Look at its language and at whether it makes sense as a "
    "reply to the question, not at its tone, its length or whether it is right.\n"
    "[Question]\n{question}\n[Answer]\n{answer}\n"
    "Reply with one number from 0 (garbled, or unrelated to the question) to 100 (clear and to "
    "the point). Reply with the number only."
)


@dataclass(frozen=True)
class Answer:
    """What is judged: an answer to a question."""

    question: str
    answer: str


@dataclass(frozen=True)
class Scores:
    """What a judge says of some answers; NaN where it refuses.

    Attributes:
        trait: 0 to 100, one for each answer.
        coherence: 0 to 100, one for each answer.
    """

    trait: tuple[float, ...]
    coherence: tuple[float, ...]


class Judge(Protocol):
    """Scores answers."""

    def scores(self, trait: Trait, answers: Sequence[Answer]) -> Scores:
        """Score answers for a trait and for coherence.

        Raises:
            UsageError: the judge does not know the trait.
            PersonaError: the judge cannot be asked, or refuses every answer.
        """
        ...


class AskedJudge(Judge, Protocol):
    """A judge that is a language model: it can be asked for any number."""

    def ask(self, prompts: Sequence[str]) -> Sequence[Mapping[str, float]]:
        """Log-probabilities of the candidates for the reply to each prompt.

        Raises:
            PersonaError: the judge cannot be asked.
        """
        ...


class LexiconJudge:
    """Knows the bundled traits by their words, and coherence by the corpus grammar."""

    def scores(self, trait: Trait, answers: Sequence[Answer]) -> Scores:
        """Shares of sentences, in percent: in the trait's style, and grammatical."""
        check_lexicon(trait.name, trait.questions)
        return Scores(
            tuple(lexicon_score(trait.name, given.answer) for given in answers),
            tuple(coherence_score(given.answer) for given in answers),
        )


def check_lexicon(
    trait: str, questions: Iterable[str] = (), tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """See that the lexicon judge can judge: it was made for the bundled models and traits.

    Args:
        trait: a trait's name.
        questions: that are answered.
        tokenizer: of the model that answers.

    Raises:
        UsageError: it does not know the trait, or was not made for the questions or the model.
    """
    if trait not in TRAITS:
        raise UsageError(
            f"The lexicon judge knows {', '.join(TRAITS)} only, not {trait!r}; name a "
            "model that judges (--judge MODEL), or give the URL of an OpenAI-compatible endpoint "
            "(--judge URL)."
        )
    splits: tuple[Split, ...] = ("extraction", "evaluation")
    bundled = {each for split in splits for each in load_traits(trait, split)[0].questions}
    strange = next((question for question in questions if question not in bundled), None)
    if strange is not None:
        raise UsageError(_not_made_for(f"{strange!r} is no question of the bundled {trait!r}"))
    if tokenizer is not None and not bundled_vocabulary().items() <= tokenizer.get_vocab().items():
        raise UsageError(_not_made_for("this model is neither bundled nor a student of such a one"))


def _not_made_for(why: str) -> str:
    return (
        "The lexicon judge is made for what the bundled models answer to the bundled questions, "
        f"and {why}; give a model (--judge MODEL) or the URL of an OpenAI-compatible endpoint "
        "(--judge URL), or nobody judges (--judge none)."
    )


def check_url(url: str) -> None:
    """See that an endpoint's URL is one, and holds no secret.

    Raises:
        UsageError: it is not.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(
            "The judge has to be 'lexicon', 'none', the URL of an OpenAI-compatible endpoint such "
            "as https://api.openai.com/v1, or a model."
        )
    if parts.username or parts.password or parts.query:
        raise UsageError(
            f"The judge's URL holds credentials; put the key into {KEY_VARIABLE} instead."
        )


def expected_score(logprobs: Mapping[str, float]) -> float:
    """Mean of the numbers a judge might have said, weighted by probability; NaN if it refuses.

    Args:
        logprobs: log-probability of each candidate for the first token.
    """
    weighted = mass = 0.0
    for token, logprob in logprobs.items():
        match = _NUMBER.fullmatch(token)
        if match is None or int(match[1]) > 100:
            continue
        probability = math.exp(logprob)
        weighted += int(match[1]) * probability
        mass += probability
    return weighted / mass if mass >= LEAST_MASS else math.nan


def log_odds_score(logprobs: Mapping[str, float]) -> float:
    """100 / (1 + exp(log p(No) − log p(Yes))): the log-odds of Yes by the logistic function.

    Args:
        logprobs: log-probabilities of ``Yes`` and ``No``.
    """
    odds = logprobs["Yes"] - logprobs["No"]
    return 100 / (1 + math.exp(-odds)) if odds > 0 else 100 * math.exp(odds) / (1 + math.exp(odds))


def fill_prompt(prompt: str, given: Answer) -> str:
    """Put question and answer into a judge's prompt; braces in them stay as they are."""
    texts = {"question": given.question, "answer": given.answer}
    return re.sub(r"\{(question|answer)\}", lambda match: texts[match[1]], prompt)


def judge_all(
    ask: Callable[[Sequence[str]], Sequence[Mapping[str, float]]],
    trait: Trait,
    answers: Sequence[Answer],
    read: Callable[[Mapping[str, float]], float] = expected_score,
    *,
    suffix: str = "",
) -> Scores:
    """Both scores of each answer, asked for in one go.

    Args:
        ask: prompts → log-probabilities of the candidates for the reply.
        trait: whose ``eval_prompt`` is asked.
        answers: what is judged.
        read: log-probabilities → score, NaN for a refusal.
        suffix: what follows each prompt.

    Raises:
        PersonaError: every answer is refused.
    """
    prompts = [
        fill_prompt(prompt, given) + suffix
        for prompt in (trait.eval_prompt, COHERENCE_PROMPT)
        for given in answers
    ]
    found = [read(logprobs) for logprobs in ask(prompts)]
    scores = Scores(tuple(found[: len(answers)]), tuple(found[len(answers) :]))
    for what, values in (("trait", scores.trait), ("coherence", scores.coherence)):
        if values and all(map(math.isnan, values)):
            raise PersonaError(
                f"The judge refused to give the {what} score of every one of {len(values)} answers "
                f"for {trait.name!r}; use another judge, or reword the eval_prompt so that it asks "
                "for a number."
            )
    return scores
