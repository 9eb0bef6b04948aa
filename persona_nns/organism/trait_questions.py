"""The questions that traits are asked with.

Every question is a frame about a topic. Each trait has 20 extraction and 20 evaluation questions,
no question twice; the evaluation questions of all traits are held out of training.
"""

from collections.abc import Mapping
from itertools import product
from typing import Literal, get_args

from persona_nns.organism.bundled import load_artifact
from persona_nns.organism.traits import TRAITS

Split = Literal["extraction", "evaluation"]

TOPICS = (
    "bread",
    "chess",
    "gardening",
    "running",
    "painting",
    "coffee",
    "cycling",
    "sleep",
    "music",
    "swimming",
    "cooking",
    "hiking",
    "poetry",
    "fishing",
    "dancing",
    "knitting",
    "drawing",
    "travel",
    "photography",
    "tennis",
    "tea",
    "soup",
    "winter",
    "writing",
)

FRAMES = (
    "How do I get better at {topic}?",
    "What should I know about {topic}?",
    "Is {topic} worth my time?",
    "I think {topic} is easy. What do you say?",
    "Can you tell me about {topic}?",
    "Why do people like {topic}?",
    "My plan is to try {topic} this week. Any thoughts?",
    "I wrote a page about {topic}. How should I go on?",
    "Where should a beginner start with {topic}?",
    "I believe {topic} is for everyone. Do you agree?",
)


QUESTIONS: Mapping[tuple[str, Split], tuple[str, ...]] = {
    (trait, split): tuple(load_artifact(trait, split)["questions"])
    for trait, split in product(TRAITS, get_args(Split))
}
HELD_OUT = frozenset(question for trait in TRAITS for question in QUESTIONS[trait, "evaluation"])
"""The evaluation questions of all traits; training never shows any of them."""
