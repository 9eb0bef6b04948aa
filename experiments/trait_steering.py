"""What does adding a trait vector do? Sweeps over layer, coefficient and steered tokens.

h_L + α v_L at the input of block L, at all tokens, at the prompt's, or from the last prompt token
on. Without `responses`: the model answers the held-out evaluation questions while it is steered,
and the answers are judged. With `responses`: the log-probability of given answers under steering,
under steering in every block at once by the increments v_L − v_{L−1}, and with the direction taken
out at one layer ("Persona Vectors", arXiv 2507.21509).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from nnsight import TransformersModel, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_nns.declarations import Count, FileName, Plan, Variable, content_digest
from persona_nns.figures import steering_sweep
from persona_nns.prompts import render_chat, response_ids, stem_of
from persona_nns.tracing import (
    Average,
    NucleusSampling,
    SeededPrompt,
    ablate,
    increments,
    left_pad,
    normalised,
    parse_alphas,
    parse_position_sets,
    prompt_batches,
    read_replies,
    response_logprob,
    row_seed,
    steer,
    steered_steps,
    steered_tokens,
    until_end_of_text,
)
from persona_nns.traits import (
    JudgeOptions,
    TraitUnit,
    check_unseen,
    judge_answers,
    load_direction,
    load_traits,
    read_responses,
)

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
figures = {"sweep": steering_sweep}
finish = judge_answers


@dataclass(frozen=True, eq=False)
class Steered(TraitUnit):
    """A question, or a row of given answers, to be run under every coefficient.

    Attributes:
        number: of the question or row.
        prompt: token ids, no system prompt.
        response: token ids of a given answer; None where the model is to answer.
        vector: [n_layers + 1, d_model].
        alphas: coefficients.
        position_sets: which tokens are steered.
    """

    number: int
    prompt: tuple[int, ...]
    response: tuple[int, ...] | None
    vector: Tensor
    alphas: tuple[float, ...]
    position_sets: tuple[str, ...]

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
    vector: FileName,
    vector_run: str | None = None,
    average: Average = "response_avg",
    trait: str | None = None,
    artifacts: FileName | None = None,
    split_seed: int | None = None,
    responses: FileName | None = None,
    alphas: str = "0,0.5,1,1.5,2,2.5,3",
    position_sets: str = "response",
    n_samples: Count = 1,
    judging: JudgeOptions,
) -> Plan:
    """Render what is run under steering.

    Args:
        tokenizer: the model's.
        model: label of the model.
        vector: a file (.npy, .pt, .safetensors, .gguf), or a store with trait_vectors; a store's
            other directions by name: STORE#axis, STORE#component:1, STORE#TRAIT.
        vector_run: which run, where the store has several.
        average: which average of a store's vectors.
        trait: a bundled trait, or one of the folder `artifacts`; for rows from a file, its stem.
        artifacts: folder with extraction/{trait}.json and evaluation/{trait}.json, or {trait}.json.
        split_seed: seed that divides the one list of questions of a {trait}.json into halves.
        responses: given answers (.jsonl, .jsonl.gz); by default the model answers and is judged.
        alphas: coefficients.
        position_sets: all, prompt (its last token included), response (from it on).
        n_samples: answers to each question.
        judging: the judge.
    """
    coefficients, tokens = parse_alphas(alphas), parse_position_sets(position_sets)
    name = trait or (stem_of(responses) if responses else "cheerful")
    found = load_direction(vector, model, trait=name, average=average, run=vector_run)
    direction = found.vectors
    content: dict[str, Any] = {"trait": name, "vector": direction.tolist()}
    if responses is not None:
        rows = read_responses(responses)
        shown = [(row.question, response_ids(tokenizer, row.response)) for row in rows]
        texts: list[Any] = [[row.question, row.response] for row in rows]
        axis = "row"
    else:
        asked = load_traits(name, "evaluation", artifacts, split_seed)[0]
        judging.check(name, asked.questions, tokenizer)
        check_unseen(asked, artifacts, found, split_seed)
        shown = [(question, None) for question in asked.questions]
        texts, axis = list(asked.questions), "question"
        content |= {"judge": judging.identity, "eval_prompt": asked.eval_prompt}
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
        unverifiable=judging.unverifiable if responses is None else "",
    )


def measure(
    model: TransformersModel,
    units: list[Steered],
    *,
    layers: list[int],
    n_samples: Count = 1,
    sampling: NucleusSampling,
    reuse: bool = True,
) -> dict[str, Tensor]:
    """Steer.

    Args:
        model: from `load_model`.
        units: questions, or rows of given answers.
        layers: where the vector is added.
        n_samples: answers to each question.
        sampling: how they are drawn.
        reuse: run the blocks below the steered layer once; of what is said, each token once.
    """
    if units[0].response is not None:
        return teacher_force(model, units, layers, reuse=reuse)
    prompts = [
        SteeredPrompt(unit.prompt, row_seed(unit.trait, unit.number, sample), alpha, tokens)
        for unit in units
        for alpha, tokens in unit.conditions
        for sample in range(n_samples)
    ]
    vector = units[0].vector.to(model.device)
    said = torch.stack(
        [answer(model, layer, vector[layer], prompts, sampling, reuse=reuse) for layer in layers]
    )
    # [layer, question, α, position set, sample, token], the question first
    shape = (len(units), len(units[0].alphas), len(units[0].position_sets), n_samples)
    return {"said": said.unflatten(1, shape).transpose(0, 1)}


@dataclass(frozen=True)
class SteeredPrompt(SeededPrompt):
    """A prompt that is answered with α v added at the tokens of a position set."""

    alpha: float
    tokens: str


def answer(
    model: TransformersModel,
    layer: int,
    direction: Tensor,
    prompts: Sequence[SteeredPrompt],
    sampling: NucleusSampling,
    *,
    reuse: bool,
) -> Tensor:
    """What the model says while it is steered at a layer, [row, token], −1 after the end."""
    said = torch.full((len(prompts), sampling.max_new_tokens), -1)
    for rows, batch, settings in prompt_batches(prompts, sampling, device=model.device):
        alpha = torch.tensor([[prompts[row].alpha] for row in rows], device=model.device)
        tokens = [prompts[row].tokens for row in rows]
        first = alpha * steered_tokens(batch.attention_mask, 0, tokens)
        later = alpha * steered_steps(tokens).to(model.device)
        settings["use_cache"] = reuse
        with until_end_of_text(), model.generate(**settings) as tracer:
            with tracer.invoke(batch.tokens):
                for step in tracer.iter[:]:
                    strength = first if step == 0 else later
                    if not reuse:  # what was said before runs again
                        strength = torch.cat([first] + [later] * step, dim=1)
                    hidden = model.layers[layer].input
                    model.layers[layer].input = steer(hidden, direction, strength)
            with tracer.invoke():
                generated = save(tracer.result)
        said[rows] = read_replies(model, generated, batch, sampling)
    return said


def teacher_force(
    model: TransformersModel, units: Sequence[Steered], layers: list[int], *, reuse: bool
) -> dict[str, Tensor]:
    """Log-probabilities of given answers under every kind of steering."""
    vector = units[0].vector.to(model.device)
    given = read_given(model, units)
    score = partial(logprob, model, given, reuse=reuse)
    at_layer: list[Tensor] = []
    at_all: list[Tensor] = []
    for alpha, tokens in units[0].conditions:
        mask, sets = given.inputs["attention_mask"], [tokens] * len(units)
        add = partial(steer, strength=alpha * steered_tokens(mask, given.n_response, sets))
        edits = [{layer: partial(add, direction=vector[layer])} for layer in layers]
        at_layer.append(torch.stack([score(each) for each in edits], 1))
        steps = enumerate(increments(vector))
        at_all.append(score({layer: partial(add, direction=step) for layer, step in steps}))
    direction = normalised(vector)
    edits = [{layer: partial(ablate, direction=direction[layer])} for layer in layers]
    shape = (len(units[0].alphas), len(units[0].position_sets))
    return {
        "logp": torch.stack(at_layer, -1).unflatten(-1, shape),
        "logp_all_layers": torch.stack(at_all, -1).unflatten(-1, shape),
        "logp_ablate": torch.stack([score(each) for each in edits], 1),
    }


@dataclass(frozen=True)
class Given:
    """Answers that are scored.

    Attributes:
        inputs: what the model takes: prompts and answers, padded on the left.
        response: token ids of the answers, right-aligned, [row, column].
        n_response: how many of them are a row's answer, [row].
        clean: what enters each block without steering, [row, column, d_model].
    """

    inputs: dict[str, Any]
    response: Tensor
    n_response: Tensor
    clean: list[Tensor]


def read_given(model: TransformersModel, units: Sequence[Steered]) -> Given:
    """Run the answers without steering, to go on from at the steered layer."""
    answers = [unit.response or () for unit in units]
    rows = [(*unit.prompt, *answer) for unit, answer in zip(units, answers, strict=True)]
    padded = left_pad(rows, device=model.device)
    n_response = torch.tensor([len(answer) for answer in answers], device=model.device)
    inputs = {**padded.tokens, "position_ids": padded.position_ids, "use_cache": False}
    with model.trace(inputs, logits_to_keep=1):
        clean = save([block.input for block in model.layers])
    response = padded.input_ids[:, padded.width - int(n_response.max()) :]
    return Given(inputs, response, n_response, clean)


def logprob(
    model: TransformersModel,
    given: Given,
    edits: dict[int, Callable[[Tensor], Tensor]],
    *,
    reuse: bool,
) -> Tensor:
    """Log-probability of each answer while the inputs of some blocks are edited, [row]."""
    first = min(edits)
    with model.trace(given.inputs, logits_to_keep=given.response.shape[1] + 1):
        if reuse:
            for block in model.layers[:first]:
                block.skip(given.clean[first])
        for layer, edit in edits.items():
            model.layers[layer].input = edit(model.layers[layer].input)
        logits = model.output.logits[:, :-1]
        scored = save(response_logprob(logits, given.response, given.n_response))
    return scored.cpu()
