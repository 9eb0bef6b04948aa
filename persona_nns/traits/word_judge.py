"""Scoring without any judge: the share of sentences that hold one of a list of words.

A file of words, TOML or JSON, has a list for each trait: ``terse = ["briefly", "in short"]``. A
word is found as persona markers are: case does not matter, a word alone stands on word boundaries,
one with a space or a hyphen is looked for as it is (`prompts.markers`). The score is 100 × the
share of sentences that hold any of them, 0 for an empty answer; a sentence ends at ``.``, ``!`` or
``?`` and white space, as it does for the lexicon judge. Words tell nothing of coherence: it is NaN.
"""

import math
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from persona_nns.errors import UsageError
from persona_nns.organism.traits import sentence_share
from persona_nns.prompts.files import read_json, read_toml, suffix_of
from persona_nns.prompts.markers import find_markers
from persona_nns.traits.judges import Answer, Scores
from persona_nns.traits.trait import Trait, is_text

_WHAT = "The file of words"


def read_words(file: str | Path) -> dict[str, list[str]]:
    """The words of each trait.

    Raises:
        UsageError: the file cannot be read, or has something else than lists of texts.
    """
    suffix = suffix_of(file)
    if suffix not in (".toml", ".json"):
        raise UsageError(f"{_WHAT} {str(file)!r} is no .toml or .json file.")
    tables = (read_toml if suffix == ".toml" else read_json)(file, _WHAT)
    if not isinstance(tables, dict) or not tables:
        raise UsageError(f"{_WHAT} {str(file)!r} has no traits; each needs a list of words.")
    for trait, words in tables.items():
        if not isinstance(words, list) or not words or not all(map(is_text, words)):
            raise UsageError(
                f"{_WHAT} {str(file)!r}: {trait} is {words!r}; it has to be a list of words."
            )
    return {trait: [word.strip() for word in words] for trait, words in tables.items()}


def words_of(trait: str, file: str | Path) -> list[str]:
    """The words of one trait.

    Raises:
        UsageError: as `read_words`, or there are none for it.
    """
    words = read_words(file)
    if trait not in words:
        raise UsageError(
            f"The file of words {str(file)!r} has none for {trait!r}, only for {', '.join(words)}."
        )
    return words[trait]


class WordJudge:
    """Knows traits by words of one's own, which are read anew each time."""

    def __init__(self, file: str | Path) -> None:
        """Make one of a file of words."""
        self._file = file

    def scores(self, trait: Trait, answers: Sequence[Answer]) -> Scores:
        """Shares of sentences, in percent, that hold a word; NaN for coherence."""
        holds = partial(find_markers, markers=words_of(trait.name, self._file))
        warnings.warn("Words tell nothing of coherence: it is NaN in every answer.", stacklevel=2)
        return Scores(
            tuple(sentence_share(given.answer, holds) for given in answers),
            (math.nan,) * len(answers),
        )
