"""What does the model say when asked for a trait, and when asked to restrain it?

Each question of a trait is asked under every pair of contrastive system prompts: one instruction
that asks for the trait, one that restrains it. The answers are judged for the trait and for
coherence. Vectors are made from the pairs that show the contrast (`trait_vectors`).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from nnsight import TransformersModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_nns.declarations import Count, Plan, Variable, content_digest
from persona_nns.figures import score_bars
from persona_nns.prompts import render_chat, takes_system_role
from persona_nns.tracing import Sampling, SeededPrompt, row_seed, sample_replies
from persona_nns.traits import LABELS, JudgeOptions, Split, TraitOptions, TraitUnit, judge_answers

protocol_version = 1

_DIMS = "trait question pair label sample"
variables = {
    "score": Variable(
        _DIMS, "trait score", description="The judge's 0–100; NaN where it refuses.", judged=True
    ),
    "coherence": Variable(
        _DIMS, "coherence", description="The judge's 0–100; NaN where it refuses.", judged=True
    ),
    "response": Variable(_DIMS, "response", description="What the model said.", kind="text"),
}
figures = {"contrast": partial(score_bars, by="label")}
finish = judge_answers


@dataclass(frozen=True, eq=False)
class Contrasted(TraitUnit):
    """A question under every system prompt.

    Attributes:
        question: its number.
        prompts: token ids, [pair][label].
    """

    question: int
    prompts: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def place(self) -> dict[str, Any]:
        """Where it stands in the result."""
        return {"trait": self.trait, "question": self.question}


def plan(
    tokenizer: PreTrainedTokenizerBase,
    *,
    model: str,
    chosen: TraitOptions,
    split: Split = "extraction",
    n_samples: Count = 1,
    judging: JudgeOptions,
) -> Plan:
    """Render the questions of a trait under its system prompts.

    Args:
        tokenizer: the model's.
        model: label of the model, for ``{model_name}`` in an instruction.
        chosen: the trait.
        split: which questions are asked.
        n_samples: answers to each prompt.
        judging: the judge.
    """
    asked = chosen.load(split).of_model(model)
    judging.check(asked.name, asked.questions, tokenizer)
    units = [
        Contrasted(
            asked.name,
            number,
            tuple(
                tuple(
                    render_chat(tokenizer, question, asked.system(pair, label)).ids
                    for label in LABELS
                )
                for pair in range(len(asked.pairs))
            ),
        )
        for number, question in enumerate(asked.questions)
    ]
    content = {
        "trait": asked.name,
        "pairs": asked.pairs,
        "questions": asked.questions,
        "eval_prompt": asked.eval_prompt,
        "judge": judging.identity,
        "n_samples": n_samples,
    }
    return Plan(
        name=asked.name if split == "extraction" else f"{asked.name}-{split}",
        units=units,
        axes={
            "trait": [asked.name],
            "question": list(range(len(asked.questions))),
            "pair": list(range(len(asked.pairs))),
            "label": list(LABELS),
            "sample": list(range(n_samples)),
        },
        unit_axes=("trait", "question"),
        content=content,
        token_ids={
            unit.label: {
                f"{pair}/{label}": ids
                for pair, of_pair in enumerate(unit.prompts)
                for label, ids in zip(LABELS, of_pair, strict=True)
            }
            for unit in units
        },
        digest=content_digest(content),
        coords={"question_text": ("question", list(asked.questions))},
        attrs={
            "judge": judging.identity,
            "split": split,
            "system_role": takes_system_role(tokenizer),
            "systems": [
                [asked.system(pair, label) for label in LABELS] for pair in range(len(asked.pairs))
            ],
        },
        batch_size=4,
        unverifiable=judging.unverifiable,
    )


def measure(
    model: TransformersModel, units: list[Contrasted], *, n_samples: Count = 1, sampling: Sampling
) -> dict[str, Tensor]:
    """Let the model answer.

    Args:
        model: from `load_model`.
        units: questions with their prompts.
        n_samples: answers to each prompt.
        sampling: how they are drawn.
    """
    prompts = [
        SeededPrompt(ids, row_seed(unit.trait, unit.question, pair, label, sample))
        for unit in units
        for pair, of_pair in enumerate(unit.prompts)
        for label, ids in enumerate(of_pair)
        for sample in range(n_samples)
    ]
    said = sample_replies(model, prompts, sampling)
    return {"said": said.view(len(units), -1, len(LABELS), n_samples, said.shape[1])}
