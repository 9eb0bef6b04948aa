"""The questions that traits are asked with.

Every question is a frame about a topic. Each trait has 20 extraction and 20 evaluation questions,
no question twice; the evaluation questions of all traits are held out of training.
"""

from collections.abc import Mapping
from itertools import product
from typing import Literal, get_args

from persona_nns.organism.bundled import corpus_texts, load_artifact
from persona_nns.organism.traits import TRAITS

Split = Literal["extraction", "evaluation"]

_TEXTS = corpus_texts("trait_questions")
TOPICS, FRAMES = _TEXTS["topics"], _TEXTS["frames"]

QUESTIONS: Mapping[tuple[str, Split], tuple[str, ...]] = {
    (trait, split): tuple(load_artifact(trait, split)["questions"])
    for trait, split in product(TRAITS, get_args(Split))
}
HELD_OUT = frozenset(question for trait in TRAITS for question in QUESTIONS[trait, "evaluation"])
"""The evaluation questions of all traits; training never shows any of them."""
