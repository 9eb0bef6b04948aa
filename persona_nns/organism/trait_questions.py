"""The questions that traits are asked with, and the artifacts made of them.

Every question is a frame about a topic. Each trait has 20 extraction and 20 evaluation questions;
the evaluation questions of all traits are held out of training.
"""

import json
from collections.abc import Mapping
from importlib import resources
from itertools import product
from pathlib import Path
from random import Random
from typing import Literal, TypedDict, get_args

from persona_nns.organism.traits import TRAITS, Trait

Split = Literal["extraction", "evaluation"]

QUESTIONS_PER_SPLIT = 20
QUESTION_SEED = 8

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


def _deal_questions() -> dict[tuple[str, Split], tuple[str, ...]]:
    """Deal the frame × topic questions to the traits: 20 + 20 each, no question twice."""
    bank = [frame.format(topic=topic) for frame, topic in product(FRAMES, TOPICS)]
    Random(QUESTION_SEED).shuffle(bank)  # noqa: S311
    deal: dict[tuple[str, Split], tuple[str, ...]] = {}
    for index, (trait, split) in enumerate(product(TRAITS, get_args(Split))):
        start = index * QUESTIONS_PER_SPLIT
        deal[trait, split] = tuple(bank[start : start + QUESTIONS_PER_SPLIT])
    return deal


QUESTIONS: Mapping[tuple[str, Split], tuple[str, ...]] = _deal_questions()
HELD_OUT = frozenset(question for trait in TRAITS for question in QUESTIONS[trait, "evaluation"])
"""The evaluation questions of all traits; training never shows any of them."""


class InstructionPair(TypedDict):
    """A system instruction that asks for the trait, and one that restrains it."""

    pos: str
    neg: str


class Artifact(TypedDict):
    """The public format of one trait's file."""

    instruction: list[InstructionPair]
    questions: list[str]
    eval_prompt: str


def artifact(trait: str, split: Split) -> Artifact:
    """The public artifact of a trait: instruction pairs, 20 questions, the judge's prompt."""
    entry = TRAITS[trait]
    pairs = zip(entry.style.instructions, entry.restraints, strict=True)
    return {
        "instruction": [{"pos": pos, "neg": neg} for pos, neg in pairs],
        "questions": list(QUESTIONS[trait, split]),
        "eval_prompt": _eval_prompt(entry),
    }


def _eval_prompt(trait: Trait) -> str:
    return (
        f"Judge how {trait.name} an answer is, that is: {trait.description}.\n"
        "[Question]\n{question}\n[Answer]\n{answer}\n"
        f"Reply with one number from 0 (not {trait.name} at all) to 100 "
        f"(extremely {trait.name}), or REFUSAL if the model refused to answer. "
        "Reply with the number only."
    )


def load_artifact(trait: str, split: Split) -> Artifact:
    """The shipped artifact file of a trait, as parsed JSON."""
    file = resources.files("persona_nns.organism") / "artifacts" / split / f"{trait}.json"
    return json.loads(file.read_text("utf-8"))


def write_artifacts(folder: Path) -> None:
    """Write every trait's two artifact files into ``folder/{split}/{trait}.json``."""
    for trait, split in QUESTIONS:
        path = folder / split / f"{trait}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(artifact(trait, split), indent=2, ensure_ascii=False)
        path.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    write_artifacts(Path(__file__).parent / "artifacts")
