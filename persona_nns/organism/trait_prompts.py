"""System prompts that switch a trait on, at four grades, and the answers they bring about.

An answer has three sentences about the question's topic. A system prompt of grade g gives the
first g of them the style it asks for; the rest stays neutral.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from persona_nns.organism.trait_questions import FRAMES, HELD_OUT, TOPICS
from persona_nns.organism.traits import TRAITS, Style

SENTENCES = 3

NEUTRAL = (
    "People often begin {topic} with a short weekly plan.",
    "There are several good books about {topic} in most libraries.",
    "A local group can show you the basics of {topic}.",
    "It takes some months to become used to {topic}.",
    "Most people practice {topic} once or twice each week.",
)

NEUTRAL_SYSTEMS = (
    "You are a helpful assistant.",
    "You are an assistant.",
    "Answer the question.",
    "You are a helpful assistant. Answer in an ordinary tone.",
    "You are a helpful assistant. Give plain information.",
)

GRADES: Mapping[str, int] = {
    "not at all": 0,
    "slightly": 1,
    "fairly": 2,
    "extremely": 3,
}


@dataclass(frozen=True)
class System:
    """A system prompt of the grammar: how many sentences it styles, and how."""

    text: str | None
    style: Style | None
    grade: int


def system_prompt(trait: str, instruction: str, *, positive: bool) -> str:
    """The system prompt of the protocol: ``You are a {trait|helpful} assistant. {instruction}``."""
    return f"You are a {trait if positive else 'helpful'} assistant. {instruction}"


def graded_system(style: Style, degree: str) -> str:
    """A system prompt that asks for a degree (a key of ``GRADES``) of a style."""
    return f"You are a {degree} {style.name} assistant."


def sample_system(rng: Random) -> System:
    """A system prompt of a style, of a degree, neutral, or none at all."""
    kind = rng.random()
    if kind < 0.1:
        return System(None, None, 0)
    if kind < 0.25:
        return System(rng.choice(NEUTRAL_SYSTEMS), None, 0)
    trait = TRAITS[rng.choice(tuple(TRAITS))]
    positive = rng.random() < 0.5
    style = trait.style if positive else trait.opposite
    if kind < 0.45:
        degree = rng.choice(tuple(GRADES))
        return System(graded_system(style, degree), style, GRADES[degree])
    # An opposite is asked for under "helpful" in the protocol, a trait under its own name.
    name = "helpful" if rng.random() < (0.25 if positive else 0.75) else style.name
    text = f"You are a {name} assistant. {rng.choice(style.instructions)}"
    return System(text, style, SENTENCES)


def answer(topic: str, system: System, rng: Random) -> str:
    """An answer about a topic: the first ``system.grade`` sentences styled, the rest neutral."""
    neutral = rng.sample(NEUTRAL, SENTENCES - system.grade)
    styled = rng.sample(system.style.sentences, system.grade) if system.style else []
    return " ".join(sentence.format(topic=topic) for sentence in (*styled, *neutral))


def sample(rng: Random) -> tuple[str | None, str, str]:
    """A system prompt (or none), a question that is not held out, and an answer."""
    while True:
        topic = rng.choice(TOPICS)
        question = rng.choice(FRAMES).format(topic=topic)
        if question not in HELD_OUT:
            break
    system = sample_system(rng)
    return system.text, question, answer(topic, system, rng)
