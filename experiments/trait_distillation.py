"""Can the weights learn what steering does? Students distilled from the steered model.

The teacher is the model with α v_L added at one layer. It answers the extraction questions; a
student, the same model with low-rank adapters or with all its weights free, is trained without
steering to give the teacher's distribution at every token of those answers. Baseline, teacher and
students then answer the held-out evaluation questions and are judged, and each student's KL to the
teacher is measured token by token on what the teacher says to those.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
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
from persona_nns.errors import UsageError
from persona_nns.figures import distillation_curves, token_kl_figure
from persona_nns.models import hosted, record_of
from persona_nns.prompts import render_chat
from persona_nns.tracing import (
    RowSampler,
    end_tokens,
    left_pad,
    parse_position_sets,
    read_continuation,
    row_seed,
    similar_rows,
    steer,
    steered_steps,
    steered_tokens,
    until_end_of_text,
)
from persona_nns.traits import (
    JudgeChoice,
    Training,
    Trajectory,
    check_held_out,
    collate,
    judge_tokens,
    load_traits,
    load_vector,
    new_student,
    parse_counts,
    parse_students,
    predicting_logits,
    token_kl,
    train,
    trained_parameters,
)

protocol_version = 1

_SCORED = "trait condition question sample"
variables = {
    "score": Variable(
        _SCORED,
        "trait score",
        description="The judge's 0–100 on held-out questions; NaN where it refuses.",
    ),
    "coherence": Variable(
        _SCORED, "coherence", description="The judge's 0–100; NaN where it refuses."
    ),
    "token_kl": Variable(
        "trait condition question token",
        "KL(teacher ‖ student)",
        units="nat",
        description="At each token of what the teacher says to the held-out questions.",
    ),
    "kl": Variable(
        "trait condition",
        "mean KL(teacher ‖ student)",
        units="nat",
        description="Mean over all tokens of what the teacher says to the held-out questions; "
        "the baseline's is where every student starts.",
    ),
    "training_kl": Variable(
        "trait condition step",
        "training KL(teacher ‖ student)",
        units="nat",
        description="Mean over the response tokens of the batch of a training step; with the "
        "checkpoint's own dropout, where it has any.",
    ),
    "trained_parameters": Variable(
        "trait condition", "trained parameters", description="Numbers trained.", kind="int"
    ),
    "response": Variable(_SCORED, "response", description="What was said.", kind="text"),
    "teacher_token": Variable(
        "trait condition question token",
        "token",
        description="Id of the teacher's token that `token_kl` belongs to; −1 after the end.",
        kind="int",
    ),
}


def curves(results: xr.Dataset) -> Figure:
    """Scores by student, and against the number of trajectories."""
    return distillation_curves(results)


def kl_by_token(results: xr.Dataset) -> Figure:
    """Where in the answer the students fall short."""
    return token_kl_figure(results)


figures = {"curves": curves, "kl_by_token": kl_by_token}


@dataclass(frozen=True, eq=False)
class Teacher:
    """The steering that is to be distilled, and the questions.

    Attributes:
        trait: the trait's name.
        vector: what is added, [d_model], α included.
        layer: where.
        tokens: which tokens are steered.
        seen: prompts that students are trained on, token ids.
        held_out: prompts that they are evaluated on.
    """

    trait: str
    vector: Tensor
    layer: int
    tokens: str
    seen: tuple[tuple[int, ...], ...]
    held_out: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Condition:
    """The untouched model, the teacher, or a student.

    Attributes:
        teacher: what the student is trained on.
        student: ``baseline``, ``steered``, ``r8``, …, ``full``.
        n_trajectories: how many it is trained on; 0 for those that are not trained.
    """

    teacher: Teacher
    student: str
    n_trajectories: int

    @property
    def label(self) -> str:
        """``baseline``, ``steered``, ``r16/500``."""
        return f"{self.student}/{self.n_trajectories}" if self.n_trajectories else self.student

    @property
    def place(self) -> dict[str, Any]:
        """Where it stands in the result."""
        return {"trait": self.teacher.trait, "condition": self.label}


@dataclass(frozen=True)
class Asked:
    """A prompt, and what its answer's random draws are known by."""

    prompt: tuple[int, ...]
    key: str


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        max_new_tokens: the longest answer.
        temperature: 0 is greedy.
        top_p: the most likely tokens that together have this probability.
    """

    max_new_tokens: int
    temperature: float
    top_p: float

    def settings(self, trait: str, asked: Sequence[Asked]) -> dict[str, Any]:
        """What `generate` takes, for a batch."""
        seeds = [row_seed(trait, each.key) for each in asked]
        sampler = RowSampler(seeds, self.temperature, self.top_p)
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": False,
            "num_beams": 1,
            "use_cache": True,
            "logits_processor": [sampler] if self.temperature else [],
        }


def prepare(
    model: TransformersModel,
    store: str | Path,  # noqa: ARG001
    options: dict[str, Any],
    *,
    progress: bool,  # noqa: ARG001
) -> dict[str, Any]:
    """See that the model is here: students are copies of its weights."""
    if hosted(model) is not None:
        raise UsageError("Students are trained on this machine; use the backend 'local'.")
    return options


def plan(
    tokenizer: PreTrainedTokenizerBase,
    *,
    model: str,
    vector: str,
    layer: Annotated[int, Field(ge=0)],
    alpha: float = 2.0,
    position_set: Literal["all", "prompt", "response"] = "response",
    vector_run: str | None = None,
    average: Literal["response_avg", "prompt_avg", "prompt_last"] = "response_avg",
    trait: str = "cheerful",
    artifacts: str | None = None,
    students: str = "r8,r16,r32,full",
    trajectories: str = "50,100,200,500,1000",
    curve: str = "r16",
    n_samples: Annotated[int, Field(ge=1)] = 10,
    steps: Annotated[int, Field(ge=1)] = 500,
    max_new_tokens: Annotated[int, Field(ge=1)] = 256,
    judge: str = "lexicon",
    judge_model: str = "gpt-4.1-mini",
    judge_prices: str = "",
) -> Plan:
    """Render the questions, and list baseline, teacher and students.

    Args:
        tokenizer: the model's.
        model: label of the model.
        vector: a file (.npy, .pt, .safetensors), or a store with trait_vectors.
        layer: where the teacher is steered.
        alpha: the teacher's coefficient.
        position_set: which tokens are steered.
        vector_run: which run of trait_vectors, where the store has several.
        average: which average of a store's vectors.
        trait: a bundled trait, or one of the folder `artifacts`.
        artifacts: folder with extraction/{trait}.json and evaluation/{trait}.json.
        students: r8, r16, … (LoRA of that rank) and full, on the most trajectories.
        trajectories: how many; fewer than the most are learnt from by one student only.
        curve: that student.
        n_samples: answers to each evaluation question.
        steps: optimiser steps.
        max_new_tokens: the longest answer.
        judge: lexicon, none, or the URL of an OpenAI-compatible endpoint.
        judge_model: the model there; its key is read from OPENAI_API_KEY.
        judge_prices: dollars for a million tokens sent and received, as 0.40,1.60.
    """
    seen = load_traits(trait, "extraction", artifacts)
    held_out = load_traits(trait, "evaluation", artifacts)
    check_held_out(seen, held_out)
    choice = JudgeChoice(judge, judge_model, judge_prices)
    choice.check(trait)
    names, counts = parse_students(students), parse_counts(trajectories)
    if len(counts) > 1:
        parse_students(curve)
    parse_position_sets(position_set)
    whole = load_vector(vector, trait, average, model, vector_run)
    if layer >= len(whole) - 1:
        raise UsageError(
            f"Layer {layer} is out of range: the vector has layers 0 to {len(whole) - 2}."
        )
    prompts = [
        tuple(render_chat(tokenizer, question).ids for question in split[0].questions)
        for split in (seen, held_out)
    ]
    teacher = Teacher(trait, alpha * whole[layer], layer, position_set, prompts[0], prompts[1])
    most = max(counts)
    trained = [(curve, count) for count in counts if count < most]
    trained += [(name, most) for name in names]
    units = [
        Condition(teacher, student, count)
        for student, count in [("baseline", 0), ("steered", 0), *trained]
    ]
    content = {
        "trait": trait,
        "questions": [seen[0].questions, held_out[0].questions],
        "eval_prompt": held_out[0].eval_prompt,
        "layer": layer,
        "alpha": alpha,
        "position_set": position_set,
        "judge": choice.identity,
        "conditions": [unit.label for unit in units],
    }
    return Plan(
        name=trait,
        units=units,
        axes={
            "trait": [trait],
            "condition": [unit.label for unit in units],
            "question": list(range(len(held_out[0].questions))),
            "sample": list(range(n_samples)),
            "token": list(range(max_new_tokens)),
            "step": list(range(1, steps + 1)),
        },
        unit_axes=("trait", "condition"),
        content={**content, "vector": content_digest(teacher.vector.tolist())},
        token_ids={
            "seen": {str(k): ids for k, ids in enumerate(teacher.seen)},
            "held_out": {str(k): ids for k, ids in enumerate(teacher.held_out)},
        },
        digest=content_digest(content),
        coords={
            "student": ("condition", [unit.student for unit in units]),
            "n_trajectories": ("condition", [unit.n_trajectories for unit in units]),
            "question_text": ("question", list(held_out[0].questions)),
        },
        attrs={"vector_source": vector, "average": average, "layer": layer, "alpha": alpha},
        width=(len(whole) - 1, whole.shape[1]),
        batch_size=1,
    )


def measure(
    model: TransformersModel,
    units: list[Condition],
    *,
    output: str = "stores/students",
    n_samples: Annotated[int, Field(ge=1)] = 10,
    max_new_tokens: Annotated[int, Field(ge=1)] = 256,
    temperature: Annotated[float, Field(ge=0)] = 1.0,
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95,
    steps: Annotated[int, Field(ge=1)] = 500,
    rows: Annotated[int, Field(ge=1)] = 2,
    accumulation: Annotated[int, Field(ge=1)] = 4,
    lora_learning_rate: Annotated[float, Field(gt=0)] = 2e-4,
    full_learning_rate: Annotated[float, Field(gt=0)] = 2e-5,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Train students and compare them with their teacher.

    Args:
        model: from `load_model`, on this machine.
        units: baseline, teacher and students.
        output: folder of the students: an adapter or a whole model each.
        n_samples: answers to each evaluation question.
        max_new_tokens: the longest answer.
        temperature: 1 samples from the model; 0 is greedy.
        top_p: sample from the most likely tokens that together have this probability.
        steps: optimiser steps.
        rows: trajectories of a pass.
        accumulation: passes of a step.
        lora_learning_rate: highest, for low-rank students.
        full_learning_rate: highest, for the student with all weights.
        seed: of new weights and of the order of the trajectories.
    """
    teacher = units[0].teacher
    sampling = Sampling(max_new_tokens, temperature, top_p)
    home = Path(output) / _folder_name(model, teacher, sampling)
    questions = range(len(teacher.held_out))
    asked = [
        Asked(teacher.held_out[question], f"{question}/{sample}")
        for question in questions
        for sample in range(n_samples)
    ]
    # What the teacher says to the held-out questions, on which each student's KL is measured.
    reference = generate_steered(
        model,
        teacher,
        [Asked(teacher.held_out[question], f"reference/{question}") for question in questions],
        sampling,
    )

    results: dict[str, list[Tensor]] = defaultdict(list)
    for unit in units:
        student: Any = model._module
        losses = [math.nan] * steps
        if unit.n_trajectories:
            trajectories = sample_trajectories(model, teacher, unit.n_trajectories, sampling, home)
            rate = full_learning_rate if unit.student == "full" else lora_learning_rate
            training = Training(steps, rows, accumulation, rate, seed)
            folder = home / f"{unit.student}-{unit.n_trajectories}-{_digest(training)}"
            record = record_of(model)
            student = new_student(record.source, unit.student, record.precision, seed)
            student.to(model.device)
            losses = train(
                student,
                trajectories,
                lambda inputs: teacher_logits(model, teacher, inputs),
                training,
                folder / "checkpoints",
                device=model.device,
            )
            student.save_pretrained(folder)
            model.tokenizer.save_pretrained(folder)
        if unit.student == "steered":
            said = generate_steered(model, teacher, asked, sampling)
        else:
            said = generate(model, student, teacher.trait, asked, sampling)
        kl = compare(model, teacher, None if unit.student == "steered" else student, reference)
        results["said"].append(said.view(len(questions), n_samples, max_new_tokens))
        results["token_kl"].append(kl)
        results["kl"].append(kl.nanmean())
        results["teacher_token"].append(reference)
        results["training_kl"].append(torch.tensor(losses))
        results["trained_parameters"].append(torch.tensor(trained_parameters(student)))
    return {name: torch.stack(values) for name, values in results.items()}


