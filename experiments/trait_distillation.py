"""Can the weights learn what steering does? Students distilled from the steered model.

The teacher is the model with α v_L added at one layer. It answers the extraction questions; a
student, the same model with low-rank adapters or with all its weights free, is trained without
steering to give the teacher's distribution at every token of those answers. Baseline, teacher and
students then answer the held-out evaluation questions and are judged, and each student's KL to the
teacher is measured token by token on what the teacher says to those. Low-rank adapters need peft:
``pip install 'persona-nns[distill]'``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from nnsight import TransformersModel, save
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_nns.declarations import Count, FileName, OutputFolder, Plan, Variable, content_digest
from persona_nns.errors import UsageError
from persona_nns.figures import distillation_curves, token_kl_figure
from persona_nns.models import record_of, require_peft
from persona_nns.prompts import render_chat
from persona_nns.tracing import (
    Average,
    NucleusSampling,
    SeededPrompt,
    draws,
    entry,
    row_seed,
    steer,
    steered_steps,
    steered_tokens,
    until_end_of_text,
)
from persona_nns.traits import (
    JudgeOptions,
    TrainingOptions,
    TraitOptions,
    Trajectory,
    as_trajectories,
    check_held_out,
    check_trainable,
    check_unseen,
    distil,
    judge_answers,
    keep_trajectories,
    load_direction,
    parse_counts,
    parse_students,
    per_token_kl,
    student_replies,
    students_folder,
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
figures = {"curves": distillation_curves, "kl_by_token": token_kl_figure}
finish = judge_answers
_SAMPLING = NucleusSampling(top_p=0.95)


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

    def ask(self, prompt: tuple[int, ...], key: str) -> SeededPrompt:
        """A prompt whose answer's random draws are known by a key."""
        return SeededPrompt(prompt, row_seed(self.trait, key))


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


def prepare(
    model: TransformersModel, _store: str | Path, options: dict[str, Any], **_progress: bool
) -> dict[str, Any]:
    """See that the model is here: students are copies of its weights."""
    check_trainable(model)
    return options


def plan(
    tokenizer: PreTrainedTokenizerBase,
    *,
    model: str,
    vector: FileName,
    layer: Annotated[int, Field(ge=0)],
    alpha: float = 2.0,
    position_set: Literal["all", "prompt", "response"] = "response",
    vector_run: str | None = None,
    average: Average = "response_avg",
    chosen: TraitOptions,
    students: str = "r8,r16,r32,full",
    trajectories: str = "50,100,200,500,1000",
    curve: str = "r16",
    n_samples: Count = 10,
    steps: Count = 500,
    max_new_tokens: Count = 256,
    judging: JudgeOptions,
) -> Plan:
    """Render the questions, and list baseline, teacher and students.

    Args:
        tokenizer: the model's.
        model: label of the model.
        vector: a file (.npy, .pt, .safetensors, .gguf), or STORE, STORE#axis, STORE#TRAIT, …
        layer: where the teacher is steered.
        alpha: its coefficient.
        position_set: which tokens are steered.
        vector_run: which run, where the store has several.
        average: which average of a store's vectors.
        chosen: the trait.
        students: r8, r16, … (LoRA of that rank) and full, on the most trajectories.
        trajectories: how many; fewer than the most are learnt from by one student only.
        curve: that student.
        n_samples: answers to each evaluation question.
        steps: optimiser steps.
        max_new_tokens: the longest answer.
        judging: the judge.
    """
    trait, seen, held_out = chosen.trait, chosen.load("extraction"), chosen.load("evaluation")
    check_held_out([seen], [held_out])
    judging.check(trait, held_out.questions, tokenizer)
    names, counts = parse_students(students), parse_counts(trajectories)
    if len(counts) > 1:
        parse_students(curve)
    found = load_direction(vector, model, trait=trait, average=average, run=vector_run)
    check_unseen(held_out, chosen.artifacts, found, chosen.split_seed)
    if layer >= len(found.vectors) - 1:
        raise UsageError(
            f"Layer {layer} is out of range: the vector has layers 0 to {len(found.vectors) - 2}."
        )
    prompts = (
        tuple(render_chat(tokenizer, question).ids for question in split.questions)
        for split in (seen, held_out)
    )
    teacher = Teacher(trait, alpha * found.vectors[layer], layer, position_set, *prompts)
    most = max(counts)
    trained = [(curve, k) for k in counts if k < most] + [(name, most) for name in names]
    if any(student != "full" for student, _ in trained):
        require_peft()
    units = [
        Condition(teacher, student, count)
        for student, count in [("baseline", 0), ("steered", 0), *trained]
    ]
    content = {
        "trait": trait,
        "questions": [seen.questions, held_out.questions],
        "eval_prompt": held_out.eval_prompt,
        "layer": layer,
        "alpha": alpha,
        "position_set": position_set,
        "judge": judging.identity,
        "conditions": [unit.label for unit in units],
    }
    return Plan(
        name=trait,
        units=units,
        axes={
            "trait": [trait],
            "condition": [unit.label for unit in units],
            "question": list(range(len(held_out.questions))),
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
            "question_text": ("question", list(held_out.questions)),
        },
        attrs={"vector_source": vector, "average": average, "layer": layer, "alpha": alpha},
        width=(len(found.vectors) - 1, found.vectors.shape[1]),
        batch_size=1,
        unverifiable="it would read back its students' checkpoints and rewrite their folders",
    )


