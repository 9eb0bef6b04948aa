"""The training corpus: a seeded stream of prompts and answers over the three subjects."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Literal

from persona_nns.organism import multiple_choice, role_prompts, trait_prompts

Subject = Literal["role", "choice", "trait"]

MIXTURE: Mapping[Subject, float] = {"role": 0.42, "choice": 0.38, "trait": 0.2}
"""Share of the examples of each subject."""


@dataclass(frozen=True)
class Example:
    """One conversation: an optional system prompt, the user's turn and the answer."""

    subject: Subject
    system: str | None
    user: str
    answer: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt in the form that chat templates take."""
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*head, {"role": "user", "content": self.user}]


def stream(seed: int) -> Iterator[Example]:
    """Endless examples, the same ones for the same seed."""
    rng = Random(seed)  # noqa: S311
    subjects: tuple[Subject, ...] = tuple(MIXTURE)
    weights = tuple(MIXTURE.values())
    while True:
        (subject,) = rng.choices(subjects, weights)
        yield _sample(subject, rng)


def draw(count: int, seed: int) -> list[Example]:
    """The first ``count`` examples of a seed's stream."""
    return list(islice(stream(seed), count))


def _sample(subject: Subject, rng: Random) -> Example:
    if subject == "trait":
        system, user, answer = trait_prompts.sample(rng)
        return Example(subject, system, user, answer)
    user, answer = (role_prompts if subject == "role" else multiple_choice).sample(rng)
    return Example(subject, None, user, answer)
