"""From generated tokens to judged texts: what happens where the command runs, not the model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_nns.declarations.plans import Unit
from persona_nns.traits.judge_options import JudgeOptions, open_judge
from persona_nns.traits.judges import Answer, Judge
from persona_nns.traits.trait import Split, Trait, load_traits


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
    show_cost(judge, choice)
    return {"score": torch.tensor(scores.trait), "coherence": torch.tensor(scores.coherence)}


def judge_talks(
    trait: Trait, asked: Sequence[Sequence[str]], texts: np.ndarray[Any, Any], choice: JudgeOptions
) -> dict[str, np.ndarray[Any, Any]]:
    """Have the answers in conversations judged, each to what the user said before it.

    Args:
        trait: what is judged.
        asked: the user's texts of each conversation.
        texts: [conversation, turn, …], user and model in turn; empty where there is no answer.
        choice: the judge.

    Returns:
        ``score`` for the trait and ``coherence``, of the shape of the texts; NaN without an answer
        and where the judge refuses.
    """
    places = np.argwhere(texts != "")
    questions = [asked[int(row)][int(turn) // 2] for row, turn in places[:, :2].tolist()]
    answers = [str(text) for text in texts[tuple(places.T)]]
    judged: dict[str, np.ndarray[Any, Any]] = {}
    for name, values in judge_texts(trait, questions, answers, choice).items():
        judged[name] = np.full(texts.shape, np.nan)
        judged[name][tuple(places.T)] = values.numpy()
    return judged


def show_cost(judge: Judge, choice: JudgeOptions) -> None:
    """Say what an endpoint has cost so far; a lexicon costs nothing."""
    usage = getattr(judge, "usage", None)
    if usage is not None:
        line = usage.describe(choice.price_pair())
        Console(stderr=True).print(line, highlight=False, soft_wrap=True)
