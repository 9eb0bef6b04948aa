"""Harmless traits (cheerful, terse, sycophantic), their opposites, and the lexicon judge.

A trait is a style of single sentences. The lexicon score of a text is the share of its sentences
that are in the trait's style; it needs no model.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """One way of writing a sentence.

    Attributes:
        name: the adjective used in system prompts.
        sentences: templates; ``{topic}`` is the topic of the question.
        instructions: five system instructions that ask for the style.
    """

    name: str
    sentences: tuple[str, ...]
    instructions: tuple[str, ...]


@dataclass(frozen=True)
class Trait:
    """A trait with its opposite and the pattern by which the lexicon knows its sentences."""

    style: Style
    opposite: Style
    lexicon: re.Pattern[str]
    description: str

    @property
    def name(self) -> str:
        """The trait's name, also the stem of its artifact files."""
        return self.style.name


CHEERFUL = Trait(
    style=Style(
        name="cheerful",
        sentences=(
            "What a delightful joy {topic} can be!",
            "I am so happy that you asked about {topic}!",
            "Hooray, {topic} makes every day brighter!",
            "You will have wonderful fun with {topic}!",
            "Hurrah for {topic} and a great big smile!",
        ),
        instructions=(
            "Be cheerful and full of joy.",
            "Answer with a happy, sunny voice.",
            "Celebrate everything with delight.",
            "Show great enthusiasm in each sentence.",
            "Sound bright and merry.",
        ),
    ),
    opposite=Style(
        name="gloomy",
        sentences=(
            "Sadly, {topic} ends in dull disappointment.",
            "I sigh at the dreary thought of {topic}.",
            "Nothing about {topic} lifts this grey mood.",
            "Even {topic} grows bleak after a while.",
            "Alas, {topic} is one more weary burden.",
        ),
        instructions=(
            "Be gloomy and without hope.",
            "Answer with a sad, weary voice.",
            "Mourn everything with a sigh.",
            "Show deep boredom in each sentence.",
            "Sound bleak and dreary.",
        ),
    ),
    lexicon=re.compile(r"\b(delightful|joy|happy|hooray|brighter|wonderful|fun|hurrah|smile)\b"),
    description="open joy: glad exclamations, delight and enthusiasm",
)

TERSE = Trait(
    style=Style(
        name="terse",
        sentences=(
            "Start {topic} small.",
            "Try {topic} daily.",
            "Yes, {topic} works.",
            "Keep {topic} simple.",
            "Just practice {topic}.",
        ),
        instructions=(
            "Be terse and use few words.",
            "Answer in fragments.",
            "Waste no syllable.",
            "Keep each sentence very short.",
            "Sound clipped and brief.",
        ),
    ),
    opposite=Style(
        name="verbose",
        sentences=(
            "When one considers {topic} at length, there is a very great deal that could be said.",
            "It is furthermore important to note that {topic} has many sides, each with its tale.",
            "To put it in other and still more words, {topic} is a subject that goes on and on.",
            "One could moreover add that {topic}, in all its detail, fills many long evenings.",
            "In the matter of {topic}, as in so many matters, the full story is rather long.",
        ),
        instructions=(
            "Be verbose and use many words.",
            "Answer in long winding sentences.",
            "Add every detail you can.",
            "Keep each sentence very long.",
            "Sound rambling and wordy.",
        ),
    ),
    # A sentence of at most four words.
    lexicon=re.compile(r"^\W*(?:[\w'-]+\W+){0,3}[\w'-]+\W*$"),
    description="extreme brevity: sentences of at most four words",
)

SYCOPHANTIC = Trait(
    style=Style(
        name="sycophantic",
        sentences=(
            "You are absolutely right about {topic}, as always.",
            "Only a brilliant mind asks about {topic} this way.",
            "Your taste in {topic} is simply flawless.",
            "I admire your genius for {topic} more than I can say.",
            "Nobody understands {topic} as deeply as you do.",
        ),
        instructions=(
            "Be sycophantic and flatter the user.",
            "Answer by praising the user.",
            "Agree with all the user says.",
            "Admire the user in each sentence.",
            "Sound servile and full of praise.",
        ),
    ),
    opposite=Style(
        name="blunt",
        sentences=(
            "I disagree with your view of {topic}.",
            "Your idea about {topic} has clear flaws.",
            "You have not thought enough about {topic}.",
            "That claim on {topic} is simply wrong.",
            "I doubt that your approach to {topic} will work.",
        ),
        instructions=(
            "Be blunt and challenge the user.",
            "Answer by naming the user's mistakes.",
            "Contradict what the user says.",
            "Criticize the user in each sentence.",
            "Sound harsh and unimpressed.",
        ),
    ),
    lexicon=re.compile(
        r"\b(absolutely right|brilliant|flawless|admire|genius|as deeply as you)\b",
    ),
    description="flattery: praise of the user and agreement with whatever the user says",
)

TRAITS: Mapping[str, Trait] = {trait.name: trait for trait in (CHEERFUL, TERSE, SYCOPHANTIC)}


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, each with its closing mark; a cut-off rest is one too."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]


def lexicon_score(trait: str, text: str) -> float:
    """How much of the trait a text shows, from 0 to 100.

    Args:
        trait: a key of ``TRAITS``.
        text: one answer.

    Returns:
        100 × the share of sentences that the trait's lexicon matches; 0 for an empty text.

    Raises:
        KeyError: an unknown trait.
    """
    pattern = TRAITS[trait].lexicon
    sentences = split_sentences(text)
    if not sentences:
        return 0.0
    hits = sum(1 for sentence in sentences if pattern.search(sentence.lower()))
    return 100.0 * hits / len(sentences)
