"""What does adding a trait vector do? Sweeps over layer, coefficient and steered tokens.

h_L + α v_L at the input of block L, at all tokens, at the prompt's, or from the last prompt token
on. Without `responses`: the model answers the held-out evaluation questions while it is steered,
and the answers are judged. With `responses`: the log-probability of given answers under steering,
under steering in every block at once by the increments v_L − v_{L−1}, with the direction taken
out at one layer ("Persona Vectors", arXiv 2507.21509), and with what lies above τ along it cut off
at every layer of a set ("The Assistant Axis", arXiv 2601.10387). Receipts say what it costs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nnsight import TransformersModel, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_nns.declarations import Count, FileName, Plan, Variable, content_digest
from persona_nns.figures import capping_curves, receipts_figure, steering_sweep
from persona_nns.prompts import render_chat, response_ids, stem_of
from persona_nns.runs import run
from persona_nns.tracing import (
    Average,
    Given,
    NucleusSampling,
    SeededPrompt,
    draws,
    entry,
    parse_alphas,
    parse_position_sets,
    read_given,
    row_seed,
    steer,
    steer_on_sphere,
    steered_steps,
    steered_tokens,
    until_end_of_text,
)
from persona_nns.traits import (
    NEUTRAL_QUESTIONS,
    Edits,
    JudgeOptions,
    Operations,
    Steered,
    check_unseen,
    judge_answers,
    label_sets,
    load_direction,
    load_traits,
    moves_against,
    needs_projections,
    operate,
    read_responses,
    receipts_of,
    strength_of,
    swept,
)

protocol_version = 1
defaults = {"layers": "all", "layer_sets": ""}

_SCORED = "trait layer alpha position_set question sample"
_SWEEP = "layer alpha position_set"
_CAPPED = "layer_set tau position_set"
_SETS = {"layer_set": lambda _, parameters: label_sets(parameters["layer_sets"])}
#: What is done to given answers: the end of its variables' names → dimensions, what it is.
_DONE = {
    "": (_SWEEP, "h_L + α v_L"),
    "_all_layers": ("alpha position_set", "α(v_L − v_{L−1}) added at every block"),
    "_random": (_SWEEP, "α times a random direction of the norm of v_L added"),
    "_ablate": ("layer", "h − (h·v̂)v̂ at one layer, at all tokens"),
    "_cap": (_CAPPED, "h − max(0, h·v̂ − τ)v̂ at every layer of a set"),
}
_OF_OPERATION = {"add": ("", "_all_layers"), "ablate": ("_ablate",), "cap": ("_cap",)}
_judged = partial(Variable, _SCORED, judged=True)
variables = {
    "score": _judged(
        "trait score",
        description="The judge's 0–100 for the answer of the steered model; NaN where it refuses.",
    ),
    "coherence": _judged("coherence", description="The judge's 0–100; NaN where it refuses."),
    "response": Variable(_SCORED, "response", description="What it said.", kind="text"),
    **{
        f"logp{end}": Variable(
            f"trait row {dims}",
            "log-probability of the response",
            units="nat",
            description=f"Sum over response tokens, teacher-forced, no system prompt; {done}.",
            coords=_SETS if dims == _CAPPED else {},
        )
        for end, (dims, done) in _DONE.items()
    },
    "tau_value": Variable(
        "trait tau layer",
        "threshold τ",
        description="Of a percentile, that of the given answers' own projections on v̂ there; of "
        "inf, the largest number.",
        every_layer=True,
    ),
    "logp_none": Variable(
        "trait row",
        "log-probability, nothing done",
        units="nat",
        description="Sum over response tokens, teacher-forced, no system prompt.",
    ),
    "against": Variable(
        f"trait row {_SWEEP}",
        "moves against the direction",
        description="1 where α v_L makes an answer with the trait (pos) less likely, or one "
        "without it more likely (α < 0: the other way round), else 0; NaN at α = 0. Its mean is "
        "the share of answers that do.",
    ),
    "strength": Variable(
        "trait layer alpha",
        "α‖v‖ / gap",
        description="In units of ‖mean(pos) − mean(neg)‖ there; NaN where the vector's source does "
        "not tell the means.",
    ),
    **{
        f"kl_neutral{end}": Variable(
            f"trait neutral {dims}",
            "KL on neutral prompts",
            units="nat",
            description=f"KL(unsteered ‖ steered) at the last prompt token; {done}.",
            coords=_SETS if dims == _CAPPED else {},
        )
        for end, (dims, done) in _DONE.items()
    },
}
_GENERATED = ("score", "coherence", "response")
figures = {"sweep": steering_sweep, "cap": capping_curves, "receipts": receipts_figure}
finish = judge_answers


def prepares(options: Mapping[str, Any]) -> bool:
    """Whether thresholds are percentiles of projections that have to be measured before."""
    return needs_projections(options)


def prepare(
    model: TransformersModel, store: str | Path, options: dict[str, Any], *, progress: bool
) -> dict[str, Any]:
    """Have the projections measured that thresholds are percentiles of; once, and stored."""
    if not prepares(options):
        return options
    names = ("vector", "vector_run", "average", "trait", "responses")
    asked = {name: options[name] for name in names if name in options}
    found = run("trait_projections", model, store=store, progress=progress, **asked)
    return {**options, "projections": str(store), "projections_run": found.attrs["run"]}


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
    doing: Operations,
    judging: JudgeOptions,
) -> Plan:
    """Render what is run under steering.

    Args:
        tokenizer: the model's.
        model: label of the model.
        vector: a file (.npy, .pt, .safetensors, .gguf), or a store with trait_vectors; a store's
            other directions by name: STORE#axis, STORE#component:0, STORE#TRAIT.
        vector_run: which run, where the store has several.
        average: which average of a store's vectors.
        trait: a bundled trait, or one of the folder `artifacts`; for rows from a file, its stem.
        artifacts: folder with extraction/{trait}.json and evaluation/{trait}.json, or {trait}.json.
        split_seed: seed that divides the one list of questions of a {trait}.json into halves.
        responses: given answers (.jsonl, .jsonl.gz); by default the model answers and is judged.
        alphas: coefficients.
        position_sets: all, prompt (its last token included), response (from it on).
        n_samples: answers to each question.
        doing: what is done.
        judging: the judge.
    """
    doing.check(given=responses is not None)
    coefficients, tokens = parse_alphas(alphas), parse_position_sets(position_sets)
    name = trait or (stem_of(responses) if responses else "cheerful")
    found = load_direction(vector, model, trait=name, average=average, run=vector_run)
    direction, receipts = found.vectors, None
    content: dict[str, Any] = {"trait": name, **doing.content}
    own: dict[str, Any] = {}
    coords: dict[str, Any] = {}
    if responses is not None:
        rows = read_responses(responses)
        shown = [(row.question, response_ids(tokenizer, row.response)) for row in rows]
        texts: list[Any] = [[row.question, row.response] for row in rows]
        labels = [row.label for row in rows]
        if doing.labels:
            own["tau"] = list(doing.labels)
        if doing.labels or doing.receipts:
            content["labels"], coords["row_label"] = labels, ("row", labels)
        if doing.receipts:
            receipts, content["receipts"] = receipts_of(found, tokenizer), NEUTRAL_QUESTIONS
            own["neutral"] = list(range(len(NEUTRAL_QUESTIONS)))
            coords["neutral_text"] = ("neutral", NEUTRAL_QUESTIONS)
    else:
        asked = load_traits(name, "evaluation", artifacts, split_seed)[0]
        judging.check(name, asked.questions, tokenizer)
        check_unseen(asked, artifacts, found, split_seed)
        shown = [(question, None) for question in asked.questions]
        texts, labels = list(asked.questions), [None] * len(shown)
        content |= {"judge": judging.identity, "eval_prompt": asked.eval_prompt}
        own["sample"] = list(range(n_samples))
    axis = "question" if responses is None else "row"
    thresholds = doing.thresholds(len(direction) - 1)
    done = (doing.names, doing.norm_preserving, thresholds, receipts)
    units = [
        Steered(name, number, render_chat(tokenizer, question).ids, response, direction,
                coefficients, tokens, *done, label)
        for number, ((question, response), label) in enumerate(zip(shown, labels, strict=True))
    ]  # fmt: skip
    content |= {"texts": texts, "alphas": coefficients, "position_sets": tokens}
    return Plan(
        name=name,
        units=units,
        axes={
            "trait": [name],
            axis: list(range(len(units))),
            "alpha": list(coefficients),
            "position_set": list(tokens),
            **own,
        },
        unit_axes=("trait", axis),
        content={**content, "vector": content_digest(direction.tolist())},
        token_ids={
            unit.label: {"prompt": unit.prompt, "response": unit.response or ()} for unit in units
        },
        digest=content_digest(content),
        coords={"question_text": (axis, [question for question, _ in shown]), **coords},
        attrs={"vector_source": vector, "average": average},
        variables=_GENERATED if responses is None else measured_of(doing),
        width=(direction.shape[0] - 1, direction.shape[1]),
        batch_size=10,
        unverifiable=judging.unverifiable if responses is None else "",
    )


def measured_of(doing: Operations) -> list[str]:
    """The variables that given answers have."""
    ends = [end for name in doing.names for end in _OF_OPERATION[name]]
    adds, caps = "add" in doing.names, "cap" in doing.names
    ends += ["_random"] if adds and doing.receipts else []
    names = [f"logp{end}" for end in ends] + ["tau_value"] * caps
    if doing.receipts:
        names += ["logp_none", *(f"kl_neutral{end}" for end in ends)]
        names += ["against", "strength"] * adds
    return names


def measure(
    model: TransformersModel,
    units: list[Steered],
    *,
    layers: list[int],
    layer_sets: Sequence[list[int]] = (),
    n_samples: Count = 1,
    sampling: NucleusSampling,
    reuse: bool = True,
) -> dict[str, Tensor]:
    """Steer.

    Args:
        model: from `load_model`.
        units: questions, or rows of given answers.
        layers: where the vector is added, or taken away.
        layer_sets: sets of layers that are capped together.
        n_samples: answers to each question.
        sampling: how they are drawn.
        reuse: run the blocks below the steered layer once; of what is said, each token once.
    """
    if units[0].response is not None:
        return teacher_force(model, units, layers, layer_sets, reuse=reuse)
    prompts = [
        SteeredPrompt(unit.prompt, row_seed(unit.trait, unit.number, sample), alpha, tokens)
        for unit in units
        for alpha, tokens in unit.conditions
        for sample in range(n_samples)
    ]
    vector = units[0].vector.to(model.device)
    add = steer_on_sphere if units[0].norm_preserving else steer
    said = [
        answer(model, layer, vector[layer], prompts, sampling, reuse=reuse, add=add)
        for layer in layers
    ]
    # [layer, question, α, position set, sample, token], the question first
    shape = (len(units), len(units[0].alphas), len(units[0].position_sets), n_samples)
    return {"said": torch.stack(said).unflatten(1, shape).transpose(0, 1)}


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
    add: Callable[[Tensor, Tensor, Tensor], Tensor] = steer,
) -> Tensor:
    """What the model says while it is steered at a layer, [row, token], −1 after the end."""
    said = torch.full((len(prompts), sampling.max_new_tokens), -1)
    site = entry(model, layer)
    for rows, draw in draws(model, prompts, sampling):
        alpha = torch.tensor([[prompts[row].alpha] for row in rows], device=model.device)
        tokens = [prompts[row].tokens for row in rows]
        first = alpha * steered_tokens(draw.batch.attention_mask, 0, tokens)
        later = alpha * steered_steps(tokens).to(model.device)
        while draw.unfinished:
            with until_end_of_text(), model.generate(**draw.settings(cached=reuse)) as tracer:
                with tracer.invoke(draw.tokens):
                    for step in tracer.iter[:]:
                        hidden = site.output  # of all tokens so far, or of the last alone
                        strength = torch.cat([first] + [later] * (draw.n_said + step), dim=1)
                        site.output = add(hidden, direction, strength[:, -hidden.shape[1] :])
                with tracer.invoke():
                    generated = save(tracer.result)
            draw.add(generated)
        said[rows] = draw.replies()
    return said


def teacher_force(
    model: TransformersModel,
    units: Sequence[Steered],
    layers: list[int],
    layer_sets: Sequence[list[int]],
    *,
    reuse: bool,
) -> dict[str, Tensor]:
    """Log-probabilities of given answers under each operation, and its receipts."""
    unit, answers = units[0], [each.response or () for each in units]
    given = read_given(model, [each.prompt for each in units], answers)
    score = partial(under, model, given, given.logprob, reuse=reuse)
    done, each_unit = operate(unit, given, layers, layer_sets), (len(units), -1, -1)
    measured = {f"logp{end}": swept(score, *of) for end, of in done.items()}
    if unit.thresholds is not None and "cap" in unit.operations:
        measured["tau_value"] = unit.thresholds.expand(each_unit)
    if unit.receipts is None:
        return measured
    neutral = read_given(model, unit.receipts.neutral, [()] * len(unit.receipts.neutral))
    diverge = partial(under, model, neutral, neutral.divergence, reuse=reuse)
    for end, of in operate(unit, neutral, layers, layer_sets).items():
        apart = swept(diverge, *of)
        measured[f"kl_neutral{end}"] = apart.expand(len(units), *apart.shape)
    measured["logp_none"] = score({})
    if "add" in unit.operations:
        alphas = torch.tensor(unit.alphas)
        effect = measured["logp"] - measured["logp_none"][:, None, None, None]
        shows = torch.tensor([1.0 if each.shows == "pos" else -1.0 for each in units])
        measured["against"] = moves_against(effect, shows, alphas)
        strength = strength_of(unit.vector, unit.receipts.gap, alphas)[layers]
        measured["strength"] = strength.expand(each_unit)
    return measured


def under(
    model: TransformersModel,
    given: Given,
    read: Callable[[Tensor], Tensor],
    edits: Edits,
    *,
    reuse: bool,
) -> Tensor:
    """What is read from the logits while the inputs of some blocks are edited, [row]."""
    first = min(edits, default=0)
    with model.trace(given.inputs, logits_to_keep=given.response.shape[1] + 1):
        if reuse:
            for block in model.layers[:first]:
                block.skip(given.clean[first])
        for layer, edit in edits.items():
            model.layers[layer].input = edit(model.layers[layer].input)
        found = save(read(model.output.logits))
    return found.cpu()
