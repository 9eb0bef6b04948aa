"""Traits as public files have them: one JSON file a trait, or one a trait and split.

A file holds ``{"instruction": [{"pos": …, "neg": …}, …], "questions": […], "eval_prompt": …}``, any
number of each. The extraction split is what vectors (and training) are made from, the evaluation
split is held out. A folder of traits has them as ``extraction/{trait}.json`` and
``evaluation/{trait}.json`` (the persona-vectors code), or as ``{trait}.json`` with one list of
questions (the assistant-axis code), which a seed divides into halves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from persona_nns.declarations.options import FileName
from persona_nns.declarations.plans import content_digest
from persona_nns.errors import UsageError
from persona_nns.organism.bundled import ARTIFACTS
from persona_nns.prompts.files import read_json

Split = Literal["extraction", "evaluation"]
Label = Literal["pos", "neg"]
SPLITS: tuple[Split, Split] = ("extraction", "evaluation")
LABELS: tuple[Label, Label] = ("pos", "neg")

#: Degrees of a trait that a system prompt asks for, from none to much.
DEGREES = ("not at all", "slightly", "fairly", "very")

#: Stands for the model's label in an instruction.
MODEL_NAME = "{model_name}"


@dataclass(frozen=True)
class Trait:
    """One split of a trait.

    Attributes:
        name: the trait, as an adjective.
        pairs: instructions that ask for the trait and that restrain it, (pos, neg).
        questions: what is asked.
        eval_prompt: what a judge is told; ``{question}`` and ``{answer}`` stand in it.
    """

    name: str
    pairs: tuple[tuple[str, str], ...]
    questions: tuple[str, ...]
    eval_prompt: str

    def system(self, pair: int, label: Label) -> str:
        """The system prompt: ``You are a {trait|helpful} assistant. {instruction}``."""
        name = self.name if label == "pos" else "helpful"
        return f"You are a {name} assistant. {self.pairs[pair][LABELS.index(label)]}"

    def of_model(self, label: str) -> "Trait":
        """The same with a model's label in place of ``{model_name}`` in the instructions."""
        pairs = [
            (pos.replace(MODEL_NAME, label), neg.replace(MODEL_NAME, label))
            for pos, neg in self.pairs
        ]
        return replace(self, pairs=tuple(pairs))

    def graded_system(self, degree: str) -> str:
        """A system prompt that asks for a degree of the trait."""
        return f"You are a {degree} {self.name} assistant."


@dataclass(frozen=True)
class TraitOptions:
    """Which trait.

    Attributes:
        trait: a bundled trait, or one of the folder `artifacts`.
        artifacts: folder with extraction/{trait}.json and evaluation/{trait}.json, or {trait}.json.
        split_seed: seed that divides the one list of questions of a {trait}.json into halves.
    """

    trait: str = "cheerful"
    artifacts: FileName | None = None
    split_seed: int | None = None

    def load(self, split: Split) -> Trait:
        """The trait's questions, instructions and judge's prompt."""
        return load_traits(self.trait, split, self.artifacts, self.split_seed)[0]


@dataclass(frozen=True, eq=False)
class TraitUnit:
    """What an experiment measures of a trait at a time; its label says where it stands."""

    trait: str

    @property
    def place(self) -> dict[str, Any]:
        """Where it stands in the result."""
        return {"trait": self.trait}

    @property
    def label(self) -> str:
        """What it is called in messages."""
        return "/".join(map(str, self.place.values()))


def bundled_traits() -> tuple[str, ...]:
    """Names of the traits that the bundled models were trained on."""
    return tuple(sorted(file.stem for file in (ARTIFACTS / "extraction").glob("*.json")))


def parse_names(names: str) -> list[str]:
    """The names in a list such as ``cheerful,terse``.

    Raises:
        UsageError: no name, or one given twice.
    """
    parsed = [name.strip() for name in names.split(",") if name.strip()]
    if not parsed:
        raise UsageError(f"No trait was asked for; use names such as {bundled_traits()[0]}.")
    for name in parsed:
        if parsed.count(name) > 1:
            raise UsageError(f"The trait {name!r} is given twice; name each one once.")
    return parsed


def load_traits(
    names: str, split: Split, folder: str | Path | None = None, seed: int | None = None
) -> list[Trait]:
    """The traits of a list such as ``cheerful,terse``.

    Args:
        names: bundled traits, or those of ``folder``.
        split: ``extraction`` or ``evaluation``.
        folder: holds ``extraction/{trait}.json`` and ``evaluation/{trait}.json``, or
            ``{trait}.json`` with one list of questions.
        seed: divides that list into halves; see `half_of`.

    Raises:
        UsageError: no such trait, or a file that is not in the format; or a seed for questions that
            are divided already, or none for those that are not.
    """
    root = ARTIFACTS if folder is None else Path(folder).expanduser()
    return [_load(name, split, root, seed) for name in parse_names(names)]


