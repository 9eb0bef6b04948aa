"""Does the last prompt token foretell the trait? Its projection on v̂ against the answer's score.

Held-out questions are asked under system prompts that ask for a degree of the trait, from "not at
all" to "very". The residual of the last prompt token, before anything is said, is projected on the
trait's direction at every layer, and the answer is judged ("Persona Vectors", arXiv 2507.21509).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nnsight import TransformersModel, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_nns.declarations import Count, FileName, Plan, Variable, content_digest
from persona_nns.figures import correlation_by_layer
from persona_nns.prompts import render_chat, takes_system_role
from persona_nns.tracing import (
    Average,
    Sampling,
    SeededPrompt,
    left_pad,
    normalised,
    row_seed,
    sample_replies,
    similar_rows,
    stack_layers,
)
from persona_nns.traits import (
    DEGREES,
    JudgeOptions,
    TraitOptions,
    TraitUnit,
    check_unseen,
    judge_answers,
    load_direction,
)

protocol_version = 1

_DIMS = "trait question degree sample"
variables = {
    "projection": Variable(
        "trait question degree layer",
        "projection on v̂",
        description="Residual of the last prompt token times v̂ (0 where ‖v‖ = 0).",
        every_layer=True,
    ),
    "score": Variable(
        _DIMS, "trait score", description="The judge's 0–100; NaN where it refuses.", judged=True
    ),
    "coherence": Variable(
        _DIMS, "coherence", description="The judge's 0–100; NaN where it refuses.", judged=True
    ),
    "response": Variable(_DIMS, "response", description="What the model said.", kind="text"),
}
figures = {"correlation": correlation_by_layer}
finish = judge_answers


@dataclass(frozen=True, eq=False)
class Graded(TraitUnit):
    """A question under every degree of the trait.

    Attributes:
        question: its number.
        prompts: token ids, one for each degree.
        vector: [n_layers + 1, d_model].
    """

    question: int
    prompts: tuple[tuple[int, ...], ...]
    vector: Tensor

    @property
    def place(self) -> dict[str, Any]:
        """Where it stands in the result."""
        return {"trait": self.trait, "question": self.question}


def plan(
    tokenizer: PreTrainedTokenizerBase,
    *,
    model: str,
    vector: FileName,
    vector_run: str | None = None,
    average: Average = "response_avg",
    chosen: TraitOptions,
    n_samples: Count = 1,
    judging: JudgeOptions,
) -> Plan:
    """Render the questions under every degree.

    Args:
        tokenizer: the model's.
        model: label of the model.
        vector: a file (.npy, .pt, .safetensors, .gguf), or a store with trait_vectors; a store's
            other directions by name: STORE#axis, STORE#component:0, STORE#TRAIT.
        vector_run: which run, where the store has several.
        average: which average of a store's vectors.
        chosen: the trait.
        n_samples: answers to each prompt.
        judging: the judge.
    """
    trait, asked = chosen.trait, chosen.load("evaluation")
    judging.check(trait, asked.questions, tokenizer)
    found = load_direction(vector, model, trait=trait, average=average, run=vector_run)
    check_unseen(asked, chosen.artifacts, found, chosen.split_seed)
    direction = found.vectors
    units = [
        Graded(
            trait,
            number,
            tuple(
                render_chat(tokenizer, question, asked.graded_system(degree)).ids
                for degree in DEGREES
            ),
            direction,
        )
        for number, question in enumerate(asked.questions)
    ]
    content = {
        "trait": trait,
        "questions": asked.questions,
        "eval_prompt": asked.eval_prompt,
        "judge": judging.identity,
        "n_samples": n_samples,
    }
    return Plan(
        name=trait,
        units=units,
        axes={
            "trait": [trait],
            "question": list(range(len(units))),
            "degree": list(DEGREES),
            "sample": list(range(n_samples)),
        },
        unit_axes=("trait", "question"),
        content={**content, "vector": content_digest(direction.tolist())},
        token_ids={unit.label: dict(zip(DEGREES, unit.prompts, strict=True)) for unit in units},
        digest=content_digest(content),
        coords={"question_text": ("question", list(asked.questions))},
        attrs={
            "vector_source": vector,
            "average": average,
            "system_role": takes_system_role(tokenizer),
        },
        width=(direction.shape[0] - 1, direction.shape[1]),
        batch_size=10,
        unverifiable=judging.unverifiable,
    )


def measure(
    model: TransformersModel, units: list[Graded], *, n_samples: Count = 1, sampling: Sampling
) -> dict[str, Tensor]:
    """Read the last prompt token, then let the model answer.

    Args:
        model: from `load_model`.
        units: questions under every degree.
        n_samples: answers to each prompt.
        sampling: how they are drawn.
    """
    direction = normalised(units[0].vector)
    projection = project_last(model, [ids for unit in units for ids in unit.prompts], direction)
    prompts = [
        SeededPrompt(ids, row_seed(unit.trait, unit.question, degree, sample))
        for unit in units
        for degree, ids in enumerate(unit.prompts)
        for sample in range(n_samples)
    ]
    said = sample_replies(model, prompts, sampling)
    return {
        "projection": projection.view(len(units), len(DEGREES), -1),
        "said": said.view(len(units), len(DEGREES), n_samples, -1),
    }


def project_last(
    model: TransformersModel, prompts: Sequence[Sequence[int]], direction: Tensor
) -> Tensor:
    """The residual of each prompt's last token times a direction, [prompt, layer].

    Args:
        model: from `load_model`.
        prompts: token ids.
        direction: v̂ [layer, d_model].
    """
    direction = direction.to(model.device)
    projection = torch.empty(len(prompts), len(direction))
    for batch in similar_rows([len(ids) for ids in prompts]):
        padded = left_pad([prompts[row] for row in batch], device=model.device)
        with model.trace(
            padded.tokens, position_ids=padded.position_ids, use_cache=False, logits_to_keep=1
        ):
            last = save(
                [block.input[:, -1] for block in model.layers] + [model.final_norm.output[:, -1]]
            )
        read = stack_layers(last, dim=1).float()  # [row, layer, d_model]
        projection[batch] = (read * direction).sum(-1).cpu()
    return projection
