"""The answers of roles that a store holds: which of them count, and their mean residuals."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from persona_nns.errors import UsageError
from persona_nns.results.attributes import read_attribute
from persona_nns.results.reading import list_runs, open_results
from persona_nns.traits.judge_options import JudgeOptions
from persona_nns.traits.judges import Answer
from persona_nns.traits.role_judging import judge_roles
from persona_nns.traits.role_prompts import DEFAULT, RoleOptions, RolePrompt
from persona_nns.traits.role_space import RoleAnswers

_EXPERIMENT = "persona_responses"


@dataclass(frozen=True)
class RoleRow:
    """An answer in a store.

    Attributes:
        place: index of its system prompt, and which of the answers to it.
        role: who gave it.
        system: the system prompt.
        question_id: which question.
        question: its text.
        response: what was said; may be empty.
        score: 0 to 3; NaN where nobody judged, or the judge refused.
        kept: whether it counts.
    """

    place: tuple[int, int]
    role: str
    system: str
    question_id: str
    question: str
    response: str
    score: float
    kept: bool = False


@dataclass(frozen=True)
class RoleRows:
    """All answers of a run of `persona_responses`.

    Attributes:
        store: path or URL.
        run: the run.
        identity: of the run, which says where their mean residuals come from.
        name: what the answers are called.
        rows: in the order of their places.
    """

    store: str
    run: str
    identity: str
    name: str
    rows: tuple[RoleRow, ...]

    @cached_property
    def roles(self) -> list[str]:
        """Their names, in the order of their first answers."""
        return list(dict.fromkeys(row.role for row in self.rows))

    @cached_property
    def questions(self) -> list[str]:
        """Their ids, in the order of their first answers."""
        return list(dict.fromkeys(row.question_id for row in self.rows))

    @property
    def are_scored(self) -> bool:
        """Whether any has a score."""
        return not all(math.isnan(row.score) for row in self.rows)

    def judged(self, choice: JudgeOptions, asking: RoleOptions) -> "RoleRows":
        """The same with scores; one that came with an answer stands, and the default has none.

        Raises:
            UsageError: a role has no rubric.
            PersonaError: the judge cannot be asked.
        """
        if choice.judge == "none":
            return self
        rubrics = {role.name: role.eval_prompt for role in asking.load_roles()}
        asked = [
            place
            for place, row in enumerate(self.rows)
            if row.role != DEFAULT and row.response and math.isnan(row.score)
        ]
        answers = [
            (row.role, Answer(row.question, row.response))
            for row in (self.rows[place] for place in asked)
        ]
        scores = dict(zip(asked, judge_roles(rubrics, answers, choice), strict=True))
        if refused := sum(map(math.isnan, scores.values())):
            warnings.warn(
                f"The judge gave no number for {refused} of {len(scores)} answers; they count, as "
                "answers that nobody judged.",
                stacklevel=2,
            )
        rows = [
            replace(row, score=scores.get(place, row.score)) for place, row in enumerate(self.rows)
        ]
        return replace(self, rows=tuple(rows))

    def keeping(self, keep: float) -> "RoleRows":
        """The same with what counts: the default's answers, and others by their score.

        An answer counts from this score on, or without one; an empty answer never.
        """
        rows = [
            replace(
                row,
                kept=bool(row.response) and (row.role == DEFAULT or not row.score < keep),
            )
            for row in self.rows
        ]
        return replace(self, rows=tuple(rows))

    def answers(self, min_answers: int) -> RoleAnswers:
        """What the space is made of.

        Raises:
            UsageError: fewer than two roles beside the default have enough answers.
        """
        kept = [row for row in self.rows if row.kept]
        found = RoleAnswers(
            role=torch.tensor([self.roles.index(row.role) for row in kept], dtype=torch.long),
            question=torch.tensor(
                [self.questions.index(row.question_id) for row in kept], dtype=torch.long
            ),
            n_roles=len(self.roles),
            default=self.roles.index(DEFAULT),
            min_answers=min_answers,
        )
        if len(found.others) < 2:
            few = self.counted(found)
            raise UsageError(
                f"A space needs two roles beside {DEFAULT!r} with at least {min_answers} answers "
                f"that count, and there are {len(found.others)}{f' (not {few})' * bool(few)}; ask "
                "more (--n-samples, --questions), or ask for less (--keep, --min-answers)."
            )
        return found

    def counted(self, found: RoleAnswers) -> str:
        """The roles with too few answers that count, and how many they have, in words."""
        n_answers = [sum(row.role == role for row in self.rows) for role in self.roles]
        return ", ".join(
            f"{role} ({kept} of {of})"
            for role, kept, of, live in zip(
                self.roles, found.n_kept.tolist(), n_answers, found.is_live.tolist(), strict=True
            )
            if not live
        )

    def warn_of(self, found: RoleAnswers) -> None:
        """Warn of what does not count, and of what nothing can be told."""
        if few := self.counted(found):
            warnings.warn(
                f"Fewer than {found.min_answers} answers count of {few}: these roles are NaN and "
                "enter nothing.",
                stacklevel=2,
            )
        if empty := sum(not row.response for row in self.rows):
            warnings.warn(
                f"{empty} of {len(self.rows)} answers are empty and do not count.", stacklevel=2
            )
        others = found.place[found.role] >= 0
        pairs = {*zip(found.question[others].tolist(), found.role[others].tolist(), strict=True)}
        if len({question for question, _ in pairs}) == len(pairs):
            warnings.warn(
                "No question was put to two roles, so that chance cannot be told from roles: the "
                "null is what was found; ask all roles the same (--questions F.jsonl).",
                stacklevel=2,
            )


def role_rows(store: str, model: str, run: str | None) -> RoleRows:
    """The answers that `persona_responses` has stored.

    Raises:
        UsageError: there are none of this model, several sets of them, or not yet all.
    """
    run = run or _only_run(store, model)
    results = open_results(store, _EXPERIMENT, run=run).isel(model=0)
    if not bool(results.completed.all()):
        raise UsageError(
            f"The answers in {store!r} are not complete; run persona_responses to its end first."
        )
    texts = read_attribute(results, "question_texts")
    response, asked = (results[name].values.tolist() for name in ("response", "question_id"))
    score = results["given_score"].values.tolist() if "given_score" in results else None
    roles, systems = results.prompt_role.values.tolist(), results.prompt_system.values.tolist()
    rows = [
        RoleRow(
            (prompt, answer),
            roles[prompt],
            systems[prompt],
            question,
            texts[question],
            response[prompt][answer],
            math.nan if score is None else score[prompt][answer],
        )
        for prompt, of_prompt in enumerate(asked)
        for answer, question in enumerate(of_prompt)
        if question  # system prompts may have answers of different number
    ]
    of_run = results.attrs
    return RoleRows(store, of_run["run"], of_run["identity"], of_run["grid"], tuple(rows))


def unmade_rows(prompts: Sequence[RolePrompt], name: str) -> RoleRows:
    """The answers to what is asked, before they are in a store."""
    rows = [
        RoleRow(
            (k, answer),
            prompt.role,
            prompt.system,
            question.id,
            question.text,
            question.response or "…",
            math.nan if question.score is None else question.score,
        )
        for k, prompt in enumerate(prompts)
        for answer, question in enumerate(prompt.questions)
    ]
    return RoleRows("", "", "", name, tuple(rows))


def _only_run(store: str, model: str) -> str:
    found = [info for info in list_runs(store, _EXPERIMENT) if info.attrs["model"] == model]
    if not found:
        raise UsageError(
            f"The store {store!r} holds no {_EXPERIMENT} for the model {model!r}; run "
            f"{_EXPERIMENT} first."
        )
    if len(found) > 1:
        raise UsageError(
            f"The store {store!r} holds several {_EXPERIMENT} for {model!r}; choose a run "
            "(--responses-run): " + "; ".join(info.describe() for info in found)
        )
    return found[0].run


@dataclass(frozen=True)
class AnswerMeans:
    """Mean residuals of answers, read a layer at a time.

    Attributes:
        results: of `persona_responses`.
        places: of each answer, its system prompt and which answer to it, [answer, 2].
    """

    results: xr.Dataset
    places: Sequence[tuple[int, int]]

    @classmethod
    def of(cls, store: str, run: str, places: Sequence[tuple[int, int]]) -> "AnswerMeans":
        """Those in a store."""
        return cls(open_results(store, _EXPERIMENT, run=run).isel(model=0), places)

    @property
    def n_layers(self) -> int:
        """How many layers there are, the stream after the final norm among them."""
        return self.results.sizes["layer"]

    def at(self, layer: int) -> Tensor:
        """Those at a layer, [answer, d_model] in float32."""
        whole = self.results["answer_mean"].isel(layer=layer)
        prompts, answers = np.array(self.places).T
        return torch.from_numpy(
            whole.transpose("prompt", "answer", "d_model").values[prompts, answers]
        )
