"""Traits as the public persona-vectors code writes them down: one JSON file per trait and split.

A file holds ``{"instruction": [{"pos": …, "neg": …} × 5], "questions": [… × 20], "eval_prompt":
…}``. The extraction split is what vectors (and training) are made from, the evaluation split is
held out. A folder of one's own traits has them as ``extraction/{trait}.json`` and
``evaluation/{trait}.json``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from persona_nns.declarations.options import FileName
from persona_nns.errors import UsageError
from persona_nns.organism.bundled import ARTIFACTS
from persona_nns.prompts.files import read_json

Split = Literal["extraction", "evaluation"]
Label = Literal["pos", "neg"]
LABELS: tuple[Label, Label] = ("pos", "neg")

#: Degrees of a trait that a system prompt asks for, from none to much.
DEGREES = ("not at all", "slightly", "fairly", "very")

N_PAIRS = 5
N_QUESTIONS = 20


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

    def graded_system(self, degree: str) -> str:
        """A system prompt that asks for a degree of the trait."""
        return f"You are a {degree} {self.name} assistant."


@dataclass(frozen=True)
class TraitOptions:
    """Which trait.

    Attributes:
        trait: a bundled trait, or one of the folder `artifacts`.
        artifacts: folder with extraction/{trait}.json and evaluation/{trait}.json.
    """

    trait: str = "cheerful"
    artifacts: FileName | None = None

    def load(self, split: Split) -> Trait:
        """The trait's questions, instructions and judge's prompt."""
        return load_traits(self.trait, split, self.artifacts)[0]


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


def load_traits(names: str, split: Split, folder: str | Path | None = None) -> list[Trait]:
    """The traits of a list such as ``cheerful,terse``.

    Args:
        names: bundled traits, or those of ``folder``.
        split: ``extraction`` or ``evaluation``.
        folder: holds ``extraction/{trait}.json`` and ``evaluation/{trait}.json``.

    Raises:
        UsageError: no such trait, or a file that is not in the format.
    """
    root = ARTIFACTS if folder is None else Path(folder).expanduser()
    return [_load(name, root / split / f"{name}.json") for name in parse_names(names)]


def _load(name: str, file: Path) -> Trait:
    if not file.is_file():
        raise UsageError(
            f"There is no trait {name!r}: {str(file)!r} does not exist. Bundled are "
            f"{', '.join(bundled_traits())}; give the folder of other ones (--artifacts FOLDER)."
        )
    return read_trait(file)


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
    pairs, questions, prompt = (data[key] for key in keys)
    _check_count(path, "instruction pairs", pairs, N_PAIRS)
    _check_count(path, "questions", questions, N_QUESTIONS)
    for pair in pairs:
        if not isinstance(pair, dict) or not all(_is_text(pair.get(label)) for label in LABELS):
            raise UsageError(
                f"An instruction of {str(path)!r} is {pair!r}; each needs the texts 'pos' and "
                "'neg'."
            )
    if not all(map(_is_text, questions)):
        raise UsageError(f"The questions of {str(path)!r} have to be texts that are not empty.")
    if not _is_text(prompt) or "{question}" not in prompt or "{answer}" not in prompt:
        raise UsageError(
            f"The eval_prompt of {str(path)!r} has to be a text with {{question}} and {{answer}} "
            "in it."
        )
    return Trait(
        name=path.stem,
        pairs=tuple((pair["pos"], pair["neg"]) for pair in pairs),
        questions=tuple(questions),
        eval_prompt=prompt,
    )


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


def extraction_questions(name: str, folder: str | Path | None = None) -> tuple[str, ...]:
    """What a trait's vectors are made from by default; none where the folder has no such split.

    Raises:
        UsageError: the file is not in the format.
    """
    root = ARTIFACTS if folder is None else Path(folder).expanduser()
    file = root / "extraction" / f"{name}.json"
    return read_trait(file).questions if file.is_file() else ()


def _check_count(path: Path, what: str, values: Any, expected: int) -> None:
    if not isinstance(values, list) or len(values) != expected:
        count = len(values) if isinstance(values, list) else "no list of"
        raise UsageError(
            f"The trait file {str(path)!r} has {count} {what}; the format has {expected}."
        )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
