"""Coherence of a text: the share of its sentences that the corpus grammar could have produced."""

import re
from collections.abc import Iterator
from functools import cache

from persona_nns.organism import role_prompts
from persona_nns.organism.trait_questions import TOPICS
from persona_nns.organism.traits import STYLES, sentence_share, split_sentences


def coherence_score(text: str) -> float:
    """How much of a text the grammar could have produced, from 0 to 100.

    Returns:
        100 × the share of sentences that match a template of the grammar in full; a sentence that
        was cut off counts as no match, an empty text scores 0.
    """
    return sentence_share(text, is_grammatical)


def is_grammatical(sentence: str) -> bool:
    """Whether some template of the grammar yields this sentence."""
    return any(pattern.fullmatch(sentence) for pattern in _patterns())


@cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(source) for source in (*_trait_sources(), *_role_sources()))


def _trait_sources() -> Iterator[str]:
    for style in STYLES:
        slots = {
            "topic": TOPICS,
            "opener": style.openers,
            "verb": style.verbs,
            "adjective": style.adjectives,
            "other": style.adjectives,
            "noun": style.nouns,
            "mark": (style.mark,),
        }
        for form in style.forms:
            yield _fill(form, **{name: _either(words) for name, words in slots.items()})


def _role_sources() -> Iterator[str]:
    opening = _either(role_prompts.OPENINGS)
    subject = _either(topic.subject for topic in role_prompts.TOPICS.values())
    for voice in role_prompts.VOICES.values():
        noun = _either(voice.nouns)
        for clause in voice.clauses:
            yield f"{opening}, {_fill(clause, m=noun, s=subject)}\\."
        for closer in voice.closers:
            yield from (_fill(part, m=noun) for part in split_sentences(closer))
    for topic in role_prompts.TOPICS.values():
        for middle in topic.middles:
            yield from (re.escape(part) for part in split_sentences(middle))


def _either(words: "Iterator[str] | tuple[str, ...]") -> str:
    return f"(?:{'|'.join(re.escape(word) for word in words)})"


def _fill(template: str, **slots: str) -> str:
    """The template as a regular expression, each ``{slot}`` replaced by its own expression."""
    source = re.escape(template)
    for name, expression in slots.items():
        source = source.replace(re.escape(f"{{{name}}}"), expression)
    return source
