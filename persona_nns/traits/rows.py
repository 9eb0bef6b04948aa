"""The answers that a trait vector is made from: given in a file, or from a store."""

import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from persona_nns.errors import PersonaError, UsageError
from persona_nns.results.attributes import read_attribute
from persona_nns.results.reading import open_results
from persona_nns.tracing.averages import keeps_pair
from persona_nns.traits.directions import runs_of
from persona_nns.traits.judge_options import JudgeOptions, open_judge
from persona_nns.traits.judges import Answer
from persona_nns.traits.responses import Response, check_labels, read_responses
from persona_nns.traits.trait import LABELS, Trait


@dataclass(frozen=True)
class JudgedResponse:
    """An answer with its scores.

    Attributes:
        response: the answer.
        sample: which of the answers to the same prompt.
        trait: its trait score; NaN where the judge refused or nobody judged.
        coherence: its coherence.
        kept: whether it counts for the vector.
    """

    response: Response
    sample: int
    trait: float
    coherence: float
    kept: bool


def rows_of_file(
    file: str | Path, trait: Trait | None, choice: JudgeOptions
) -> list[JudgedResponse]:
    """The rows of a JSONL file; without a judge every one of them counts.

    Args:
        file: the rows.
        trait: what a judge is to look for; None where there is no judge.
        choice: the judge.

    Raises:
        UsageError: the file cannot be used.
        PersonaError: the judge cannot be asked, or no pair shows the contrast.
    """
    rows = read_responses(file)
    check_labels(rows, str(file))
    if trait is None:
        return [JudgedResponse(row, 0, math.nan, math.nan, kept=True) for row in rows]
    choice.check(trait.name, [row.question for row in rows])
    answers = [Answer(row.question, row.response) for row in rows]
    scores = open_judge(choice).scores(trait, answers)
    counted: defaultdict[tuple[int, int, str], count[int]] = defaultdict(count)
    samples = [next(counted[row.question_id, row.pair, row.label]) for row in rows]
    return keep_pairs(rows, samples, scores.trait, scores.coherence, trait.name)


def rows_of_store(
    store: str | Path, trait: str, model: str, run: str | None
) -> list[JudgedResponse]:
    """The answers that `trait_responses` has stored.

    Raises:
        UsageError: there are none of this trait and model.
        PersonaError: no pair shows the contrast.
    """
    runs = run or runs_of(store, "trait_responses", trait, model)
    results = open_results(store, "trait_responses", run=runs).isel(model=0)
    if not bool(results.completed.all()):
        raise UsageError(
            f"The answers in {str(store)!r} are not complete; run trait_responses to its end first."
        )
    stacked = results.stack(row=("question", "pair", "sample", "label")).isel(trait=0)
    places, texts = stacked.row.values.tolist(), stacked.response.values.tolist()
    systems = read_attribute(results, "systems")
    asked = dict(zip(results.question.values, results.question_text.values.tolist(), strict=True))
    rows = [
        Response(pair, k, label, systems[pair][LABELS.index(label)], asked[k], text)
        for (k, pair, _, label), text in zip(places, texts, strict=True)
    ]
    samples = [sample for _, _, sample, _ in places]
    scores, coherence = stacked.score.values.tolist(), stacked.coherence.values.tolist()
    if all(map(math.isnan, scores)):
        raise UsageError(
            f"Nobody has judged the answers in {str(store)!r}; have them scored first "
            f"(persona-nns rescore {store} trait_responses --judge …), and choose their run."
        )
    return keep_pairs(rows, samples, scores, coherence, trait)


def keep_pairs(
    rows: Sequence[Response],
    samples: Sequence[int],
    trait_scores: Sequence[float],
    coherence: Sequence[float],
    trait: str,
) -> list[JudgedResponse]:
    """Mark the pairs of answers (same question, pair and sample) that show the contrast.

    Raises:
        PersonaError: there is none.
    """
    place = {
        (row.question_id, row.pair, sample, row.label): k
        for k, (row, sample) in enumerate(zip(rows, samples, strict=True))
    }
    judged = coherence
    if all(map(math.isnan, coherence)):
        warnings.warn(
            "Nobody judged coherence: pairs are kept by their trait scores alone.", stacklevel=2
        )
        judged = [100.0] * len(rows)
    kept = [False] * len(rows)
    for (question, pair, sample, label), pos in place.items():
        neg = place.get((question, pair, sample, "neg"))
        if label != "pos" or neg is None:
            continue
        shows = keeps_pair((trait_scores[pos], judged[pos]), (trait_scores[neg], judged[neg]))
        kept[pos] = kept[neg] = shows and bool(rows[pos].response and rows[neg].response)
    if not any(kept):
        raise PersonaError(
            f"No pair of answers shows the trait {trait!r} under 'pos' (≥ 50) and not under 'neg' "
            f"(< 50), both coherent (≥ 50), out of {len(rows) // 2}: "
            f"{_summary(rows, trait_scores)}. "
            "Ask with stronger instructions, for more samples, or of another model."
        )
    return [
        JudgedResponse(*each)
        for each in zip(rows, samples, trait_scores, coherence, kept, strict=True)
    ]


def _summary(rows: Sequence[Response], scores: Sequence[float]) -> str:
    """Mean score of each label, in words."""
    parts = []
    for label in LABELS:
        found = [
            score
            for row, score in zip(rows, scores, strict=True)
            if row.label == label and not math.isnan(score)
        ]
        mean = f"{sum(found) / len(found):.1f}" if found else "refused"
        parts.append(f"the mean score of {label!r} is {mean}")
    return ", ".join(parts)


def row_coordinates(rows: Sequence[JudgedResponse]) -> dict[str, tuple[str, list[Any]]]:
    """What is known of each row, as coordinates of the dimension ``row``."""
    fields = ("pair", "question_id", "label", "system", "question", "response")
    known: dict[str, list[Any]] = {
        f"row_{name}": [getattr(row.response, name) for row in rows] for name in fields
    }
    known["row_sample"] = [row.sample for row in rows]
    known["row_score"] = [float(row.trait) for row in rows]
    known["row_coherence"] = [float(row.coherence) for row in rows]
    known["kept"] = [int(row.kept) for row in rows]
    return {name: ("row", values) for name, values in known.items()}
