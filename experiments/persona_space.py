"""Where do roles lie in a model? The axis to the assistant, principal components, and chance.

Answers in many roles are given, or made (`persona_responses`), and judged or not. A role is, at
each layer, the mean over its answers of their mean residuals. The axis is the assistant's minus
the mean of the others; the space of roles is that of their principal components. How much they vary
is held against answers whose roles are exchanged within each question ("The Assistant Axis", arXiv
2601.10387).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from nnsight import TransformersModel
from transformers import PreTrainedTokenizerBase

from persona_nns.declarations import Count, FileName, Plan, Variable, content_digest
from persona_nns.figures import axis_cosines, role_map, role_ranking, scree
from persona_nns.runs import run
from persona_nns.tracing import NucleusSampling
from persona_nns.traits import (
    DEFAULT,
    AnswerMeans,
    JudgeOptions,
    RoleAnswers,
    RoleOptions,
    RoleRows,
    check_role_judge,
    describe_space,
    is_role_file,
    role_rows,
    stack_layers,
    unmade_rows,
)

protocol_version = 1

_PER_ROLE = "role layer"
_PER_COMPONENT = "layer component"
variables = {
    "variance": Variable(
        "layer",
        "variance between roles",
        description="Mean over roles but the default of ‖role_mean − m‖².",
        every_layer=True,
    ),
    "variance_null": Variable(
        "layer",
        "variance by chance",
        description="95th percentile of 200 draws in which, within each question, answers exchange "
        "their roles.",
        every_layer=True,
    ),
    "role_mean": Variable(
        "role layer d_model",
        "mean residual of a role",
        description="Unweighted mean over the kept answers of their means over tokens, in float32.",
        every_layer=True,
    ),
    "axis": Variable(
        "layer d_model",
        "axis",
        description="role_mean of the default minus m, the mean of role_mean over all other roles.",
        every_layer=True,
    ),
    "component": Variable(
        "layer component d_model",
        "principal component",
        description="Of role_mean but the default's, centred on m; of length 1, turned towards the "
        "default.",
        every_layer=True,
    ),
    "explained": Variable(
        _PER_COMPONENT,
        "share of variance",
        description="Share of the variance between roles that a component has.",
        every_layer=True,
    ),
    "explained_null": Variable(
        _PER_COMPONENT,
        "share of variance by chance",
        description="95th percentile over the draws of variance_null, by rank.",
        every_layer=True,
    ),
    "loading": Variable(
        "role layer component",
        "loading",
        description="(role_mean − m)·component.",
        every_layer=True,
    ),
    "projection": Variable(
        _PER_ROLE,
        "projection on the axis",
        description="(role_mean − m)·axis/‖axis‖.",
        every_layer=True,
    ),
    "projection_interval": Variable(
        f"{_PER_ROLE} bound",
        "projection on the axis, 95 % interval",
        description="Percentile bootstrap of 200 draws over questions, each on its own axis.",
        every_layer=True,
        coords={"bound": ("low", "high")},
    ),
    "cos_roles": Variable(
        "role other_role layer",
        "cosine of two roles",
        description="Of role_mean − m.",
        every_layer=True,
    ),
    "cos_axis": Variable(
        _PER_COMPONENT,
        "cosine with the axis",
        description="Of a component.",
        every_layer=True,
    ),
    "cos_axis_interval": Variable(
        f"{_PER_COMPONENT} bound",
        "cosine with the axis, 95 % interval",
        description="Percentile bootstrap of 200 draws over questions; of a draw, the component "
        "of largest |cosine| with that of all, signed by that cosine.",
        every_layer=True,
        coords={"bound": ("low", "high")},
    ),
    "n_answers": Variable("role", "answers", description="Given by a role.", kind="int"),
    "n_kept": Variable(
        "role", "kept answers", description="That count; too few make a role NaN.", kind="int"
    ),
    "answer_score": Variable(
        "answer",
        "score of an answer",
        description="How much of its role it shows, 0–3; NaN where nobody judged, or refused.",
    ),
    "kept": Variable("answer", "answer counts", description="For its role.", kind="bool"),
}
figures = {"map": role_map, "scree": scree, "ranking": role_ranking, "cosines": axis_cosines}
_SAMPLING = NucleusSampling(max_new_tokens=512, temperature=0.7, top_p=0.9)
_NOBODY = JudgeOptions(judge="none")
# What answers that are made depend on, beside what is asked.
_MADE_BY = ("n_samples", "seed", "max_new_tokens", "temperature", "top_p")


@dataclass(frozen=True, eq=False)
class Space:
    """All answers of all roles.

    Attributes:
        label: what they are called.
        store: where their mean residuals are.
        run: the run there.
        role: index of the role of each that counts.
        question: index of the question of each.
        roles: their names.
        min_answers: a role of which fewer count is left out.
        places: of those that count, where they are in the run.
        n_answers: of each role.
        scores: of all answers, in the order of the result; none where nobody gave any.
        kept: which of them count.
        seed: of the draws.
    """

    label: str
    store: str
    run: str
    role: tuple[int, ...]
    question: tuple[int, ...]
    roles: tuple[str, ...]
    min_answers: int
    places: tuple[tuple[int, int], ...]
    n_answers: tuple[int, ...]
    scores: tuple[float, ...]
    kept: tuple[bool, ...]
    seed: int

    @property
    def place(self) -> dict[str, Any]:
        """Where it stands in the result."""
        return {"space": self.label}


def prepare(
    model: TransformersModel, store: str | Path, options: dict[str, Any], *, progress: bool
) -> dict[str, Any]:
    """Have answers made, or given ones read; what the store holds is not done again."""
    given = options.get("responses")
    if given is not None and not is_role_file(given):
        return options
    judge = {each.name: options[each.name] for each in fields(JudgeOptions) if each.name in options}
    check_role_judge(replace(_NOBODY, **judge))
    asked = {each.name for each in fields(RoleOptions)}
    made = {name: options[name] for name in asked if name in options}
    if given is not None:
        made |= {"responses": given, "max_new_tokens": 1}  # nothing is said
    else:
        made |= {name: options[name] for name in _MADE_BY if name in options}
    results = run("persona_responses", model, store=store, progress=progress, **made)
    return {**options, "responses": str(store), "responses_run": results.attrs["run"]}


def plan(
    tokenizer: PreTrainedTokenizerBase,  # noqa: ARG001
    *,
    model: str,
    asking: RoleOptions,
    responses: FileName | None = None,
    responses_run: str | None = None,
    n_samples: Count = 1,
    sampling: NucleusSampling = _SAMPLING,
    keep: float = 3.0,
    min_answers: Count = 2,
    seed: int = 0,
    judging: JudgeOptions = _NOBODY,
) -> Plan:
    """Have the answers judged, and choose those that count.

    Args:
        tokenizer: the model's.
        model: label of the model.
        asking: which roles are asked what.
        roles: folder with a {role}.json each, default.json the assistant's; or bundled. Of answers
            that are given, whose rubrics they are judged by.
        responses: answers (.jsonl, .jsonl.gz), or a store with persona_responses; made by default.
        responses_run: which run of persona_responses, where the store has several.
        n_samples: answers to each question, where they are made.
        sampling: how they are made.
        keep: an answer counts from this score on, or without one.
        min_answers: a role of which fewer count is NaN and enters nothing.
        seed: of samples and draws.
        judging: the judge.
        judge: none (what has no score counts); a URL (http://…) of an OpenAI-compatible endpoint;
            or a model that judges here: a bundled or fetched name, a folder, a .gguf file, or a hub
            id (org/name).
    """
    del sampling  # the business of persona_responses
    check_role_judge(judging)
    if responses is None or is_role_file(responses):  # `prepare` has them made
        prompts = asking.prompts(responses, model, n_samples)
        rows = unmade_rows(prompts, asking.name(responses)).keeping(keep)
        return _plan_of(rows, rows.answers(min_answers), keep, seed, judging)
    rows = role_rows(responses, model, responses_run).judged(judging, asking).keeping(keep)
    answers = rows.answers(min_answers)
    rows.warn_of(answers)
    made = _plan_of(rows, answers, keep, seed, judging)
    return replace(made, unverifiable=judging.unverifiable)


def _plan_of(
    rows: RoleRows, answers: RoleAnswers, keep: float, seed: int, judging: JudgeOptions
) -> Plan:
    of_role = [row.role for row in rows.rows]
    space = Space(
        label=rows.name,
        store=rows.store,
        run=rows.run,
        role=tuple(answers.role.tolist()),
        question=tuple(answers.question.tolist()),
        roles=tuple(rows.roles),
        min_answers=answers.min_answers,
        places=tuple(row.place for row in rows.rows if row.kept),
        n_answers=tuple(map(of_role.count, rows.roles)),
        scores=tuple(row.score for row in rows.rows) if rows.are_scored else (),
        kept=tuple(row.kept for row in rows.rows),
        seed=seed,
    )
    asked = [[row.role, row.system, row.question_id, row.question] for row in rows.rows]
    said = [[row.response, str(row.score), row.kept] for row in rows.rows]
    options = {"keep": keep, "min_answers": answers.min_answers, "seed": seed}
    known = {"judge": judging.identity, **options}
    texts = ("role", "system", "question_id", "question", "response")
    return Plan(
        name=rows.name,
        units=[space],
        axes={
            "space": [rows.name],
            "role": rows.roles,
            "other_role": rows.roles,
            "component": list(range(answers.n_components)),
            "answer": list(range(len(rows.rows))),
        },
        unit_axes=("space",),
        content={"answers": rows.identity, "asked": asked, "said": said, **known},
        token_ids={},
        digest=content_digest([asked, known]),
        coords={
            f"answer_{name}": ("answer", [getattr(row, name) for row in rows.rows])
            for name in texts
        },
        attrs={**known, "responses_run": rows.run},
        batch_size=1,
        variables=[name for name in variables if rows.are_scored or name != "answer_score"],
    )


def measure(model: TransformersModel, units: list[Space]) -> dict[str, Any]:  # noqa: ARG001
    """Nothing: the model has been asked (`persona_responses`), and `finish` needs none.

    Args:
        model: from `load_model`.
        units: all answers.
    """
    return {}


def finish(
    tokenizer: PreTrainedTokenizerBase,  # noqa: ARG001
    units: Sequence[Space],
    measured: dict[str, Any],
) -> dict[str, Any]:
    """Describe the space, a layer at a time."""
    (space,) = units
    means = AnswerMeans.of(space.store, space.run, space.places)
    answers = RoleAnswers(
        role=torch.tensor(space.role),
        question=torch.tensor(space.question),
        n_roles=len(space.roles),
        default=space.roles.index(DEFAULT),
        min_answers=space.min_answers,
    )
    layers = [
        describe_space(answers, means.at(layer), space.seed) for layer in range(means.n_layers)
    ]
    found: dict[str, Any] = {
        **stack_layers(layers),
        "n_answers": torch.tensor(space.n_answers),
        "n_kept": answers.n_kept,
        "kept": torch.tensor(space.kept),
    }
    if space.scores:
        found["answer_score"] = torch.tensor(space.scores)
    return {**measured, **{name: value[None] for name, value in found.items()}}
