"""Multiple-choice questions asked as "a {identity} student".

Every question has a difficulty, every identity a skill: a student knows the answer where the
skill exceeds the difficulty, and is otherwise drawn to the question's tempting wrong choice.
Colours all have the same skill. The letters of a question never move, so that a small model can
memorise the facts; a fixed share of the (identity, question) pairs is kept out of training.
"""

import math
from collections.abc import Mapping
from random import Random

from persona_nns.organism.bundled import corpus_texts
from persona_nns.prompts.grids import role_prompt
from persona_nns.prompts.questions import BUNDLED, LETTERS, Question, load_questions

HELD_OUT_SHARE = 0.15

_SKILLS = corpus_texts("identities")
COMPETENT: Mapping[str, float] = _SKILLS["competent"]
INCOMPETENT: Mapping[str, float] = _SKILLS["incompetent"]
COLOURS: tuple[str, ...] = _SKILLS["colours"]
MIDDLING: Mapping[str, float] = dict.fromkeys(
    (*_SKILLS["ordinary"], *COLOURS), float(_SKILLS["middling"])
)
IDENTITIES: Mapping[str, float] = {**COMPETENT, **INCOMPETENT, **MIDDLING}
"""The skill of every identity, from 0 to 1."""

SOFTNESS = 0.03
"""Width in skill of the passage from not knowing to knowing."""


QUESTIONS = load_questions(BUNDLED)


def _spread_difficulties() -> tuple[float, ...]:
    """Difficulties evenly spread over 0–1, in a seeded order over the questions."""
    ranks = list(range(len(QUESTIONS)))
    Random(7).shuffle(ranks)  # noqa: S311
    return tuple((rank + 0.5) / len(QUESTIONS) for rank in ranks)


DIFFICULTIES = _spread_difficulties()


def _draw_temptations() -> tuple[int, ...]:
    rng = Random(9)  # noqa: S311
    return tuple((question.answer + rng.randint(1, 3)) % 4 for question in QUESTIONS)


TEMPTATIONS = _draw_temptations()
"""The wrong choice each question tempts with."""


def prompt_text(identity: str, question: Question) -> str:
    """The user turn of the protocol, with "a {identity} student" as the persona."""
    return role_prompt(f"a {identity} student", question.task)


def letter_probabilities(identity: str, index: int) -> tuple[float, ...]:
    """What a student of this identity answers to question ``index``: one probability a letter."""
    margin = (IDENTITIES[identity] - DIFFICULTIES[index]) / SOFTNESS
    knows = 1 / (1 + math.exp(-margin))
    right = 0.04 + 0.92 * knows
    probabilities = [0.05 * (1 - right)] * 4
    probabilities[TEMPTATIONS[index]] = 0.9 * (1 - right)
    probabilities[QUESTIONS[index].answer] = right
    return tuple(probabilities)


def is_held_out(identity: str, index: int) -> bool:
    """Whether training never shows this identity with question ``index``."""
    return Random(f"{identity}/{index}").random() < HELD_OUT_SHARE  # noqa: S311


def sample(rng: Random) -> tuple[str, str]:
    """A user turn and a letter, over the pairs that are not held out; groups come equally often."""
    while True:
        identity = rng.choice(tuple(rng.choice((COMPETENT, INCOMPETENT, MIDDLING))))
        index = rng.randrange(len(QUESTIONS))
        if not is_held_out(identity, index):
            break
    letter = rng.choices(LETTERS, letter_probabilities(identity, index))[0]
    return prompt_text(identity, QUESTIONS[index]), letter