def sample_trajectories(
    model: TransformersModel, teacher: Teacher, n: int, sampling: Sampling, home: Path
) -> list[Trajectory]:
    """What the teacher says to the extraction questions, in turn; kept in a file."""
    file = home / "trajectories.jsonl"
    kept = read_trajectories(file)
    if len(kept) < n:
        asked = [
            Asked(teacher.seen[k % len(teacher.seen)], f"trajectory/{k}")
            for k in range(len(kept), n)
        ]
        kept += as_trajectories(asked, generate_steered(model, teacher, asked, sampling))
        write_trajectories(kept, file)
    return kept[:n]


def generate_steered(
    model: TransformersModel, teacher: Teacher, asked: Sequence[Asked], sampling: Sampling
) -> Tensor:
    """What the teacher says, [row, token], −1 after the end."""
    n_tokens = sampling.max_new_tokens
    said = torch.full((len(asked), n_tokens), -1)
    vector = teacher.vector.to(model.device)
    for batch in similar_rows([len(each.prompt) + n_tokens for each in asked]):
        padded = left_pad([asked[row].prompt for row in batch], device=model.device)
        tokens = [teacher.tokens] * len(batch)
        n_response = torch.zeros(len(batch), dtype=torch.long, device=model.device)
        strength = steered_tokens(padded.attention_mask, n_response, tokens)
        later = steered_steps(tokens).to(model.device)
        settings = sampling.settings(teacher.trait, [asked[row] for row in batch])
        with until_end_of_text(), model.generate(**settings) as tracer:
            with tracer.invoke(padded.tokens):
                for step in tracer.iter[:]:
                    hidden = model.layers[teacher.layer].input
                    model.layers[teacher.layer].input = steer(
                        hidden, vector, strength if step == 0 else later
                    )
            with tracer.invoke():
                generated = save(tracer.result)
        answer = read_continuation(
            generated, padded.input_ids.shape[1], n_tokens, end_tokens(model)
        )
        said[batch] = answer.until_end().cpu()
    return said


