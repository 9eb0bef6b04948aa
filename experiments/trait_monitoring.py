"""Does the last prompt token foretell the trait? Its projection on v̂ against the answer's score.

Held-out questions are asked under system prompts that ask for a degree of the trait, from "not at
all" to "very". The residual of the last prompt token, before anything is said, is projected on the
trait's direction at every layer, and the answer is judged ("Persona Vectors", arXiv 2507.21509).
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import xarray as xr
from matplotlib.figure import Figure
from nnsight import TransformersModel, save
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_nns.declarations import Plan, Variable, content_digest
from persona_nns.figures import correlation_by_layer
from persona_nns.prompts import render_chat, takes_system_role
from persona_nns.tracing import left_pad, normalised, row_seed, sample_replies, similar_rows
from persona_nns.traits import DEGREES, JudgeChoice, judge_tokens, load_traits, load_vector

protocol_version = 1

_DIMS = "trait question degree sample"
variables = {
    "projection": Variable(
        "trait question degree layer",
        "projection on v̂",
        description="Residual of the last prompt token times v̂ (0 where ‖v‖ = 0).",
        every_layer=True,
    ),
    "score": Variable(_DIMS, "trait score", description="The judge's 0–100; NaN where it refuses."),
    "coherence": Variable(
        _DIMS, "coherence", description="The judge's 0–100; NaN where it refuses."
    ),
    "response": Variable(_DIMS, "response", description="What the model said.", kind="text"),
}


def by_layer(results: xr.Dataset) -> Figure:
    """Correlation with the score at each layer, over all answers and within each degree."""
    return correlation_by_layer(results)


figures = {"correlation": by_layer}


@dataclass(frozen=True, eq=False)
class Graded:
    """A question under every degree of the trait.

    Attributes:
        trait: the trait's name.
        question: its number.
        prompts: token ids, one for each degree.
        vector: [n_layers + 1, d_model].
    """

    trait: str
    question: int
    prompts: tuple[tuple[int, ...], ...]
    vector: Tensor

    @property
    def label(self) -> str:
        """What it is called in messages."""
        return f"{self.trait}/{self.question}"

    @property
    def place(self) -> dict[str, Any]:
        """Where it stands in the result."""
        return {"trait": self.trait, "question": self.question}


def plan(
    tokenizer: PreTrainedTokenizerBase,
    *,
    model: str,
    vector: str,
    vector_run: str | None = None,
    average: Literal["response_avg", "prompt_avg", "prompt_last"] = "response_avg",
    trait: str = "cheerful",
    artifacts: str | None = None,
    n_samples: Annotated[int, Field(ge=1)] = 1,
    judge: str = "lexicon",
    judge_model: str = "gpt-4.1-mini",
    judge_prices: str = "",
) -> Plan:
    """Render the questions under every degree.

    Args:
        tokenizer: the model's.
        model: label of the model.
        vector: a file (.npy, .pt, .safetensors), or a store with trait_vectors.
        vector_run: which run of trait_vectors, where the store has several.
        average: which average of a store's vectors.
        trait: a bundled trait, or one of the folder `artifacts`.
        artifacts: folder with extraction/{trait}.json and evaluation/{trait}.json.
        n_samples: answers to each prompt.
        judge: lexicon, none, or the URL of an OpenAI-compatible endpoint.
        judge_model: the model there; its key is read from OPENAI_API_KEY.
        judge_prices: dollars for a million tokens sent and received, as 0.40,1.60.
    """
    asked = load_traits(trait, "evaluation", artifacts)[0]
    choice = JudgeChoice(judge, judge_model, judge_prices)
    choice.check(trait)
    direction = load_vector(vector, trait, average, model, vector_run)
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
        "judge": choice.identity,
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
    )


def measure(
    model: TransformersModel,
    units: list[Graded],
    *,
    n_samples: Annotated[int, Field(ge=1)] = 1,
    max_new_tokens: Annotated[int, Field(ge=1)] = 256,
    temperature: Annotated[float, Field(ge=0)] = 1.0,
) -> dict[str, Tensor]:
    """Read the last prompt token, then let the model answer.

    Args:
        model: from `load_model`.
        units: questions under every degree.
        n_samples: answers to each prompt.
        max_new_tokens: the longest answer.
        temperature: 1 samples from the model; 0 is greedy.
    """
    direction = normalised(units[0].vector).to(model.device)
    prompts = [
        (ids, unit.trait, unit.question, degree)
        for unit in units
        for degree, ids in enumerate(unit.prompts)
    ]
    projection = torch.empty(len(prompts), len(direction))
    for batch in similar_rows([len(prompt[0]) for prompt in prompts]):
        padded = left_pad([prompts[row][0] for row in batch], device=model.device)
        with model.trace(
            padded.tokens, position_ids=padded.position_ids, use_cache=False, logits_to_keep=1
        ):
            last = save(
                [block.input[:, -1] for block in model.layers] + [model.final_norm.output[:, -1]]
            )
        read = torch.stack(last, dim=1).float()  # [row, layer, d_model]
        projection[batch] = (read * direction).sum(-1).cpu()

    rows = [(prompt, sample) for prompt in prompts for sample in range(n_samples)]
    said = sample_replies(
        model,
        [prompt[0] for prompt, _ in rows],
        [row_seed(*prompt[1:], sample) for prompt, sample in rows],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
    return {
        "projection": projection.view(len(units), len(DEGREES), -1),
        "said": said.view(len(units), len(DEGREES), n_samples, max_new_tokens),
    }


def finish(
    tokenizer: PreTrainedTokenizerBase,
    units: list[Graded],
    measured: dict[str, Tensor],
    *,
    artifacts: str | None,
    judge: str,
    judge_model: str,
    judge_prices: str,
) -> dict[str, Any]:
    """Decode and judge the answers."""
    asked = load_traits(units[0].trait, "evaluation", artifacts)[0]
    judged = judge_tokens(
        tokenizer,
        asked,
        [asked.questions[unit.question] for unit in units],
        measured["said"],
        JudgeChoice(judge, judge_model, judge_prices),
    )
    return {"projection": measured["projection"], **judged}
