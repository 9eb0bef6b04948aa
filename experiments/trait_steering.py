"""What does adding a trait vector do? Sweeps over layer, coefficient and steered tokens.

h_L + α v_L at the input of block L, at all tokens, at the prompt's, or from the last prompt token
on. Without `responses`: the model answers the held-out evaluation questions while it is steered,
and the answers are judged. With `responses`: the log-probability of given answers under steering,
under steering in every block at once by the increments v_L − v_{L−1}, and with the direction taken
out at one layer ("Persona Vectors", arXiv 2507.21509).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import xarray as xr
from matplotlib.figure import Figure
from nnsight import TransformersModel, save
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_nns.declarations import Plan, Variable, content_digest
from persona_nns.figures import steering_sweep
from persona_nns.prompts import render_chat, response_ids
from persona_nns.tracing import (
    RowSampler,
    ablate,
    end_tokens,
    increments,
    left_pad,
    normalised,
    parse_alphas,
    parse_position_sets,
    read_continuation,
    response_logprob,
    row_seed,
    similar_rows,
    steer,
    steered_steps,
    steered_tokens,
    until_end_of_text,
)
from persona_nns.traits import JudgeChoice, judge_tokens, load_traits, load_vector, read_responses

protocol_version = 1
defaults = {"layers": "all"}

_SCORED = "trait layer alpha position_set question sample"
_ROW = "trait row layer alpha position_set"
variables = {
    "score": Variable(
        _SCORED,
        "trait score",
        description="The judge's 0–100 for the answer of the steered model; NaN where it refuses.",
    ),
    "coherence": Variable(
        _SCORED, "coherence", description="The judge's 0–100; NaN where it refuses."
    ),
    "response": Variable(_SCORED, "response", description="What it said.", kind="text"),
    "logp": Variable(
        _ROW,
        "log-probability of the response",
        units="nat",
        description="Sum over response tokens, teacher-forced, with h_L + α v_L; no system prompt.",
    ),
    "logp_all_layers": Variable(
        "trait row alpha position_set",
        "log-probability, every block steered",
        units="nat",
        description="The same with α(v_L − v_{L−1}) added at every block.",
    ),
    "logp_ablate": Variable(
        "trait row layer",
        "log-probability, direction ablated",
        units="nat",
        description="The same with h − (h·v̂)v̂ at one layer, at all tokens.",
    ),
}
_GENERATED = ("score", "coherence", "response")
_TEACHER_FORCED = ("logp", "logp_all_layers", "logp_ablate")


def sweep(results: xr.Dataset) -> Figure:
    """Trait and coherence (or log-probability) against α, a line a layer."""
    return steering_sweep(results)


figures = {"sweep": sweep}


@dataclass(frozen=True, eq=False)
class Steered:
    """A question, or a row of given answers, to be run under every coefficient.

    Attributes:
        trait: the trait's name.
        number: of the question or row.
        prompt: token ids, no system prompt.
        response: token ids of a given answer; None where the model is to answer.
        vector: [n_layers + 1, d_model].
        alphas: coefficients.
        position_sets: which tokens are steered.
    """

    trait: str
    number: int
    prompt: tuple[int, ...]
    response: tuple[int, ...] | None
    vector: Tensor
    alphas: tuple[float, ...]
    position_sets: tuple[str, ...]

    @property
    def label(self) -> str:
        """What it is called in messages."""
        return f"{self.trait}/{self.number}"

    @property
    def place(self) -> dict[str, Any]:
        """Where it stands in the result."""
        axis = "question" if self.response is None else "row"
        return {"trait": self.trait, axis: self.number}

    @property
    def conditions(self) -> list[tuple[float, str]]:
        """Coefficients and position sets, in the order of the result."""
        return [(alpha, tokens) for alpha in self.alphas for tokens in self.position_sets]


def plan(
    tokenizer: PreTrainedTokenizerBase,
    *,
    model: str,
    vector: str,
    vector_run: str | None = None,
    average: Literal["response_avg", "prompt_avg", "prompt_last"] = "response_avg",
    trait: str | None = None,
    artifacts: str | None = None,
    responses: str | None = None,
    alphas: str = "0,0.5,1,1.5,2,2.5,3",
    position_sets: str = "response",
    n_samples: Annotated[int, Field(ge=1)] = 1,
    judge: str = "lexicon",
    judge_model: str = "gpt-4.1-mini",
    judge_prices: str = "",
) -> Plan:
    """Render what is run under steering.

    Args:
        tokenizer: the model's.
        model: label of the model.
        vector: a file (.npy, .pt, .safetensors), or a store with trait_vectors.
        vector_run: which run of trait_vectors, where the store has several.
        average: which average of a store's vectors.
        trait: a bundled trait, or one of the folder `artifacts`; for rows from a file, its stem.
        artifacts: folder with extraction/{trait}.json and evaluation/{trait}.json.
        responses: given answers (.jsonl); by default the model answers and is judged.
        alphas: coefficients.
        position_sets: all, prompt (its last token included), response (from it on).
        n_samples: answers to each question.
        judge: lexicon, none, or the URL of an OpenAI-compatible endpoint.
        judge_model: the model there; its key is read from OPENAI_API_KEY.
        judge_prices: dollars for a million tokens sent and received, as 0.40,1.60.
    """
    coefficients, tokens = parse_alphas(alphas), parse_position_sets(position_sets)
    name = trait or (Path(responses).stem if responses else "cheerful")
    direction = load_vector(vector, name, average, model, vector_run)
    content: dict[str, Any] = {"trait": name, "vector": direction.tolist()}
    if responses is not None:
        rows = read_responses(responses)
        shown = [(row.question, response_ids(tokenizer, row.response)) for row in rows]
        texts: list[Any] = [[row.question, row.response] for row in rows]
        axis = "row"
    else:
        asked = load_traits(name, "evaluation", artifacts)[0]
        choice = JudgeChoice(judge, judge_model, judge_prices)
        choice.check(name)
        shown = [(question, None) for question in asked.questions]
        texts, axis = list(asked.questions), "question"
        content |= {"judge": choice.identity, "eval_prompt": asked.eval_prompt}
    units = [
        Steered(
            name,
            number,
            render_chat(tokenizer, question).ids,
            response,
            direction,
            coefficients,
            tokens,
        )
        for number, (question, response) in enumerate(shown)
    ]
    content |= {"texts": texts, "alphas": coefficients, "position_sets": tokens}
    of_samples = {} if responses is not None else {"sample": list(range(n_samples))}
    return Plan(
        name=name,
        units=units,
        axes={
            "trait": [name],
            axis: list(range(len(units))),
            "alpha": list(coefficients),
            "position_set": list(tokens),
            **of_samples,
        },
        unit_axes=("trait", axis),
        content={**content, "vector": content_digest(content["vector"])},
        token_ids={
            unit.label: {"prompt": unit.prompt, "response": unit.response or ()} for unit in units
        },
        digest=content_digest({key: content[key] for key in content if key != "vector"}),
        coords={"question_text": (axis, [question for question, _ in shown])},
        attrs={"vector_source": vector, "average": average},
        variables=_GENERATED if responses is None else _TEACHER_FORCED,
        width=(direction.shape[0] - 1, direction.shape[1]),
        batch_size=10,
    )


def measure(
    model: TransformersModel,
    units: list[Steered],
    *,
    layers: list[int],
    n_samples: Annotated[int, Field(ge=1)] = 1,
    max_new_tokens: Annotated[int, Field(ge=1)] = 256,
    temperature: Annotated[float, Field(ge=0)] = 1.0,
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0,
    reuse: bool = True,
) -> dict[str, Tensor]:
    """Steer.

    Args:
        model: from `load_model`.
        units: questions, or rows of given answers.
        layers: where the vector is added.
        n_samples: answers to each question.
        max_new_tokens: the longest answer.
        temperature: 1 samples from the model; 0 is greedy.
        top_p: sample from the most likely tokens that together have this probability.
        reuse: run the blocks below the steered layer once.
    """
    if units[0].response is not None:
        return teacher_force(model, units, layers, reuse=reuse)
    vector = units[0].vector.to(model.device)
    rows = [
        (unit.prompt, alpha, tokens, row_seed(unit.trait, unit.number, sample))
        for unit in units
        for alpha, tokens in unit.conditions
        for sample in range(n_samples)
    ]
    said = torch.full((len(layers), len(rows), max_new_tokens), -1)
    for k, layer in enumerate(layers):
        for batch in similar_rows([len(row[0]) + max_new_tokens for row in rows]):
            padded = left_pad([rows[row][0] for row in batch], device=model.device)
            alpha = torch.tensor([[rows[row][1]] for row in batch])
            tokens = [rows[row][2] for row in batch]
            sampler = RowSampler([rows[row][3] for row in batch], temperature, top_p)
            n_response = torch.zeros(len(batch), dtype=torch.long)
            strength = alpha * steered_tokens(padded.attention_mask.cpu(), n_response, tokens)
            later = alpha * steered_steps(tokens)
            strength, later = strength.to(model.device), later.to(model.device)
            with (
                until_end_of_text(),
                model.generate(
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    logits_processor=[sampler] if temperature else [],
                ) as tracer,
            ):
                with tracer.invoke(padded.tokens):
                    for step in tracer.iter[:]:
                        hidden = model.layers[layer].input
                        model.layers[layer].input = steer(
                            hidden, vector[layer], strength if step == 0 else later
                        )
                with tracer.invoke():
                    generated = save(tracer.result)
            answer = read_continuation(
                generated, padded.input_ids.shape[1], max_new_tokens, end_tokens(model)
            )
            said[k, batch] = answer.until_end().cpu()
    # [layer, question, α, position set, sample, token], the question first
    shape = (len(layers), len(units), len(units[0].alphas), len(units[0].position_sets))
    return {"said": said.view(*shape, n_samples, max_new_tokens).transpose(0, 1)}


def teacher_force(
    model: TransformersModel, units: Sequence[Steered], layers: list[int], *, reuse: bool
) -> dict[str, Tensor]:
    """Log-probabilities of given answers under every kind of steering."""
    device, vector = model.device, units[0].vector.to(model.device)
    direction, added = normalised(vector), increments(vector)
    conditions = units[0].conditions
    answers = [unit.response or () for unit in units]
    padded = left_pad(
        [(*unit.prompt, *answer) for unit, answer in zip(units, answers, strict=True)],
        device=device,
    )
    n_response = torch.tensor([len(answer) for answer in answers], device=device)
    n_scored = int(n_response.max())
    response = padded.input_ids[:, padded.input_ids.shape[1] - n_scored :]
    inputs = {**padded.tokens, "position_ids": padded.position_ids, "use_cache": False}

    # What enters each block without steering, to go on from at the steered layer.
    with model.trace(inputs, logits_to_keep=1):
        clean = save([block.input for block in model.layers])

    logp = torch.empty(len(units), len(layers), len(conditions))
    logp_all = torch.empty(len(units), len(conditions))
    logp_ablate = torch.empty(len(units), len(layers))
    for c, (alpha, tokens) in enumerate(conditions):
        strength = alpha * steered_tokens(padded.attention_mask, n_response, [tokens] * len(units))
        for k, layer in enumerate(layers):
            with model.trace(inputs, logits_to_keep=n_scored + 1):
                if reuse:
                    for block in model.layers[:layer]:
                        block.skip(clean[layer])
                model.layers[layer].input = steer(
                    model.layers[layer].input, vector[layer], strength
                )
                logits = model.output.logits[:, :-1]
                scored = save(response_logprob(logits, response, n_response))
            logp[:, k, c] = scored.cpu()
        with model.trace(inputs, logits_to_keep=n_scored + 1):
            for layer, block in enumerate(model.layers):
                block.input = steer(block.input, added[layer], strength)
            logits = model.output.logits[:, :-1]
            scored = save(response_logprob(logits, response, n_response))
        logp_all[:, c] = scored.cpu()
    for k, layer in enumerate(layers):
        with model.trace(inputs, logits_to_keep=n_scored + 1):
            if reuse:
                for block in model.layers[:layer]:
                    block.skip(clean[layer])
            model.layers[layer].input = ablate(model.layers[layer].input, direction[layer])
            logits = model.output.logits[:, :-1]
            scored = save(response_logprob(logits, response, n_response))
        logp_ablate[:, k] = scored.cpu()
    shape = (len(units[0].alphas), len(units[0].position_sets))
    return {
        "logp": logp.unflatten(-1, shape),
        "logp_all_layers": logp_all.unflatten(-1, shape),
        "logp_ablate": logp_ablate,
    }


def finish(
    tokenizer: PreTrainedTokenizerBase,
    units: list[Steered],
    measured: dict[str, Tensor],
    *,
    artifacts: str | None,
    judge: str,
    judge_model: str,
    judge_prices: str,
) -> dict[str, Any]:
    """Decode and judge the answers."""
    if "said" not in measured:
        return dict(measured)
    asked = load_traits(units[0].trait, "evaluation", artifacts)[0]
    return judge_tokens(
        tokenizer,
        asked,
        [asked.questions[unit.number] for unit in units],
        measured["said"],
        JudgeChoice(judge, judge_model, judge_prices),
    )