def teacher_logits(
    model: TransformersModel, teacher: Teacher, inputs: Mapping[str, Tensor]
) -> Tensor:
    """The steered model's logits for the response columns of a batch from `collate`."""
    is_response = inputs["is_response"]
    strength = steered_tokens(
        inputs["attention_mask"], is_response.sum(1), [teacher.tokens] * len(is_response)
    )
    shown = {name: tensor for name, tensor in inputs.items() if name != "is_response"}
    vector = teacher.vector.to(model.device)
    with model.trace({**shown, "use_cache": False}, logits_to_keep=is_response.shape[1] + 1):
        model.layers[teacher.layer].input = steer(
            model.layers[teacher.layer].input, vector, strength
        )
        logits = save(model.output.logits[:, :-1])
    return logits  # noqa: RET504 - there only once the trace has run


def generate(
    model: TransformersModel,
    student: Any,
    trait: str,
    asked: Sequence[Asked],
    sampling: Sampling,
) -> Tensor:
    """What a student (or the model itself) says without steering, [row, token], −1 at the end."""
    n_tokens = sampling.max_new_tokens
    said = torch.full((len(asked), n_tokens), -1)
    for batch in similar_rows([len(each.prompt) + n_tokens for each in asked]):
        padded = left_pad([asked[row].prompt for row in batch], device=model.device)
        settings = sampling.settings(trait, [asked[row] for row in batch])
        with torch.inference_mode():
            generated = student.generate(**padded.tokens, **settings)
        answer = read_continuation(
            generated, padded.input_ids.shape[1], n_tokens, end_tokens(model)
        )
        said[batch] = answer.until_end().cpu()
    return said


