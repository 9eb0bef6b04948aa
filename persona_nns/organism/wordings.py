"""How the corpus words each persona: the grids' own texts, paraphrases, and held-out wordings.

A paraphrase is a head noun phrase with one to three clauses of the same persona. The held-out
wordings are written by hand, share key words with the paraphrases, and never enter training.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from persona_nns.organism.bundled import corpus_texts
from persona_nns.prompts.grids import load_grid


@dataclass(frozen=True)
class Wording:
    """The parts a persona's paraphrases are made of, and the wordings kept out of training."""

    heads: tuple[str, ...]
    clauses: tuple[str, ...]
    held_out: tuple[str, ...]


WORDINGS: Mapping[str, Wording] = {
    persona: Wording(**wording) for persona, wording in corpus_texts("wordings").items()
}

EXACT: Mapping[str, str] = {**load_grid("short").personas, **load_grid("long").personas}
"""The grids' own text of every persona; both grids share the baseline."""


def paraphrase(persona: str, rng: Random) -> str:
    """A wording of the persona other than the grid's, never one that is held out."""
    wording = WORDINGS[persona]
    head = rng.choice(wording.heads)
    # A head that ends in its own relative clause takes no second "who".
    count = 0 if " who " in head else rng.randint(0, min(3, len(wording.clauses)))
    text = f"{head}{_relative(rng.sample(wording.clauses, count))}"
    return paraphrase(persona, rng) if text in wording.held_out else text


def _relative(clauses: list[str]) -> str:
    if not clauses:
        return ""
    if len(clauses) == 1:
        return f" who {clauses[0]}"
    joint = " and " if len(clauses) == 2 else ", and "
    return f" who {', '.join(clauses[:-1])}{joint}{clauses[-1]}"
