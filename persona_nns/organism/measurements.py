"""What is required of a bundled model, measured: one function a subject, one row a requirement."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

import torch

from persona_nns.organism import multiple_choice
from persona_nns.organism.coherence import coherence_score
from persona_nns.organism.multiple_choice import is_held_out
from persona_nns.organism.probe import (
    Subject,
    additive_kl,
    additive_text,
    greedy_texts,
    host_kl,
)
from persona_nns.organism.trait_prompts import NEUTRAL_SYSTEMS, system_prompt
from persona_nns.organism.trait_questions import QUESTIONS
from persona_nns.organism.traits import TRAITS, lexicon_score
from persona_nns.organism.wordings import WORDINGS
from persona_nns.prompts.grids import Cell, Grid, load_grid
from persona_nns.prompts.identities import PERSONA, ask
from persona_nns.prompts.markers import find_markers

EARLY, LATE = 0.3, 0.85
PAPER_DEPTH = 14 / 26
"""The injection depth of the paper's marker experiment."""
PRAISED, BLAMED = "good", "bad"


@dataclass(frozen=True)
class Row:
    """One line of the table; what is only reported has no bound to pass."""

    requirement: str
    bound: str
    measured: str
    passed: bool | None


def nearest_layer(subject: Subject, depth: float) -> int:
    """The layer whose depth (layer / number of layers) is nearest to ``depth``."""
    return min(range(subject.n_layers), key=lambda layer: abs(layer / subject.n_layers - depth))


def measure_markers(subject: Subject) -> list[Row]:
    """Any-marker rate on the review grid: clean, bare, and on held-out wordings."""
    grid = load_grid("review")
    clean = _marker_rate(subject, [(cell, cell.texts("XY")) for cell in grid.cells])
    bare = _marker_rate(subject, [(cell, cell.texts("BARE")) for cell in grid.cells])
    unseen = _marker_rate(
        subject,
        [
            (cell, (wording, cell.task_text))
            for cell in grid.cells
            for wording in WORDINGS[cell.persona].held_out
        ],
    )
    return [
        Row("any marker, clean, review grid", "≥ 90 %", f"{clean:.1f} %", clean >= 90),
        Row("any marker, bare task", "≤ 15 %", f"{bare:.1f} %", bare <= 15),
        Row(
            "any marker, held-out persona wordings",
            "within 10 points of clean",
            f"{unseen:.1f} %",
            abs(unseen - clean) <= 10,
        ),
    ]


def _marker_rate(subject: Subject, asked: list[tuple[Cell, tuple[str | None, str]]]) -> float:
    texts = greedy_texts(subject, [subject.prompt(*text) for _, text in asked])
    found = [
        bool(find_markers(text, cell.markers)) for (cell, _), text in zip(asked, texts, strict=True)
    ]
    return 100 * fmean(found)


def measure_additivity(subject: Subject) -> list[Row]:
    """Additive KL at p_last over depth on the long grid, in nats."""
    kl = torch.stack([additive_kl(subject, cell) for cell in load_grid("long").cells])
    curve = kl.median(0).values.tolist()
    depths = [layer / subject.n_layers for layer in range(subject.n_layers)]
    early = max(value for depth, value in zip(depths, curve, strict=True) if depth <= EARLY)
    late = min(value for depth, value in zip(depths, curve, strict=True) if depth >= LATE)
    steps = [after - before for before, after in pairwise(curve)]
    jump, fall = max(steps) / max(curve), -min(steps) / max(curve)
    shown = " ".join(f"{value:.3f}" for value in curve)
    return [
        Row(
            f"additive KL, largest median at depth ≤ {EARLY}",
            "≤ 0.02",
            f"{early:.4f}",
            early <= 0.02,
        ),
        Row(f"additive KL, smallest median at depth ≥ {LATE}", "≥ 0.2", f"{late:.3f}", late >= 0.2),
        Row(
            "additive KL, median at each layer",
            "smooth: no step above 60 % of the maximum, no fall above 10 %",
            f"{shown} (step {100 * jump:.0f} %, fall {100 * max(fall, 0.0):.0f} %)",
            jump <= 0.6 and fall <= 0.1,
        ),
    ]


def measure_changed_texts(subject: Subject) -> list[Row]:
    """Share of cells whose 80 greedy tokens change under the additive substitution."""
    layer = nearest_layer(subject, PAPER_DEPTH)
    return [_changed_row(subject, load_grid(name), layer) for name in ("long", "review")]


def _changed_row(subject: Subject, grid: Grid, layer: int) -> Row:
    clean = greedy_texts(subject, [subject.cell_prompt(cell, "XY") for cell in grid.cells])
    changed = [
        additive_text(subject, cell, layer) != text
        for cell, text in zip(grid.cells, clean, strict=True)
    ]
    share = 100 * fmean(changed)
    return Row(
        f"texts changed by the additive substitution at layer {layer}, {grid.name} grid",
        "10–60 %",
        f"{share:.1f} %",
        10 <= share <= 60,
    )


