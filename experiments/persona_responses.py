"""What do roles answer, and what is the model's residual stream like while they do?

A model is asked questions under the system prompts of many roles, or answers that were given so
are read back. Of every answer and layer, the mean over its tokens of the residual stream is kept:
the space of the roles (`persona_space`) is made of these ("The Assistant Axis", arXiv 2601.10387).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nnsight import TransformersModel, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_nns.declarations import Count, FileName, Plan, Variable, content_digest
from persona_nns.prompts import render_chat, response_ids, takes_system_role
from persona_nns.tracing import (
    Draw,
    NucleusSampling,
    Prefilled,
    SeededPrompt,
    averages,
    prefill_rows,
    row_seed,
    similar_rows,
    stack_layers,
)
from persona_nns.traits import RoleOptions, RolePrompt

protocol_version = 1

_DIMS = "prompt answer"
variables = {
    "response": Variable(_DIMS, "response", description="What was said.", kind="text"),
    "question_id": Variable(_DIMS, "question", description="What was asked, by id.", kind="text"),
    "given_score": Variable(
        _DIMS, "given score", description="The score that came with an answer, 0–3; NaN without."
    ),
    "n_tokens": Variable(
        _DIMS,
        "tokens of the response",
        units="token",
        description="Without an end token; 0 of an empty answer.",
        kind="int",
        unmeasured=-1,
    ),
    "answer_mean": Variable(
        f"{_DIMS} layer d_model",
        "mean residual",
        description="Mean over an answer's tokens of the residual stream, in float32; NaN of none.",
        every_layer=True,
    ),
}
# As the public code samples.
_SAMPLING = NucleusSampling(max_new_tokens=512, temperature=0.7, top_p=0.9)
_ROWS = 64  # answers at a time, at least
_PASS_TOKENS = 8_192


@dataclass(frozen=True, eq=False)
class Prompt:
    """A system prompt of a role, with every question put to it.

    Attributes:
        label: role and number of the system prompt.
        asked: token ids of each question's prompt.
        given: token ids of each answer; None where the model is to answer.
        seeds: that each answer is drawn with.
        texts: the answers, where they are given.
        question_ids: what is asked.
        scores: that came with the answers, NaN without; none where none came.
        width: the most answers that a system prompt of the plan has.
    """

    label: str
    asked: tuple[tuple[int, ...], ...]
    given: tuple[tuple[int, ...], ...] | None
    seeds: tuple[int, ...]
    texts: tuple[str, ...]
    question_ids: tuple[str, ...]
    scores: tuple[float, ...]
    width: int

    @property
    def place(self) -> dict[str, Any]:
        """Where it stands in the result."""
        return {"prompt": self.label}


def plan(
    tokenizer: PreTrainedTokenizerBase,
    *,
    model: str,
    asking: RoleOptions,
    responses: FileName | None = None,
    n_samples: Count = 1,
    seed: int = 0,
) -> Plan:
    """Render questions under the system prompts of roles.

    Args:
        tokenizer: the model's.
        model: label of the model, for ``{model_name}`` in a role's file.
        asking: which roles are asked what.
        responses: answers (.jsonl, .jsonl.gz), in place of those that the model gives.
        n_samples: answers to each question.
        seed: of the samples.
    """
    prompts = asking.prompts(responses, model, n_samples)
    width = max(len(prompt.questions) for prompt in prompts)
    asked = [
        [p.role, p.number, p.system, [list(vars(question).values()) for question in p.questions]]
        for p in prompts
    ]
    content = {"asked": asked, "seed": seed if responses is None else None}
    texts = {question.id: question.text for p in prompts for question in p.questions}
    scored = any(question.score is not None for p in prompts for question in p.questions)
    units = [_render(tokenizer, prompt, seed, width, scored=scored) for prompt in prompts]
    return Plan(
        name=asking.name(responses),
        units=units,
        axes={"prompt": [unit.label for unit in units], "answer": list(range(width))},
        unit_axes=("prompt",),
        content=content,
        token_ids={
            unit.label: {
                str(k): ids + (unit.given[k] if unit.given else ())
                for k, ids in enumerate(unit.asked)
            }
            for unit in units
        },
        digest=content_digest(content),
        coords={
            "prompt_role": ("prompt", [prompt.role for prompt in prompts]),
            "prompt_system": ("prompt", [prompt.system for prompt in prompts]),
        },
        attrs={"question_texts": texts, "system_role": takes_system_role(tokenizer)},
        batch_size=-(-_ROWS // width),
        variables=[name for name in variables if scored or name != "given_score"],
    )


def _render(
    tokenizer: PreTrainedTokenizerBase, prompt: RolePrompt, seed: int, width: int, *, scored: bool
) -> Prompt:
    texts = [question.response for question in prompt.questions if question.response is not None]
    ids = [question.id for question in prompt.questions]
    samples = [ids[:k].count(of) for k, of in enumerate(ids)]
    return Prompt(
        label=f"{prompt.role}/{prompt.number}",
        asked=tuple(render_chat(tokenizer, q.text, prompt.system).ids for q in prompt.questions),
        given=tuple(response_ids(tokenizer, text) for text in texts) if texts else None,
        seeds=tuple(
            row_seed(seed, prompt.role, prompt.number, of, sample)
            for of, sample in zip(ids, samples, strict=True)
        ),
        texts=tuple(texts),
        question_ids=tuple(ids),
        scores=tuple(torch.nan if q.score is None else q.score for q in prompt.questions)
        if scored
        else (),
        width=width,
    )


def measure(
    model: TransformersModel,
    units: list[Prompt],
    *,
    sampling: NucleusSampling = _SAMPLING,
    reuse: bool = True,
) -> dict[str, Any]:
    """Let the model answer where it is to, and read all answers.

    Args:
        model: from `load_model`.
        units: system prompts with their questions.
        sampling: how answers are drawn.
        reuse: run what prompts begin with once, and a prompt once for answering and reading.
    """
    asked = [ids for unit in units for ids in unit.asked]
    seeds = [seed for unit in units for seed in unit.seeds]
    given = [ids for unit in units for ids in unit.given or ()]
    texts = [text for unit in units for text in unit.texts] or [""] * len(asked)
    lengths = [len(ids) for ids in given] or [sampling.max_new_tokens] * len(asked)
    n_tokens, means = torch.zeros(len(asked), dtype=torch.long), torch.empty(0)
    totals = [len(ids) + n for ids, n in zip(asked, lengths, strict=True)]
    for rows in similar_rows(totals, _PASS_TOKENS):
        prompts = prefill_rows(model, [asked[row] for row in rows], reuse=reuse)
        if given:
            said = [given[row] for row in rows]
        else:
            found = answer(model, prompts, [seeds[row] for row in rows], sampling)
            said = [response_ids(model.tokenizer, text) for text in found]
            for row, text in zip(rows, found, strict=True):
                texts[row] = text
        read = read_means(model, prompts, said)
        if not means.numel():
            means = read.new_zeros(len(asked), *read.shape[1:])
        means[rows] = read
        n_tokens[rows] = torch.tensor([len(ids) for ids in said])
    return by_unit(units, texts, n_tokens, means)


def answer(
    model: TransformersModel, prompts: Prefilled, seeds: Sequence[int], sampling: NucleusSampling
) -> list[str]:
    """What the model says to each prompt."""
    asked = [SeededPrompt(ids, seed) for ids, seed in zip(prompts.rows, seeds, strict=True)]
    draw = Draw(model, asked, sampling, prompts.prefix)
    while draw.unfinished:
        with model.generate(draw.tokens, **draw.settings()) as tracer:
            generated = save(tracer.result)
        draw.add(generated)
    return draw.read().texts(model.tokenizer)


def read_means(
    model: TransformersModel, prompts: Prefilled, said: Sequence[Sequence[int]]
) -> Tensor:
    """Mean residual of each answer, [row, layer, d_model] in float32 on the CPU; NaN of none."""
    n_said = torch.tensor([len(ids) for ids in said], device=model.device)
    width = max(1, int(n_said.max()))
    # Padded on the right: no token of an answer sees what comes after it.
    follow = [[*ids, *[0] * (width - len(ids))] for ids in said]
    window = prompts.followed_by(torch.tensor(follow, device=model.device))
    # The padding stands nowhere that no token stands: a model may have no more positions.
    last = max(len(ids) + len(of) for ids, of in zip(prompts.rows, said, strict=True)) - 1
    inputs = {**window.inputs(), "position_ids": window.position_ids.clamp(max=last)}
    counts = torch.arange(width, device=model.device) < n_said[:, None]
    weights = (counts / n_said.clamp(min=1)[:, None])[:, None]  # [row, average, column]
    with model.trace(inputs, logits_to_keep=1):
        read = save(
            [averages(block.input[:, -width:], weights)[:, 0] for block in model.layers]
            + [averages(model.final_norm.output[:, -width:], weights)[:, 0]]
        )
    means = stack_layers(read, 1).cpu()
    means[n_said.cpu() == 0] = torch.nan
    return means


def by_unit(
    units: Sequence[Prompt], texts: Sequence[str], n_tokens: Tensor, means: Tensor
) -> dict[str, Any]:
    """Answers in the place of their system prompt; what it has fewer than others stays empty."""
    n_units, width, first = len(units), units[0].width, 0
    shown = [[""] * width for _ in units]
    counts = torch.full((n_units, width), -1)
    spread = means.new_full((n_units, width, *means.shape[1:]), torch.nan)
    for k, unit in enumerate(units):
        n = len(unit.asked)
        shown[k][:n] = texts[first : first + n]
        counts[k, :n] = n_tokens[first : first + n]
        spread[k, :n] = means[first : first + n]
        first += n
    return {"response": shown, "n_tokens": counts, "answer_mean": spread}


def finish(
    tokenizer: PreTrainedTokenizerBase,  # noqa: ARG001
    units: Sequence[Prompt],
    measured: dict[str, Any],
) -> dict[str, Any]:
    """Add what was known of the answers before: what was asked, and their scores."""
    known: dict[str, Any] = {
        "question_id": [_filled(unit.question_ids, "", unit.width) for unit in units]
    }
    if units[0].scores:
        scores = [_filled(unit.scores, torch.nan, unit.width) for unit in units]
        known["given_score"] = torch.tensor(scores)
    return {**measured, **known}


def _filled(values: Sequence[Any], fill: Any, width: int) -> list[Any]:
    return [*values, *[fill] * (width - len(values))]