def compare(model: TransformersModel, teacher: Teacher, student: Any, reference: Tensor) -> Tensor:
    """KL(teacher ‖ student) at each token of what the teacher said, [row, token].

    Args:
        model: from `load_model`.
        teacher: its steering.
        student: a plain model; None compares the teacher with itself.
        reference: what the teacher said to the held-out questions, [row, token].
    """
    trajectories = as_trajectories([Asked(each, "") for each in teacher.held_out], reference)
    kl = torch.full(reference.shape, torch.nan)
    lengths = [len(each.prompt) + len(each.response) for each in trajectories]
    for batch in similar_rows(lengths):
        inputs = {
            name: tensor.to(model.device)
            for name, tensor in collate([trajectories[row] for row in batch]).items()
        }
        expected = teacher_logits(model, teacher, inputs)
        with torch.inference_mode():
            given = expected if student is None else predicting_logits(student, inputs)
            found = token_kl(expected, given).cpu()
        for place, row in enumerate(batch):  # right-aligned here, left-aligned in the result
            n_tokens = len(trajectories[row].response)
            kl[row, :n_tokens] = found[place, found.shape[1] - n_tokens :]
    return kl


def as_trajectories(asked: Sequence[Asked], said: Tensor) -> list[Trajectory]:
    """Prompts with what was said to them."""
    return [
        Trajectory(each.prompt, tuple(token for token in row if token >= 0))
        for each, row in zip(asked, said.tolist(), strict=True)
    ]