def _load(name: str, split: Split, root: Path, seed: int | None) -> Trait:
    whole = root / f"{name}.json"
    if _is_divided(name, root):
        if seed is not None:
            raise UsageError(
                f"The trait {name!r} has its extraction and evaluation questions in two folders of "
                f"{str(root)!r}; leave out --split-seed."
            )
    elif whole.is_file():
        return _load_half(whole, split, seed)
    file = root / split / f"{name}.json"
    if not file.is_file():
        raise UsageError(
            f"There is no trait {name!r}: {str(file)!r} does not exist. Bundled are "
            f"{', '.join(bundled_traits())}; give the folder of other ones (--artifacts FOLDER)."
        )
    return read_trait(file)


def _is_divided(name: str, root: Path) -> bool:
    """Whether a trait has a file for a split of its own."""
    return any((root / split / f"{name}.json").is_file() for split in SPLITS)


def _load_half(file: Path, split: Split, seed: int | None) -> Trait:
    trait = read_trait(file)
    if seed is None:
        raise UsageError(
            f"The trait file {str(file)!r} has one list of questions; divide it into halves, one "
            "for extraction and one held out for evaluation (--split-seed SEED)."
        )
    if len(set(trait.questions)) < 2:
        raise UsageError(
            f"The trait file {str(file)!r} has one question alone, which cannot be divided into "
            "extraction and evaluation; give it more."
        )
    return replace(trait, questions=half_of(trait.questions, split, seed))


def half_of(questions: Sequence[str], split: Split, seed: int) -> tuple[str, ...]:
    """The half of a list of questions that is for a split, in the order of the list.

    Questions are ordered by SHA-256 of seed and text; the first half (the larger one of an odd
    number) is for extraction. So the halves depend on nothing but the texts and the seed, and a
    question that is there twice is in one of them.
    """
    order = sorted(set(questions), key=lambda question: content_digest([seed, question]))
    extraction = set(order[: (len(order) + 1) // 2])
    return tuple(each for each in questions if (each in extraction) == (split == "extraction"))


def read_trait(file: str | Path) -> Trait:
    """Read and check one ``{trait}.json``.

    Raises:
        UsageError: it cannot be read, or is not in the format.
    """
    path = Path(file)
    data = read_json(path, "The trait file")
    keys = ("instruction", "questions", "eval_prompt")
    missing = [key for key in keys if not isinstance(data, dict) or key not in data]
    if missing:
        raise UsageError(
            f"The trait file {str(path)!r} lacks {', '.join(missing)}; it needs {', '.join(keys)}."
        )
    pairs = listed(path, "The trait file", "instruction", data)
    for pair in pairs:
        if not isinstance(pair, dict) or not all(is_text(pair.get(label)) for label in LABELS):
            raise UsageError(
                f"An instruction of {str(path)!r} is {pair!r}; each needs the texts 'pos' and "
                "'neg' (a role, not a trait, has 'pos' alone)."
            )
    return Trait(
        name=path.stem,
        pairs=tuple((pair["pos"], pair["neg"]) for pair in pairs),
        questions=questions_of(path, "The trait file", data),
        eval_prompt=eval_prompt_of(path, data),
    )


def listed(path: Path, what: str, key: str, data: Mapping[str, Any]) -> list[Any]:
    """A list in a trait's or role's file.

    Raises:
        UsageError: it is none, or empty.
    """
    values = data[key]
    if not isinstance(values, list) or not values:
        found = "an empty list" if values == [] else repr(values)
        raise UsageError(f"{what} {str(path)!r}: {key} is {found}; it has to be a list.")
    return values


def questions_of(path: Path, what: str, data: Mapping[str, Any]) -> tuple[str, ...]:
    """The questions in a trait's or role's file.

    Raises:
        UsageError: they are no texts.
    """
    questions = listed(path, what, "questions", data)
    if not all(map(is_text, questions)):
        raise UsageError(f"The questions of {str(path)!r} have to be texts that are not empty.")
    return tuple(questions)


def eval_prompt_of(path: Path, data: Mapping[str, Any]) -> str:
    """What a judge is told, in a trait's or role's file.

    Raises:
        UsageError: it does not show a judge the question and the answer.
    """
    prompt = data["eval_prompt"]
    if not is_text(prompt) or "{question}" not in prompt or "{answer}" not in prompt:
        raise UsageError(
            f"The eval_prompt of {str(path)!r} has to be a text with {{question}} and {{answer}} "
            "in it."
        )
    return prompt


def is_text(value: Any) -> bool:
    """Whether a value is a text that says something."""
    return isinstance(value, str) and bool(value.strip())


def check_held_out(extraction: Sequence[Trait], evaluation: Sequence[Trait]) -> None:
    """See that no evaluation question is one that vectors or students are made from.

    Raises:
        UsageError: a question stands in both splits of a trait.
    """
    for seen, held_out in zip(extraction, evaluation, strict=True):
        if shared := sorted(set(seen.questions) & set(held_out.questions)):
            raise UsageError(
                f"The trait {seen.name!r} asks {shared[0]!r} in both splits; evaluation questions "
                "have to be held out."
            )


def extraction_questions(
    name: str, folder: str | Path | None = None, seed: int | None = None
) -> tuple[str, ...]:
    """What a trait's vectors are made from by default; none where the folder has no such split.

    Raises:
        UsageError: as `load_traits`.
    """
    root = ARTIFACTS if folder is None else Path(folder).expanduser()
    if _is_divided(name, root) and not (root / "extraction" / f"{name}.json").is_file():
        return ()
    return _load(name, "extraction", root, seed).questions