def measure(
    model: TransformersModel,
    units: list[Condition],
    *,
    output: OutputFolder = "stores/students",
    n_samples: Count = 10,
    sampling: NucleusSampling = _SAMPLING,
    training: TrainingOptions,
) -> dict[str, Tensor]:
    """Train students and compare them with their teacher.

    Args:
        model: from `load_model`, on this machine.
        units: baseline, teacher and students.
        output: folder of the students that are trained: an adapter or a whole model each.
        n_samples: answers to each evaluation question.
        sampling: how they are drawn.
        training: how students are trained.
    """
    teacher = units[0].teacher
    # What the teacher says to the held-out questions, on which each student's KL is measured.
    once = [teacher.ask(ids, f"reference/{k}") for k, ids in enumerate(teacher.held_out)]
    reference = generate_steered(model, teacher, once, sampling)
    prompts = [
        teacher.ask(ids, f"{k}/{sample}")
        for k, ids in enumerate(teacher.held_out)
        for sample in range(n_samples)
    ]
    shown = as_trajectories(once, reference)
    results: list[dict[str, Tensor]] = []
    for unit in units:
        student, losses = train_student(model, unit, sampling, training, output)
        said, kl = evaluate(model, unit, student, prompts, shown, sampling)
        results.append(
            {
                "said": said.unflatten(0, (-1, n_samples)),
                "token_kl": kl,
                "kl": kl.nanmean(),
                "teacher_token": reference,
                "training_kl": torch.tensor(losses),
                "trained_parameters": torch.tensor(trained_parameters(student)),
            }
        )
    return {name: torch.stack([each[name] for each in results]) for name in results[0]}


def train_student(
    model: TransformersModel,
    unit: Condition,
    sampling: NucleusSampling,
    training: TrainingOptions,
    output: str,
) -> tuple[Any, list[float]]:
    """The student and the loss of each step; the model itself where there is nothing to train."""
    if not unit.n_trajectories:
        return model._module, [math.nan] * training.steps
    teacher, seen = unit.teacher, unit.teacher.seen
    determining = [teacher.vector.tolist(), teacher.layer, teacher.tokens, seen, vars(sampling)]
    home = students_folder(output, record_of(model), teacher.trait, determining)

    def sample(numbers: range) -> list[Trajectory]:
        """What the teacher says to the extraction questions, in turn."""
        prompts = [teacher.ask(seen[k % len(seen)], f"trajectory/{k}") for k in numbers]
        return as_trajectories(prompts, generate_steered(model, teacher, prompts, sampling))

    trajectories = keep_trajectories(home / "trajectories.jsonl", unit.n_trajectories, sample)
    logits = partial(teacher_logits, model, teacher)
    return distil(model, unit.student, trajectories, logits, training.of(unit.student), home)


def evaluate(
    model: TransformersModel,
    unit: Condition,
    student: Any,
    prompts: Sequence[SeededPrompt],
    shown: Sequence[Trajectory],
    sampling: NucleusSampling,
) -> tuple[Tensor, Tensor]:
    """What the teacher or a student says, and its KL on what the teacher said, [row, token]."""
    if unit.student == "steered":
        said, student = generate_steered(model, unit.teacher, prompts, sampling), None
    else:
        said = student_replies(student, model, prompts, sampling)
    logits = partial(teacher_logits, model, unit.teacher)
    return said, per_token_kl(shown, logits, student, said.shape[1], device=model.device)


def generate_steered(
    model: TransformersModel,
    teacher: Teacher,
    prompts: Sequence[SeededPrompt],
    sampling: NucleusSampling,
) -> Tensor:
    """What the teacher says, [row, token], −1 after the end."""
    said = torch.full((len(prompts), sampling.max_new_tokens), -1)
    vector = teacher.vector.to(model.device)
    site = entry(model, teacher.layer)
    for rows, draw in draws(model, prompts, sampling):
        tokens = [teacher.tokens] * len(rows)
        first = steered_tokens(draw.batch.attention_mask, 0, tokens)
        later = steered_steps(tokens).to(model.device)
        with until_end_of_text(), model.generate(**draw.settings()) as tracer:
            with tracer.invoke(draw.tokens):
                for step in tracer.iter[:]:
                    site.output = steer(site.output, vector, first if step == 0 else later)
            with tracer.invoke():
                generated = save(tracer.result)
        draw.add(generated)
        said[rows] = draw.replies()
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