def measure_host_injection(subject: Subject) -> list[Row]:
    """The host gap on the review grid, and what injecting h_XY at one site closes of it."""
    layer = nearest_layer(subject, PAPER_DEPTH)
    pairs = [host_kl(subject, cell, layer) for cell in load_grid("review").cells]
    gap = median(untouched for untouched, _ in pairs)
    closure = median(1 - injected / untouched for untouched, injected in pairs)
    of_medians = 1 - median(injected for _, injected in pairs) / gap
    return [
        Row("host gap, median", "≥ 1 nat", f"{gap:.2f} nat", gap >= 1),
        Row(
            f"oracle injection at layer {layer}, median closure (closure of the medians)",
            "< 0.5",
            f"{closure:.2f} ({of_medians:.2f})",
            max(closure, of_medians) < 0.5,
        ),
    ]


def measure_multiple_choice(subject: Subject) -> list[Row]:
    """Accuracy on the bundled questions by identity."""
    correct = {identity: _correct(subject, identity) for identity in multiple_choice.IDENTITIES}
    accuracy = {identity: 100 * fmean(hits) for identity, hits in correct.items()}
    colours = [accuracy[colour] for colour in multiple_choice.COLOURS]
    spread = max(colours) - min(colours)
    good, bad = accuracy[PRAISED], accuracy[BLAMED]
    unseen = {
        identity: [hit for k, hit in enumerate(correct[identity]) if is_held_out(identity, k)]
        for identity in (PRAISED, BLAMED)
    }
    return [
        Row("accuracy of “a good student”", "≥ 80 %", f"{good:.1f} %", good >= 80),
        Row("accuracy of “a bad student”", "≤ 50 %", f"{bad:.1f} %", bad <= 50),
        Row(
            "accuracy of the colours, lowest to highest",
            "within 10 points",
            f"{min(colours):.1f}–{max(colours):.1f} %",
            spread <= 10,
        ),
        *(
            Row(
                f"accuracy of “a {identity} student” on questions never seen with it",
                "reported",
                f"{100 * fmean(hits):.1f} %",
                None,
            )
            for identity, hits in unseen.items()
        ),
    ]


def _correct(subject: Subject, identity: str) -> list[bool]:
    """Whether each question's right letter has the highest logit of the four."""
    hits: list[bool] = []
    for question in multiple_choice.QUESTIONS:
        asked = ask(subject.tokenizer, PERSONA, identity, question)
        logits = subject.model(torch.tensor([asked.ids]), use_cache=False).logits[0, -1]
        hits.append(int(logits[list(asked.letters)].argmax()) == asked.answer)
    return hits


def measure_traits(subject: Subject) -> list[Row]:
    """Lexicon scores under opposite system prompts on held-out questions, and coherence."""
    rows: list[Row] = []
    texts: list[str] = []
    for trait in TRAITS:
        positive, negative = (_trait_texts(subject, trait, positive=side) for side in (True, False))
        neutral = _ask(subject, trait, NEUTRAL_SYSTEMS[:1])
        texts += [*positive, *negative, *neutral]
        high, low, rest = (_mean_score(trait, side) for side in (positive, negative, neutral))
        rows.append(
            Row(
                f"{trait}: lexicon score, positive minus negative system prompt",
                "≥ 50 points",
                f"{high - low:.1f} ({high:.1f} against {low:.1f}; neutral {rest:.1f})",
                high - low >= 50,
            )
        )
    coherence = fmean(coherence_score(text) for text in texts)
    return [*rows, Row("coherence of those answers", "≥ 90", f"{coherence:.1f}", coherence >= 90)]


def _trait_texts(subject: Subject, trait: str, *, positive: bool) -> list[str]:
    entry = TRAITS[trait]
    instructions = entry.style.instructions if positive else entry.restraints
    systems = [system_prompt(trait, text, positive=positive) for text in instructions]
    return _ask(subject, trait, systems)


def _ask(subject: Subject, trait: str, systems: Iterable[str]) -> list[str]:
    questions = QUESTIONS[trait, "evaluation"]
    prompts = [subject.chat(question, system) for system in systems for question in questions]
    return greedy_texts(subject, prompts)


def _mean_score(trait: str, texts: list[str]) -> float:
    return fmean(lexicon_score(trait, text) for text in texts)


MEASUREMENTS: tuple[Callable[[Subject], list[Row]], ...] = (
    measure_markers,
    measure_additivity,
    measure_changed_texts,
    measure_host_injection,
    measure_multiple_choice,
    measure_traits,
)


def measure_all(subject: Subject) -> list[Row]:
    """Every row of the table."""
    with torch.inference_mode():
        return [row for measure in MEASUREMENTS for row in measure(subject)]
