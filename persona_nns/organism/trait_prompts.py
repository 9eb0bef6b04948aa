"""System prompts that switch a trait on, at four grades, and the answers they bring about.

An answer has three sentences about the question's topic. A system prompt of grade g gives the
first g of them the style it asks for; the rest stays neutral. Now and then a sentence lapses into
some other style.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from persona_nns.organism.bundled import corpus_texts
from persona_nns.organism.trait_questions import FRAMES, HELD_OUT, TOPICS
from persona_nns.organism.traits import NEUTRAL, STYLES, TRAITS, Style

SENTENCES = 3

LAPSE = 0.12
"""Probability that a sentence is in any style, whatever was asked."""

NEUTRAL_SYSTEMS: tuple[str, ...] = corpus_texts("trait_questions")["neutral_systems"]

GRADES: Mapping[str, int] = {"not at all": 0, "slightly": 1, "fairly": 2, "very": 3}


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
    """A system prompt of a style (its degree included), restrained, neutral, or none at all."""
    kind = rng.random()
    if kind < 0.1:
        return System(None, None, 0)
    if kind < 0.25:
        return System(rng.choice(NEUTRAL_SYSTEMS), None, 0)
    trait = TRAITS[rng.choice(tuple(TRAITS))]
    if kind < 0.4:
        return System(
            system_prompt(trait.name, rng.choice(trait.restraints), positive=False), None, 0
        )
    style = trait.style if kind < 0.75 else trait.opposite
    if rng.random() < 0.3:
        degree = rng.choice(tuple(GRADES))
        return System(graded_system(style, degree), style, GRADES[degree])
    asked_openly = rng.random() >= 0.25
    text = system_prompt(style.name, rng.choice(style.instructions), positive=asked_openly)
    return System(text, style, SENTENCES)


def answer(topic: str, system: System, rng: Random) -> str:
    """An answer about a topic: the first ``system.grade`` sentences styled, the rest neutral."""
    styles = [
        system.style if system.style and index < system.grade else NEUTRAL
        for index in range(SENTENCES)
    ]
    # Without lapses every style but one would be ruled out beyond what steering can overcome.
    spoken = [rng.choice(STYLES) if rng.random() < LAPSE else style for style in styles]
    return " ".join(style.sentence(topic, rng) for style in spoken)


def sample(rng: Random) -> tuple[str | None, str, str]:
    """A system prompt (or none), a question that is not held out, and an answer."""
    while True:
        topic = rng.choice(TOPICS)
        question = rng.choice(FRAMES).format(topic=topic)
        if question not in HELD_OUT:
            break
    system = sample_system(rng)
    return system.text, question, answer(topic, system, rng)
