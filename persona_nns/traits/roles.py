"""Roles as public files have them: one JSON file a role, and a list of questions for all of them.

A file holds ``{"instruction": [{"pos": …}, …], "questions": […], "eval_prompt": …}``, any number of
each; ``questions`` and ``eval_prompt`` may be absent. An instruction is a whole system prompt, and
an empty one is no system message. ``default.json`` is the assistant itself ("The Assistant Axis",
arXiv 2601.10387).
"""

from dataclasses import dataclass
from pathlib import Path

from persona_nns.errors import UsageError
from persona_nns.prompts.files import read_json, read_jsonl
from persona_nns.traits.trait import MODEL_NAME, eval_prompt_of, is_text, listed, questions_of

_WHAT = "The role file"
_QUESTIONS = "The question file"


@dataclass(frozen=True)
class Role:
    """A role that a model is asked to play.

    Attributes:
        name: its file's stem.
        instructions: system prompts as they are written, ``{model_name}`` not yet replaced.
        questions: its own; none where the file has none.
        eval_prompt: what a judge is told, ``{question}`` and ``{answer}`` in it; None without.
    """

    name: str
    instructions: tuple[str, ...]
    questions: tuple[str, ...]
    eval_prompt: str | None

    def systems(self, label: str) -> tuple[str, ...]:
        """The system prompts for a model of this label; an empty one is no system message."""
        return tuple(text.replace(MODEL_NAME, label) for text in self.instructions)


def read_role(file: str | Path) -> Role:
    """Read and check one ``{role}.json``.

    Raises:
        UsageError: it cannot be read, or is not in the format.
    """
    path = Path(file)
    data = read_json(path, _WHAT)
    if not isinstance(data, dict) or "instruction" not in data:
        raise UsageError(
            f"The role file {str(path)!r} lacks instruction; it needs a list of instructions with "
            "the text 'pos', and may have questions and eval_prompt."
        )
    instructions = listed(path, _WHAT, "instruction", data)
    for each in instructions:
        if not isinstance(each, dict) or not isinstance(each.get("pos"), str):
            raise UsageError(
                f"An instruction of {str(path)!r} is {each!r}; each needs the text 'pos'."
            )
    return Role(
        name=path.stem,
        instructions=tuple(each["pos"] for each in instructions),
        questions=questions_of(path, _WHAT, data) if "questions" in data else (),
        eval_prompt=eval_prompt_of(path, data) if "eval_prompt" in data else None,
    )


def load_roles(folder: str | Path) -> tuple[Role, ...]:
    """The roles of a folder with a ``{role}.json`` each, sorted by name.

    Raises:
        UsageError: there is none, or a file is not in the format.
    """
    files = sorted(Path(folder).expanduser().glob("*.json"))
    if not files:
        raise UsageError(f"The folder {str(folder)!r} holds no role, that is, no {{role}}.json.")
    return tuple(map(read_role, files))


def read_role_questions(file: str | Path) -> dict[int, str]:
    """Questions that every role is asked, by their id: a ``{"question", "id"}`` a line.

    Raises:
        UsageError: the file cannot be read, a line is none, or an id is there twice.
    """
    questions: dict[int, str] = {}
    for row in read_jsonl(file, _QUESTIONS):
        place, number = f"Line {row.number} of {str(file)!r}", row.values.get("id")
        if not is_text(row.values.get("question")):
            raise UsageError(f"{place} lacks the text 'question'.")
        if not isinstance(number, int) or isinstance(number, bool):
            raise UsageError(f"{place}: id is {number!r}; it has to be a whole number.")
        if number in questions:
            raise UsageError(f"{place}: the id {number} stands for {questions[number]!r} already.")
        questions[number] = row.values["question"]
    if not questions:
        raise UsageError(f"There are no questions in {str(file)!r}.")
    return questions
