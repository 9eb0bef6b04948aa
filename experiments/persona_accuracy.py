"""Does a persona change how well a model answers? Accuracy on multiple-choice questions.

Every question is asked without a persona, as a neutral one ("a average student") and as personas
that differ from that in the identity alone ("a bad student", "a red student"). The answer is the
letter with the highest logit at the last prompt token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from nnsight import TransformersModel, save
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_nns.declarations import NamesFile, Plan, Variable, content_digest
from persona_nns.errors import UsageError
from persona_nns.prompts import (
    BARE,
    BUNDLED,
    LETTERS,
    MMLU_DEV,
    PERSONA,
    AskedQuestion,
    ask,
    ask_alone,
    check_persona,
    load_identities,
    load_questions,
    name_questions,
)
from persona_nns.tracing import left_pad, logit_difference, similar_rows

protocol_version = 1

variables = {
    "correct": Variable(
        "question persona",
        "right answer",
        description="Whether the right letter has the highest logit of the four; bare is the "
        "question without a persona.",
        kind="bool",
    ),
    "ld": Variable(
        "question persona",
        "logit difference",
        units="logit",
        description="Logit of the right letter minus the mean of the three others.",
    ),
    "logits": Variable(
        "question persona letter",
        "logit",
        units="logit",
        description="Logit of each letter at the last prompt token.",
        coords={"letter": LETTERS},
    ),
}


@dataclass(frozen=True)
class Asked:
    """A question as it is asked of every persona.

    Attributes:
        question: its number.
        rows: one for each persona.
    """

    question: int
    rows: tuple[AskedQuestion, ...]

    @property
    def label(self) -> str:
        """The question in messages."""
        return f"question {self.question}"

    @property
    def place(self) -> Mapping[str, int]:
        """Where it stands in the result."""
        return {"question": self.question}


def plan(
    tokenizer: PreTrainedTokenizerBase,
    *,
    questions: Annotated[str, NamesFile((BUNDLED, MMLU_DEV, "mmlu"))] = BUNDLED,
    n_questions: Annotated[int, Field(ge=1)] | None = None,
    identities: Annotated[str, NamesFile(("none",))] | None = None,
    persona: str = PERSONA,
    control: str = "average",
) -> Plan:
    """Ask every question without a persona, as the control, and as every other persona.

    Args:
        tokenizer: the model's.
        questions: bundled, mmlu-dev, mmlu, mmlu:subject, or a .jsonl, .csv or .parquet file.
        n_questions: only the first so many; by default all.
        identities: a file with one identity a line, or none; by default competence words and
            colours.
        persona: the persona, with {identity} where the identity goes.
        control: the word in the identity's place that makes the neutral persona.
    """
    check_persona(persona)
    names = () if identities == "none" else load_identities(identities)
    if BARE in (control, *names):
        raise UsageError(f"An identity cannot be called {BARE!r}: that is without a persona.")
    chosen = load_questions(questions)[:n_questions]
    words = list(dict.fromkeys((control, *names)))
    units = [
        Asked(k, (ask_alone(tokenizer, of), *(ask(tokenizer, persona, word, of) for word in words)))
        for k, of in enumerate(chosen)
    ]
    content = {
        "persona": persona,
        "personas": [BARE, *words],
        "questions": [[q.question, list(q.choices), q.answer] for q in chosen],
    }
    return Plan(
        name=name_questions(questions),
        units=units,
        axes={"question": range(len(chosen)), "persona": [BARE, *words]},
        unit_axes=("question",),
        content=content,
        token_ids={
            str(unit.question): {
                name: list(row.ids) for name, row in zip([BARE, *words], unit.rows, strict=True)
            }
            for unit in units
        },
        digest=content_digest(content),
        coords={
            "subject": ("question", [q.subject for q in chosen]),
            "answer": ("question", [q.answer for q in chosen]),
        },
        attrs={"inputs": {"questions": questions, "identities": identities, **content}},
        batch_size=8,
    )


def measure(model: TransformersModel, units: list[Asked]) -> dict[str, Any]:
    """Read the letters' logits.

    Args:
        model: from `load_model`.
        units: questions; the leading axis of every result.
    """
    rows = [row for unit in units for row in unit.rows]
    logits = torch.empty(len(rows), len(LETTERS))
    for batch in similar_rows([len(row.ids) for row in rows]):
        logits[batch] = read_letters(model, [rows[k] for k in batch])
    logits = logits.view(len(units), -1, len(LETTERS))
    answer = torch.tensor([unit.rows[0].answer for unit in units])
    return {
        "correct": logits.argmax(-1) == answer[:, None],
        "ld": logit_difference(logits, answer),
        "logits": logits,
    }


def read_letters(model: TransformersModel, rows: list[AskedQuestion]) -> Tensor:
    """Logits of the letters at the last prompt token, [row, letter]."""
    batch = left_pad([row.ids for row in rows], device=model.device)
    letters = torch.tensor([row.letters for row in rows], device=model.device)
    with model.trace(
        batch.tokens, position_ids=batch.position_ids, use_cache=False, logits_to_keep=1
    ):
        said = save(model.output.logits[:, -1].gather(1, letters).float())
    return said.cpu()
