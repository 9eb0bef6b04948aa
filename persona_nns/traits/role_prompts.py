"""What roles are asked, or have answered: from a folder of roles, a grid, or a file of answers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

from persona_nns.declarations.options import Count, FileName, NamesFile
from persona_nns.errors import UsageError
from persona_nns.prompts.files import stem_of
from persona_nns.prompts.frames import SYSTEM
from persona_nns.prompts.grids import BASELINE, load_grid
from persona_nns.traits.role_responses import read_role_responses
from persona_nns.traits.roles import Role, load_roles, read_role_questions

#: The role that is the assistant itself.
DEFAULT = "default"
#: What stands for the roles that come with the package.
BUNDLED_ROLES = "bundled"
_FOLDER = Path(__file__).parent / "bundled_roles"


@dataclass(frozen=True)
class RoleQuestion:
    """A question to a role, or an answer of it.

    Attributes:
        id: of the question.
        text: what is asked.
        response: what was said; None where the model is to say it.
        score: how much of the role a judge saw in it; None where none is given.
    """

    id: str
    text: str
    response: str | None = None
    score: float | None = None


@dataclass(frozen=True)
class RolePrompt:
    """All that is asked, or was answered, under a system prompt of a role.

    Attributes:
        role: its name.
        number: which of the role's system prompts.
        system: the system prompt; an empty one is no system message.
        questions: in order.
    """

    role: str
    number: int
    system: str
    questions: tuple[RoleQuestion, ...]


@dataclass(frozen=True)
class RoleOptions:
    """Which roles are asked what.

    Attributes:
        roles: folder with a {role}.json each, default.json the assistant's; or bundled, which
            is what is asked by default.
        questions: questions that every role is asked (.jsonl), in place of the roles' own.
        grid: in place of roles, the personas of a grid, each as "You are {persona}.", are asked
            its tasks; its baseline persona is the default.
        n_instructions: only the first of each role's instructions.
        n_questions: only the first questions.
    """

    roles: Annotated[str, NamesFile((BUNDLED_ROLES,))] | None = None
    questions: FileName | None = None
    grid: FileName | None = None
    n_instructions: Count | None = None
    n_questions: Count | None = None

    def name(self, responses: str | None) -> str:
        """What the inputs are called; ``responses`` is a file of answers, where there is one."""
        if responses is not None:
            return stem_of(responses)
        return load_grid(self.grid).name if self.grid else Path(self.roles or BUNDLED_ROLES).name

    def prompts(self, responses: str | None, model: str, n_samples: int) -> list[RolePrompt]:
        """What is asked, or was answered.

        Args:
            responses: a file of answers, where they are given.
            model: label of the model, for ``{model_name}`` in a role's instructions.
            n_samples: how often each question is asked; no matter where answers are given.

        Raises:
            UsageError: the inputs cannot be used, or none of them is the default role.
        """
        if self.grid is not None and (self.roles or self.questions):
            raise UsageError(
                f"The grid {self.grid!r} has personas and tasks of its own; leave out --roles and "
                "--questions, or --grid."
            )
        if responses is not None:
            self._check_given(responses)
            prompts, source = prompts_of_file(responses), responses
        elif self.grid is not None:
            prompts, source = self._of_grid(self.grid, n_samples), self.grid
        else:
            prompts, source = self._of_roles(model, n_samples), self.roles or BUNDLED_ROLES
        if not any(prompt.role == DEFAULT for prompt in prompts):
            raise UsageError(
                f"{str(source)!r} has no role {DEFAULT!r}, the assistant itself, against which "
                "roles are measured."
            )
        return prompts

    def _check_given(self, responses: str) -> None:
        for option in ("questions", "grid", "n_instructions", "n_questions"):
            if getattr(self, option) is not None:
                raise UsageError(
                    f"The answers in {responses!r} are given; leave out "
                    f"--{option.replace('_', '-')}."
                )

    def _of_grid(self, grid: str, n_samples: int) -> list[RolePrompt]:
        loaded = load_grid(grid)
        questions = self._repeated(loaded.tasks.items(), n_samples)
        personas = sorted(loaded.personas.items(), key=lambda each: each[0] != BASELINE)
        return [
            RolePrompt(
                DEFAULT if key == BASELINE else key, 0, SYSTEM.fill(text, "")[0].content, questions
            )
            for key, text in personas
        ]

    def _of_roles(self, model: str, n_samples: int) -> list[RolePrompt]:
        roles = self.load_roles()
        asked = self._questions_of(roles)
        return [
            RolePrompt(role.name, number, system, self._repeated(asked[role.name], n_samples))
            for role in roles
            for number, system in enumerate(islice(role.systems(model), self.n_instructions))
        ]

    def load_roles(self) -> tuple[Role, ...]:
        """The roles of the folder, the default first."""
        bundled = self.roles in (None, BUNDLED_ROLES)
        roles = load_roles(_FOLDER / "roles" if bundled else str(self.roles))
        return tuple(sorted(roles, key=lambda role: role.name != DEFAULT))

    def _questions_of(self, roles: Sequence[Role]) -> Mapping[str, list[tuple[str, str]]]:
        """By role, the id and text of what it is asked."""
        file = self.questions
        if file is None and self.roles in (None, BUNDLED_ROLES):
            file = str(_FOLDER / "questions.jsonl")
        if file is not None:
            shared = [(str(number), text) for number, text in read_role_questions(file).items()]
            return {role.name: shared for role in roles}
        numbers: dict[str, str] = {}
        for role in roles:
            for text in role.questions:
                numbers.setdefault(text, str(len(numbers)))
        asked = {role.name: [(numbers[text], text) for text in role.questions] for role in roles}
        if not asked.get(DEFAULT, True):  # as in public files
            asked[DEFAULT] = [(number, text) for text, number in numbers.items()]
        if silent := [name for name, of_role in asked.items() if not of_role]:
            raise UsageError(
                f"The role {silent[0]!r} of {self.roles!r} has no questions; give some to all "
                "roles (--questions F.jsonl)."
            )
        return asked

    def _repeated(
        self, questions: Iterable[tuple[str, str]], n_samples: int
    ) -> tuple[RoleQuestion, ...]:
        """The first questions, each as often as it is asked."""
        chosen = islice(questions, self.n_questions)
        return tuple(RoleQuestion(*each) for each in chosen for _ in range(n_samples))


def prompts_of_file(file: str) -> list[RolePrompt]:
    """The answers of a file by role and system prompt, in the order in which these come.

    Raises:
        UsageError: it cannot be read, or a row lacks something.
    """
    grouped: dict[str, dict[str, list[RoleQuestion]]] = {}
    for row in read_role_responses(file):
        given = RoleQuestion(row.question_id, row.question, row.response, row.score)
        grouped.setdefault(row.role, {}).setdefault(row.system, []).append(given)
    return [
        RolePrompt(role, number, system, tuple(questions))
        for role, systems in grouped.items()
        for number, (system, questions) in enumerate(systems.items())
    ]