def write_trajectories(trajectories: Sequence[Trajectory], file: Path) -> None:
    """Keep trajectories as JSONL; the file appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text("".join(f"{json.dumps(vars(each))}\n" for each in trajectories))
    part.replace(file)


def read_trajectories(file: Path) -> list[Trajectory]:
    """The trajectories that are kept; none where there is no file."""
    if not file.is_file():
        return []
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [Trajectory(tuple(row["prompt"]), tuple(row["response"])) for row in rows]


def _folder_name(model: TransformersModel, teacher: Teacher, sampling: Sampling) -> str:
    record = record_of(model)
    determining = [record.version, record.precision, teacher.vector.tolist(), teacher.layer]
    digest = content_digest([*determining, teacher.tokens, teacher.seen, vars(sampling)])[:10]
    return f"{record.label.replace('/', '--')}-{teacher.trait}-{digest}"


def _digest(training: Training) -> str:
    return content_digest(list(vars(training).values()))[:8]


def finish(
    tokenizer: PreTrainedTokenizerBase,
    units: list[Condition],
    measured: dict[str, Tensor],
    *,
    artifacts: str | None,
    judge: str,
    judge_model: str,
    judge_prices: str,
) -> dict[str, Any]:
    """Decode and judge the answers."""
    asked = load_traits(units[0].teacher.trait, "evaluation", artifacts)[0]
    judged = judge_tokens(
        tokenizer,
        asked,
        list(asked.questions) * len(units),
        measured["said"].flatten(0, 1),
        JudgeChoice(judge, judge_model, judge_prices),
    )
    shape = measured["said"].shape[:-1]
    scored = {name: values.reshape(shape) for name, values in judged.items()}
    return {name: values for name, values in measured.items() if name != "said"} | scored
