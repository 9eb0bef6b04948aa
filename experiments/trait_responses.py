"""What does the model say when asked for a trait, and when asked to restrain it?

Each question of a trait is asked under every pair of contrastive system prompts: one instruction
that asks for the trait, one that restrains it. The answers are judged for the trait and for
coherence. Vectors are made from the pairs that show the contrast (`trait_vectors`).
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import xarray as xr
from matplotlib.figure import Figure
from nnsight import TransformersModel
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_nns.declarations import Plan, Variable, content_digest
from persona_nns.figures import score_bars
from persona_nns.prompts import render_chat, takes_system_role
from persona_nns.tracing import row_seed, sample_replies
from persona_nns.traits import LABELS, JudgeChoice, Trait, judge_tokens, load_traits

protocol_version = 1

_DIMS = "trait question pair label sample"
variables = {
    "score": Variable(_DIMS, "trait score", description="The judge's 0–100; NaN where it refuses."),
    "coherence": Variable(
        _DIMS, "coherence", description="The judge's 0–100; NaN where it refuses."
    ),
    "response": Variable(_DIMS, "response", description="What the model said.", kind="text"),
}


def contrast(results: xr.Dataset) -> Figure:
    """Scores under the two kinds of system prompt."""
    return score_bars(results, by="label")


figures = {"contrast": contrast}


@dataclass(frozen=True)
class Asked:
    """A question under every system prompt.

    Attributes:
        trait: the trait's name.
        question: its number.
        prompts: token ids, [pair][label].
    """

    trait: str
    question: int
    prompts: tuple[tuple[tuple[int, ...], ...], ...]

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
    trait: str = "cheerful",
    artifacts: str | None = None,
    split: Literal["extraction", "evaluation"] = "extraction",
    n_samples: Annotated[int, Field(ge=1)] = 1,
    judge: str = "lexicon",
    judge_model: str = "gpt-4.1-mini",
    judge_prices: str = "",
) -> Plan:
    """Render the questions of a trait under its system prompts.

    Args:
        tokenizer: the model's.
        trait: a bundled trait, or one of the folder `artifacts`.
        artifacts: folder with extraction/{trait}.json and evaluation/{trait}.json.
        split: which questions are asked.
        n_samples: answers to each prompt.
        judge: lexicon, none, or the URL of an OpenAI-compatible endpoint.
        judge_model: the model there; its key is read from OPENAI_API_KEY.
        judge_prices: dollars for a million tokens sent and received, as 0.40,1.60.
    """
    asked = load_traits(trait, split, artifacts)[0]
    choice = JudgeChoice(judge, judge_model, judge_prices)
    choice.check(asked.name)
    units = [
        Asked(
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
        "judge": choice.identity,
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
            "judge": choice.identity,
            "split": split,
            "system_role": takes_system_role(tokenizer),
            "systems": [[asked.system(pair, lab) for lab in LABELS] for pair in range(5)],
        },
        batch_size=4,
    )


def measure(
    model: TransformersModel,
    units: list[Asked],
    *,
    n_samples: Annotated[int, Field(ge=1)] = 1,
    max_new_tokens: Annotated[int, Field(ge=1)] = 256,
    temperature: Annotated[float, Field(ge=0)] = 1.0,
) -> dict[str, Tensor]:
    """Let the model answer.

    Args:
        model: from `load_model`.
        units: questions with their prompts.
        n_samples: answers to each prompt.
        max_new_tokens: the longest answer.
        temperature: 1 samples from the model; 0 is greedy.
    """
    rows = [
        (ids, row_seed(unit.trait, unit.question, pair, label, sample))
        for unit in units
        for pair, of_pair in enumerate(unit.prompts)
        for label, ids in enumerate(of_pair)
        for sample in range(n_samples)
    ]
    prompts, seeds = zip(*rows, strict=True)
    said = sample_replies(
        model, prompts, seeds, max_new_tokens=max_new_tokens, temperature=temperature
    )
    return {"said": said.view(len(units), -1, len(LABELS), n_samples, max_new_tokens)}


def finish(
    tokenizer: PreTrainedTokenizerBase,
    units: list[Asked],
    measured: dict[str, Tensor],
    *,
    trait: str,
    artifacts: str | None,
    split: Literal["extraction", "evaluation"],
    judge: str,
    judge_model: str,
    judge_prices: str,
) -> dict[str, Any]:
    """Decode and judge the answers."""
    asked: Trait = load_traits(trait, split, artifacts)[0]
    return judge_tokens(
        tokenizer,
        asked,
        [asked.questions[unit.question] for unit in units],
        measured["said"],
        JudgeChoice(judge, judge_model, judge_prices),
    )
