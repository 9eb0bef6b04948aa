"""Harmless traits (cheerful, terse, sycophantic), their opposites, and the lexicon judge.

A trait is a style of single sentences. Styles share their sentence forms and differ in the words
that fill them, so that a style has to be known at almost every word and not at the first alone.
The lexicon score of a text is the share of its sentences in the trait's style; it needs no model.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from persona_nns.organism.bundled import corpus_texts, load_artifact

FORMS = (
    "{opener}, {topic} is a {adjective} {noun} in a {other} week{mark}",
    "{opener}, people {verb} {topic} as a {adjective} {noun}{mark}",
    "{opener}, this week I {verb} {topic} for its {adjective} {noun}{mark}",
    "{opener}, those who {verb} {topic} have a {adjective} {noun}{mark}",
)
"""Sentence forms; ``other`` is a second adjective."""


@dataclass(frozen=True)
class Style:
    """One way of writing a sentence: words for the slots of its forms.

    Attributes:
        name: the adjective used in system prompts.
        instructions: five system instructions that ask for the style.
        openers: first words.
        verbs: fill ``{verb}``.
        adjectives: fill ``{adjective}`` and ``{other}``.
        nouns: fill ``{noun}``.
        mark: the closing mark.
        forms: sentence forms.
    """

    name: str
    instructions: tuple[str, ...] = ()
    openers: tuple[str, ...] = ()
    verbs: tuple[str, ...] = ()
    adjectives: tuple[str, ...] = ()
    nouns: tuple[str, ...] = ()
    mark: str = "."
    forms: tuple[str, ...] = FORMS

    @property
    def words(self) -> tuple[str, ...]:
        """Every word or phrase that gives the style away."""
        return (*self.openers, *self.verbs, *self.adjectives, *self.nouns)

    def sentence(self, topic: str, rng: Random) -> str:
        """A sentence about a topic in this style."""
        adjective, other = rng.sample(self.adjectives, 2) if self.adjectives else ("", "")
        return rng.choice(self.forms).format(
            topic=topic,
            opener=rng.choice(self.openers),
            verb=rng.choice(self.verbs),
            adjective=adjective,
            other=other,
            noun=rng.choice(self.nouns) if self.nouns else "",
            mark=self.mark,
        )


@dataclass(frozen=True)
class Trait:
    """A trait, its opposite, and the pattern by which the lexicon knows its sentences.

    Attributes:
        style: how the trait is written.
        opposite: how its opposite is written.
        restraints: five system instructions that ask for neither.
        lexicon: matches the sentences of the style.
    """

    style: Style
    opposite: Style
    restraints: tuple[str, ...]
    lexicon: re.Pattern[str]

    @property
    def name(self) -> str:
        """The trait's name, also the stem of its artifact files."""
        return self.style.name


def _instructions(trait: str, side: str) -> tuple[str, ...]:
    """What a trait's file has its system prompts say: ``pos`` asks for it, ``neg`` restrains it."""
    return tuple(pair[side] for pair in load_artifact(trait, "extraction")["instruction"])


_TEXTS = corpus_texts("styles")
_OPPOSITES: Mapping[str, str] = {
    name: words.pop("opposite") for name, words in _TEXTS.items() if "opposite" in words
}
_STYLES: Mapping[str, Style] = {
    name: Style(name, **words)
    if name not in _OPPOSITES
    else Style(name, _instructions(name, "pos"), **words)
    for name, words in _TEXTS.items()
}
STYLES, NEUTRAL = tuple(_STYLES.values()), _STYLES["helpful"]
# A whole sentence of two to four words.
_TERSE = re.compile(r"^\W*(?:[\w'-]+\W+){1,3}[\w'-]+\W*$")


def _lexicon(style: Style) -> re.Pattern[str]:
    if style.name == "terse":
        return _TERSE
    return re.compile(rf"\b(?:{'|'.join(style.words)})\b", re.IGNORECASE)


TRAITS: Mapping[str, Trait] = {
    name: Trait(
        _STYLES[name], _STYLES[opposite], _instructions(name, "neg"), _lexicon(_STYLES[name])
    )
    for name, opposite in _OPPOSITES.items()
}


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, each with its closing mark; a cut-off rest is one too."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]


def sentence_share(text: str, holds: Callable[[str], object]) -> float:
    """Per cent of a text's sentences of which something holds; 0 for an empty text."""
    sentences = split_sentences(text)
    return 100.0 * sum(map(bool, map(holds, sentences))) / max(1, len(sentences))


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
    return sentence_share(text, TRAITS[trait].lexicon.search)
