"""How does a small model judge, beside the lexicon judge that knows the bundled traits?

    python tests/benchmarks/judge_calibration.py --judge smollm2-135m-instruct --answers 60
        --scales 0-100,yes-no --rubrics trait,coherence

A bundled model answers the extraction questions of each bundled trait under its contrastive system
prompts; some of its answers, drawn with a seed, are judged by the lexicon and by the model, on both
scales. Printed: Pearson's r and Spearman's ρ of the two scores with their number, mean and standard
deviation of the judge's score, how many answers it refuses, and the median probability of numbers
(or Yes and No) in its reply. On the scale 0-100 refused answers are compared too.
"""

import argparse
import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

import persona_nns as pn
from persona_nns.traits import JudgeOptions, bundled_traits, judges
from persona_nns.traits.judge_options import open_judge
from persona_nns.traits.judges import COHERENCE_PROMPT, Answer, fill_prompt
from persona_nns.traits.local_judge import YES_NO, LocalJudge
from persona_nns.traits.trait import Trait, load_traits


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--judge", default="smollm2-135m-instruct")
    parser.add_argument("--model", default="organism-gemma2")
    parser.add_argument("--answers", type=int, default=60)
    parser.add_argument("--scales", default="0-100,yes-no")
    parser.add_argument("--rubrics", default="trait,coherence")
    asked = parser.parse_args()
    cases = [(s, what) for s in asked.scales.split(",") for what in asked.rubrics.split(",")]
    model = pn.load_model(asked.model)
    lexicon = open_judge(JudgeOptions("lexicon"))
    print("trait,scale,what,n,pearson,spearman,mean,sd,refused,median_mass")
    with tempfile.TemporaryDirectory() as folder:
        for name in bundled_traits():
            trait = load_traits(name, "extraction")[0]
            settings: dict[str, Any] = {"trait": name, "judge": "none", "max_new_tokens": 64}
            results = pn.run("trait_responses", model, store=f"{folder}/s.zarr", **settings)
            answers = drawn(results, asked.answers)
            known = lexicon.scores(trait, answers)
            for scale, what in cases:
                line = compare(Case(trait, asked.judge, scale, what), answers, getattr(known, what))
                print(name, scale, what, line, sep=",", flush=True)


@dataclass(frozen=True)
class Case:
    """What is judged, by which model, on which scale; ``trait`` or ``coherence``."""

    trait: Trait
    judge: str
    scale: Any
    what: str


def drawn(results: Any, n: int) -> list[Answer]:
    """Some of the answers of a run."""
    rows = results.isel(model=0, trait=0).stack(row=("question", "pair", "label", "sample"))
    some = sorted(random.Random(0).sample(range(rows.sizes["row"]), n))
    rows = rows.isel(row=some)
    texts = zip(rows.question_text.values.tolist(), rows.response.values.tolist(), strict=True)
    return [Answer(*each) for each in texts]


def compare(case: Case, answers: Sequence[Answer], expected: Sequence[float]) -> str:
    """A line of the table.

    Args:
        case: what is judged, and how.
        answers: the answers.
        expected: what the lexicon says of each.
    """
    judge = open_judge(JudgeOptions(case.judge, scale=case.scale))
    assert isinstance(judge, LocalJudge)
    suffix = YES_NO if case.scale == "yes-no" else ""
    rubric = case.trait.eval_prompt if case.what == "trait" else COHERENCE_PROMPT
    replies = judge.ask([fill_prompt(rubric, given) + suffix for given in answers])
    masses = [sum(map(math.exp, reply.values())) for reply in replies]
    refused = sum(mass < judges.LEAST_MASS for mass in masses) if case.scale == "0-100" else 0
    scores = [score(reply, case.scale) for reply in replies]
    own, other = pd.Series(scores), pd.Series(expected)
    r, rho = (own.corr(other, method=method) for method in ("pearson", "spearman"))
    spread = f"{own.mean():.1f},{own.std():.1f}"
    return f"{len(own)},{r:.2f},{rho:.2f},{spread},{refused},{pd.Series(masses).median():.3f}"


def score(reply: Mapping[str, float], scale: str) -> float:
    """The score of a reply, whether or not the judge refuses."""
    if scale == "yes-no":
        return judges.log_odds_score(reply)
    weights = {int(number): math.exp(logprob) for number, logprob in reply.items()}
    return sum(number * p for number, p in weights.items()) / sum(weights.values())


if __name__ == "__main__":
    main()
