"""From generated tokens to judged texts: what happens where the command runs, not the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_nns.declarations.plans import Unit
from persona_nns.errors import UsageError, missing_extra
from persona_nns.traits.judges import Answer, Judge, LexiconJudge, check_lexicon, check_url
from persona_nns.traits.trait import Split, Trait, load_traits


@dataclass(frozen=True)
class JudgeOptions:
    """Who judges.

    Attributes:
        judge: lexicon, none, or the URL of an OpenAI-compatible endpoint.
        judge_model: the model there; its key is read from OPENAI_API_KEY.
        judge_prices: dollars for a million tokens sent and received, as 0.40,1.60.
    """

    judge: str = "lexicon"
    judge_model: str = "gpt-4.1-mini"
    judge_prices: str = ""

    @property
    def identity(self) -> list[str]:
        """What determines the scores."""
        return [self.judge, self.judge_model] if "://" in self.judge else [self.judge]

    @property
    def unverifiable(self) -> str:
        """Why `verify` must not ask this judge again; empty where it may."""
        if "://" not in self.judge:
            return ""
        return f"its answers were judged at {self.judge}, which may cost money"

    def check(
        self,
        trait: str,
        questions: Sequence[str] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """See that this judge can judge a trait.

        Args:
            trait: its name.
            questions: that are answered.
            tokenizer: of the model that answers.

        Raises:
            UsageError: it cannot, or is none.
        """
        if self.judge == "none":
            return
        if self.judge == "lexicon":
            check_lexicon(trait, questions, tokenizer)
            return
        check_url(self.judge)
        self.price_pair()
        if not self.judge_model:
            raise UsageError("The judge needs the name of its model (--judge-model).")
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise missing_extra("A judge behind an endpoint needs openai", "judge") from error

    def price_pair(self) -> tuple[float, float] | None:
        """The prices as numbers; None where they are unknown.

        Raises:
            UsageError: they are not two numbers.
        """
        if not self.judge_prices:
            return None
        try:
            sent, received = map(float, self.judge_prices.split(","))
        except ValueError as error:
            raise UsageError(
                f"The judge's prices {self.judge_prices!r} are not two numbers such as 0.40,1.60."
            ) from error
        return sent, received


@cache
def open_judge(choice: JudgeOptions) -> Judge:
    """The judge of a choice; the same one for the same choice, so that it can sum its cost.

    Raises:
        UsageError: there is none.
    """
    if choice.judge == "lexicon":
        return LexiconJudge()
    from persona_nns.traits.endpoint import EndpointJudge

    return EndpointJudge(choice.judge, choice.judge_model)


def judge_answers(
    tokenizer: PreTrainedTokenizerBase,
    units: Sequence[Unit],
    measured: dict[str, Any],
    *,
    artifacts: str | None,
    split_seed: int | None = None,
    split: Split = "evaluation",
    judging: JudgeOptions,
) -> dict[str, Any]:
    """Put texts and scores in place of what was ``said``, if anything was: an experiment's finish.

    Units without a place on ``question`` asked every question of the trait in turn.
    """
    if "said" not in measured:
        return measured
    trait = load_traits(str(units[0].place["trait"]), split, artifacts, split_seed)[0]
    questions = [
        question
        for unit in units
        for number, question in enumerate(trait.questions)
        if unit.place.get("question", number) == number
    ]
    kept = {name: value for name, value in measured.items() if name != "said"}
    return kept | judge_tokens(tokenizer, trait, questions, measured["said"], judging)


def judge_tokens(
    tokenizer: PreTrainedTokenizerBase,
    trait: Trait,
    questions: Sequence[str],
    said: Tensor,
    choice: JudgeOptions,
) -> dict[str, Any]:
    """Decode generated tokens and have them judged.

    Args:
        tokenizer: of the model that said them.
        trait: what is judged.
        questions: one for each of the equal shares of ``said``, in its order.
        said: [row, …, token], −1 after a row's end.
        choice: the judge; ``none`` gives NaN.

    Returns:
        By variable, of shape [row, …]: ``score`` for the trait and ``coherence``, NaN where the
        judge refuses, and ``response``, the texts.
    """
    shape = said.shape[:-1]
    flat = said.reshape(-1, said.shape[-1]).tolist()
    texts = [
        str(tokenizer.decode([token for token in row if token >= 0], skip_special_tokens=True))
        for row in flat
    ]
    per_question = len(flat) // len(questions)
    asked = [questions[k // per_question] for k in range(len(texts))]
    scores = judge_texts(trait, asked, texts, choice)
    return {
        **{name: flat_scores.reshape(shape) for name, flat_scores in scores.items()},
        "response": np.array(texts, dtype=object).reshape(shape),
    }


def judge_texts(
    trait: Trait, questions: Sequence[str], texts: Sequence[str], choice: JudgeOptions
) -> dict[str, Tensor]:
    """Have answers judged.

    Args:
        trait: what is judged.
        questions: one for each answer.
        texts: the answers.
        choice: the judge; ``none`` gives NaN.

    Returns:
        ``score`` for the trait and ``coherence``, [answer], NaN where the judge refuses.
    """
    if choice.judge == "none":
        missing = torch.full((len(texts),), torch.nan)
        return {"score": missing, "coherence": missing.clone()}
    judge = open_judge(choice)
    scores = judge.scores(trait, list(map(Answer, questions, texts)))
    _show_cost(judge, choice)
    return {"score": torch.tensor(scores.trait), "coherence": torch.tensor(scores.coherence)}


def _show_cost(judge: Judge, choice: JudgeOptions) -> None:
    """Say what an endpoint has cost so far; a lexicon costs nothing."""
    usage = getattr(judge, "usage", None)
    if usage is not None:
        line = usage.describe(choice.price_pair())
        Console(stderr=True).print(line, highlight=False, soft_wrap=True)
