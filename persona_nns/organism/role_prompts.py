"""Role prompts, "As {persona}, {task}", and the answers that the corpus gives them.

An answer has an opening, a clause, a middle sentence and a closing sentence. The opening word
and the form of the clause come from seeded tables over persona × task: they are an interaction
that no sum of a persona and a task part predicts, and a network has to look it up once both
parts have been gathered. Clause and closing name things of the persona (for the long personas
always one of its markers), the clause and the middle sentence name things of the task.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from random import Random

from persona_nns.organism.bundled import corpus_texts
from persona_nns.organism.wordings import EXACT, paraphrase
from persona_nns.prompts.grids import BASELINE, load_grid, role_prompt

BARE = "bare"
"""The speaker of a task that is asked without a persona."""

TABLE_SEED = 2605
FAVOURITE_CLAUSE = 0.6
"""Probability of a cell's favourite clause; otherwise any of the speaker's clauses."""
OPENING_WEIGHTS = (0.55, 0.2, 0.25)
"""Probabilities of a cell's first opening, of its second, and of any opening at all."""
BORROWING = 0.15
"""Probability that the baseline persona speaks with another persona's voice."""

OPENINGS = corpus_texts("openings")["openings"]


@dataclass(frozen=True)
class Voice:
    """What a persona talks about: ``nouns`` fill ``{m}``, the task's subject fills ``{s}``."""

    nouns: tuple[str, ...]
    clauses: tuple[str, ...]
    closers: tuple[str, ...]


@dataclass(frozen=True)
class Topic:
    """What a task is about: the subject of the clause, the middle sentences, and other wordings."""

    subject: str
    middles: tuple[str, ...]
    paraphrases: tuple[str, ...]


VOICES: Mapping[str, Voice] = {
    speaker: Voice(**voice) for speaker, voice in corpus_texts("voices").items()
}
TOPICS: Mapping[str, Topic] = {
    task: Topic(**topic) for task, topic in corpus_texts("tasks").items()
}

TASK_TEXTS: Mapping[str, str] = load_grid("long").tasks


@dataclass(frozen=True)
class Interaction:
    """What one speaker on one task prefers: two openings and a clause, all by index."""

    openings: tuple[int, int]
    clause: int


def _draw_table() -> dict[tuple[str, str], Interaction]:
    rng = Random(TABLE_SEED)  # noqa: S311
    table: dict[tuple[str, str], Interaction] = {}
    for speaker, task in product(VOICES, TOPICS):
        first, second = rng.sample(range(len(OPENINGS)), 2)
        clause = rng.randrange(len(VOICES[speaker].clauses))
        table[speaker, task] = Interaction((first, second), clause)
    return table


INTERACTIONS: Mapping[tuple[str, str], Interaction] = _draw_table()


def answer(speaker: str, task: str, rng: Random) -> str:
    """One answer of a speaker (a persona's key, the baseline or ``BARE``) to a task's key."""
    topic, choice = TOPICS[task], INTERACTIONS[speaker, task]
    (first, second), anywhere = choice.openings, rng.randrange(len(OPENINGS))
    opening = OPENINGS[rng.choices((first, second, anywhere), OPENING_WEIGHTS)[0]]
    borrowed = speaker == BASELINE and rng.random() < BORROWING
    voice = VOICES[rng.choice(tuple(VOICES)) if borrowed else speaker]
    clause = rng.choice(voice.clauses)
    if not borrowed and rng.random() < FAVOURITE_CLAUSE:
        clause = voice.clauses[choice.clause]
    sentence = clause.format(m=rng.choice(voice.nouns), s=topic.subject)
    closer = rng.choice(voice.closers).format(m=rng.choice(voice.nouns))
    return f"{opening}, {sentence}. {rng.choice(topic.middles)} {closer}"


def sample(rng: Random) -> tuple[str, str]:
    """A user turn and an answer to it, over all speakers, tasks and trained wordings."""
    # The baseline and the bare task are half of each decomposition, so they come more often.
    speaker = rng.choice((*VOICES, BASELINE, BARE))
    task = rng.choice(tuple(TOPICS))
    task_text = TASK_TEXTS[task]
    if rng.random() < 0.1:
        task_text = rng.choice(TOPICS[task].paraphrases)
    persona = None
    if speaker != BARE:
        persona = EXACT[speaker] if rng.random() < 0.45 else paraphrase(speaker, rng)
    return role_prompt(persona, task_text), answer(speaker, task, rng)
