"""Questions asked as "a {identity} student": rendered, with the identity's tokens, and aligned.

Two prompts of one question differ in the identity alone. What their runs hold at the same place
can be exchanged once it is said which token stands where: `align`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from persona_nns.errors import PersonaError, UsageError
from persona_nns.prompts.files import lines_of, read_text
from persona_nns.prompts.grids import role_prompt
from persona_nns.prompts.questions import LETTERS, Question
from persona_nns.prompts.render import Prompt, render, tokens_between
from persona_nns.prompts.templates import find_shown

PERSONA = "a {identity} student"
#: What a question without a persona is called beside identities.
BARE = "bare"
_SLOT = "{identity}"


@dataclass(frozen=True)
class AskedQuestion:
    """A question as one persona is asked it.

    Attributes:
        ids: token ids of the prompt.
        identity: the tokens whose first non-space character lies in the identity.
        letters: token ids of A, B, C and D as they would follow the prompt.
        answer: index of the right letter.
    """

    ids: tuple[int, ...]
    identity: range
    letters: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class Pair:
    """Two personas asked the same questions; `corrupt` is the run that is patched.

    Attributes:
        clean: identity of the run that activations are taken from.
        corrupt: identity of the run that they are put into.
        asked_clean: every question, as the clean persona is asked it.
        asked_corrupt: every question, as the corrupt persona is asked it.
        asked_control: every question, with the control word in the identity's slot.
    """

    clean: str
    corrupt: str
    asked_clean: tuple[AskedQuestion, ...]
    asked_corrupt: tuple[AskedQuestion, ...]
    asked_control: tuple[AskedQuestion, ...]

    @property
    def label(self) -> str:
        """The pair in messages."""
        return f"{self.clean} into {self.corrupt}"

    @property
    def is_diagonal(self) -> bool:
        """Whether it is a persona with itself, which also measures the persona."""
        return self.clean == self.corrupt

    @property
    def rows(self) -> tuple[AskedQuestion, ...]:
        """Every prompt that is run, clean ones, corrupt ones and, on the diagonal, controls."""
        control = self.asked_control if self.is_diagonal else ()
        return (*self.asked_clean, *self.asked_corrupt, *control)

    def only(self, questions: Sequence[int]) -> "Pair":
        """The same personas, asked some of the questions."""
        asked = (self.asked_clean, self.asked_corrupt, self.asked_control)
        return Pair(self.clean, self.corrupt, *(tuple(of[k] for k in questions) for of in asked))

    @property
    def place(self) -> dict[str, str]:
        """Where it stands in the result."""
        pair = {"clean_persona": self.clean, "corrupt_persona": self.corrupt}
        return {**pair, "persona": self.clean} if self.is_diagonal else pair


def load_identities(source: str | Path | None) -> tuple[str, ...]:
    """The identities of a file, one a line. None is the bundled list.

    A ``#`` at the beginning of a line or after a space begins a comment.

    Raises:
        UsageError: the file cannot be read, holds fewer than two, or one twice.
    """
    if source is None:
        file = resources.files("persona_nns.prompts") / "texts" / "identities.txt"
        return _parse_identities(file.read_text(encoding="utf-8"), "identities.txt")
    path = Path(source).expanduser()
    if path.exists() and not path.is_file():
        raise UsageError(
            f"The identities {str(source)!r} are no file: a pipe can be read only once, and "
            "resuming reads them again; write them to a file."
        )
    return _parse_identities(read_text(path, "The file of identities"), str(source))


def _parse_identities(text: str, source: str) -> tuple[str, ...]:
    # A # inside a word (C#) belongs to it.
    lines = [re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip() for line in lines_of(text)]
    identities = tuple(line for line in lines if line)
    if len(identities) < 2:
        raise UsageError(f"{source!r} names fewer than two identities; a pair needs two.")
    for identity in identities:
        if identities.count(identity) > 1:
            raise UsageError(f"{source!r} names {identity!r} twice; name each identity once.")
    return identities


def check_persona(persona: str) -> None:
    """See that a persona's template has one slot for the identity.

    Raises:
        UsageError: it has none, or several.
    """
    if persona.count(_SLOT) != 1:
        raise UsageError(
            f"The persona {persona!r} needs exactly one slot {_SLOT!r}, as in {PERSONA!r}."
        )


def ask(
    tokenizer: PreTrainedTokenizerBase, persona: str, identity: str, question: Question
) -> AskedQuestion:
    """Render a question for a persona, ``As a {identity} student, answer …``.

    Raises:
        UsageError: no chat template, or the identity has no token of its own.
        PersonaError: the template changes the text, or a letter is not one token.
    """
    before, _, _ = persona.partition(_SLOT)
    filled = persona.replace(_SLOT, identity)
    prompt = render(tokenizer, filled, question.task)
    start = find_shown(role_prompt(filled, question.task), prompt.text)[0] + len(f"As {before}")
    tokens = tokens_between(tokenizer, prompt.text, start, start + len(identity))
    if not tokens:
        raise UsageError(
            f"The identity {identity!r} has no token of its own in {filled!r}; use another."
        )
    letters = _letters(tokenizer, prompt)
    return AskedQuestion(ids=prompt.ids, identity=tokens, letters=letters, answer=question.answer)


def ask_alone(tokenizer: PreTrainedTokenizerBase, question: Question) -> AskedQuestion:
    """Render a question without a persona, the task alone; no token is an identity's.

    Raises:
        UsageError: no chat template.
        PersonaError: the template changes the text, or a letter is not one token.
    """
    prompt = render(tokenizer, None, question.task)
    letters = _letters(tokenizer, prompt)
    return AskedQuestion(prompt.ids, identity=range(0), letters=letters, answer=question.answer)


def _letters(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[int, ...]:
    return tuple(_letter(tokenizer, prompt.text, prompt.ids, letter) for letter in LETTERS)


def _letter(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: tuple[int, ...], letter: str
) -> int:
    """The single token that a letter adds when it is appended to a prompt.

    Raises:
        PersonaError: it adds several, or changes those before.
    """
    longer = tuple(tokenizer(text + letter, add_special_tokens=False)["input_ids"])
    if len(longer) != len(ids) + 1 or longer[:-1] != ids:
        raise PersonaError(
            f"The letter {letter!r} after the prompt is not a single token of this tokenizer "
            f"(it turns {len(ids)} tokens into {len(longer)}), so its logit is not defined; use "
            "another chat template (--template FILE)."
        )
    return longer[-1]


def align(clean: AskedQuestion, corrupt: AskedQuestion) -> list[int]:
    """For every token of the corrupt prompt, the token of the clean one in the same place.

    Before the identity tokens are aligned from the start, after it from the end, inside it last
    to last. A token of the corrupt prompt that the clean one has no partner for gets −1.
    """
    own, other = corrupt.identity, clean.identity
    before = min(own.start, other.start)
    inside = min(len(own), len(other))
    n_after, last = len(corrupt.ids) - own.stop, len(clean.ids)
    after = min(n_after, last - other.stop)
    return [
        *[*range(before), *[-1] * (own.start - before)],
        *[*[-1] * (len(own) - inside), *range(other.stop - inside, other.stop)],
        *[*[-1] * (n_after - after), *range(last - after, last)],
    ]


def shared_prefix(rows: Sequence[AskedQuestion]) -> int:
    """The number of first tokens that all prompts share and that come before every identity."""
    longest = min(row.identity.start for row in rows)
    first = rows[0].ids
    return next((k for k in range(longest) if any(row.ids[k] != first[k] for row in rows)), longest)
