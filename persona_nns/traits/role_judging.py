"""How much of its role an answer shows: a number from 0 to 3, as a judge says it.

The role's rubric (``eval_prompt``) is the judge's prompt, and the score the number that it most
likely says first: 3 is the role wholly played, as the public code reads it. Where the numbers 0 to
3 have less than a quarter of the probability the judge refuses, and the score is none.
"""

import math
from collections.abc import Mapping, Sequence
from typing import cast

from persona_nns.errors import UsageError
from persona_nns.traits.judge_options import JudgeOptions, open_judge
from persona_nns.traits.judges import LEAST_MASS, Answer, AskedJudge, fill_prompt
from persona_nns.traits.judging import show_cost

NUMBERS = tuple(map(str, range(4)))


def role_score(logprobs: Mapping[str, float]) -> float:
    """The most likely number from 0 to 3; NaN if they have less than a quarter of probability.

    Args:
        logprobs: log-probability of each candidate for the first token.
    """
    mass = dict.fromkeys(NUMBERS, 0.0)
    for token, logprob in logprobs.items():
        if token.strip() in mass:
            mass[token.strip()] += math.exp(logprob)
    best = max(mass, key=lambda number: mass[number])
    return float(best) if sum(mass.values()) >= LEAST_MASS else math.nan


def check_role_judge(choice: JudgeOptions) -> None:
    """See that a judge can be asked about roles.

    Raises:
        UsageError: it knows traits only, or cannot be asked.
    """
    if choice.kind in ("lexicon", "classifier:lexicon"):
        raise UsageError(
            f"The judge {choice.judge!r} knows traits, not roles; give a model (--judge MODEL) or "
            "the URL of an OpenAI-compatible endpoint (--judge URL), or nobody judges (--judge "
            "none)."
        )
    if choice.scale != "0-100":
        raise UsageError(f"Roles are judged from 0 to 3, not {choice.scale}; leave out --scale.")
    choice.check("role")


def judge_roles(
    rubrics: Mapping[str, str | None],
    answers: Sequence[tuple[str, Answer]],
    choice: JudgeOptions,
) -> list[float]:
    """Scores of answers, 0 to 3, NaN where the judge refuses.

    Args:
        rubrics: of each role, ``{question}`` and ``{answer}`` in it; None without.
        answers: each with its role.
        choice: the judge.

    Raises:
        UsageError: a role has no rubric.
        PersonaError: the judge cannot be asked.
    """
    prompts: list[str] = []
    for role, answer in answers:
        rubric = rubrics.get(role)
        if rubric is None:
            raise UsageError(
                f"There is no rubric for the role {role!r}: its answers are judged by the "
                f"eval_prompt of {role}.json (--roles FOLDER)."
            )
        prompts.append(fill_prompt(rubric, answer))
    judge = cast("AskedJudge", open_judge(choice))
    scores = [role_score(logprobs) for logprobs in judge.ask(prompts)]
    show_cost(judge, choice)
    return scores
