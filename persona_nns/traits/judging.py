"""From generated tokens to judged texts: what happens where the command runs, not the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_nns.errors import UsageError
from persona_nns.traits.judges import Answer, Judge, LexiconJudge, check_lexicon
from persona_nns.traits.trait import Trait


@dataclass(frozen=True)
class JudgeChoice:
    """Who judges, as the options say it.

    Attributes:
        judge: ``lexicon``, ``none``, or the URL of an OpenAI-compatible endpoint.
        model: the model there.
        prices: US dollars for a million prompt tokens and a million completion tokens, as
            ``0.40,1.60``; empty where unknown.
    """

    judge: str = "lexicon"
    model: str = ""
    prices: str = ""

    @property
    def identity(self) -> list[str]:
        """What determines the scores."""
        return [self.judge, self.model] if "://" in self.judge else [self.judge]

    def check(self, trait: str) -> None:
        """See that this judge can judge a trait.

        Raises:
            UsageError: it cannot, or is none.
        """
        if self.judge == "none":
            return
        if self.judge == "lexicon":
            check_lexicon(trait)
            return
        from persona_nns.traits.endpoint import check_url

        check_url(self.judge)
        self.price_pair()
        if not self.model:
            raise UsageError("The judge needs the name of its model (--judge-model).")

    def price_pair(self) -> tuple[float, float] | None:
        """The prices as numbers.

        Raises:
            UsageError: they are not two numbers.
        """
        if not self.prices:
            return None
        try:
            sent, received = map(float, self.prices.split(","))
        except ValueError as error:
            raise UsageError(
                f"The judge's prices {self.prices!r} are not two numbers such as 0.40,1.60."
            ) from error
        return sent, received


@cache
def open_judge(choice: JudgeChoice) -> Judge:
    """The judge of a choice; the same one for the same choice, so that it can sum its cost.

    Raises:
        UsageError: there is none.
    """
    if choice.judge == "lexicon":
        return LexiconJudge()
    from persona_nns.traits.endpoint import EndpointJudge

    return EndpointJudge(choice.judge, choice.model)


def judge_tokens(
    tokenizer: PreTrainedTokenizerBase,
    trait: Trait,
    questions: Sequence[str],
    said: Tensor,
    choice: JudgeChoice,
) -> dict[str, Any]:
    """Decode generated tokens and have them judged.

    Args:
        tokenizer: of the model that said them.
        trait: what is judged.
        questions: one for each row of ``said``.
        said: [row, …, token], −1 after a row's end.
        choice: the judge; ``none`` gives NaN.

    Returns:
        By variable, of shape [row, …]: ``score`` for the trait and ``coherence``, NaN where the
        judge refuses, and ``response``, the texts.
    """
    import numpy as np

    shape = said.shape[:-1]
    flat = said.reshape(-1, said.shape[-1]).tolist()
    texts = [
        str(tokenizer.decode([token for token in row if token >= 0], skip_special_tokens=True))
        for row in flat
    ]
    per_question = len(flat) // len(questions)
    answers = [Answer(questions[k // per_question], text) for k, text in enumerate(texts)]
    response = np.array(texts, dtype=object).reshape(shape)
    if choice.judge == "none":
        missing = torch.full(shape, torch.nan)
        return {"score": missing, "coherence": missing, "response": response}
    judge = open_judge(choice)
    scores = judge.scores(trait, answers)
    _show_cost(judge, choice)
    return {
        "score": torch.tensor(scores.trait).reshape(shape),
        "coherence": torch.tensor(scores.coherence).reshape(shape),
        "response": response,
    }


def _show_cost(judge: Judge, choice: JudgeChoice) -> None:
    """Say what an endpoint has cost so far; a lexicon costs nothing."""
    usage = getattr(judge, "usage", None)
    if usage is not None:
        line = usage.describe(choice.price_pair())
        Console(stderr=True).print(line, highlight=False, soft_wrap=True)
