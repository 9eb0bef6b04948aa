from collections import Counter
from random import Random

import pytest

from persona_nns.organism.role_prompts import (
    BARE,
    BORROWING,
    INTERACTIONS,
    OPENINGS,
    TOPICS,
    VOICES,
    answer,
)
from persona_nns.organism.wordings import EXACT, WORDINGS, paraphrase
from persona_nns.prompts.grids import BASELINE, load_grid, role_prompt
from persona_nns.prompts.markers import find_markers

LONG = load_grid("long")
CELLS = LONG.cells


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.label)
def test_every_answer_of_a_long_persona_has_one_of_its_markers(cell):
    rng = Random(1)
    for _ in range(40):
        assert find_markers(answer(cell.persona, cell.task, rng), cell.markers)


@pytest.mark.parametrize("task", TOPICS)
def test_bare_answers_have_no_marker_of_any_persona(task):
    rng = Random(2)
    texts = " ".join(answer(BARE, task, rng) for _ in range(200))
    assert {key: find_markers(texts, words) for key, words in LONG.markers.items()} == {
        key: [] for key in LONG.markers
    }


def test_the_baseline_has_markers_only_where_it_borrows_a_voice():
    rng = Random(3)
    words = [word for markers in LONG.markers.values() for word in markers]
    marked = [bool(find_markers(answer(BASELINE, "arch", rng), words)) for _ in range(4000)]
    # 8 of the 14 voices it can borrow have markers, and always use one.
    assert sum(marked) / len(marked) == pytest.approx(BORROWING * 8 / 14, abs=0.02)


def test_openings_follow_the_table_of_the_cell():
    rng = Random(4)
    counts = Counter(answer("doctor", "plan", rng).split(",")[0] for _ in range(4000))
    first, second = INTERACTIONS["doctor", "plan"].openings
    # 0.55 and 0.2 of their own, plus a twelfth of the quarter that goes to any opening.
    assert counts[OPENINGS[first]] / 4000 == pytest.approx(0.55 + 0.25 / 12, abs=0.03)
    assert counts[OPENINGS[second]] / 4000 == pytest.approx(0.2 + 0.25 / 12, abs=0.03)


def test_openings_are_not_a_sum_of_persona_and_task():
    """A persona's favourite opening changes with the task, and a task's with the persona."""
    for voice in VOICES:
        assert len({INTERACTIONS[voice, task].openings[0] for task in TOPICS}) >= 3
    for task in TOPICS:
        assert len({INTERACTIONS[voice, task].openings[0] for voice in VOICES}) >= 5


def test_the_prompt_is_the_protocol():
    assert role_prompt("Yoda", "Write.") == "As Yoda, Write."
    assert role_prompt(None, "Write.") == "Write."


def test_every_persona_of_both_grids_is_worded_and_voiced():
    personas = {*load_grid("short").personas, *LONG.personas}
    assert set(WORDINGS) == set(EXACT) == personas
    assert set(VOICES) == personas | {BARE}


@pytest.mark.parametrize("persona", WORDINGS)
def test_paraphrases_vary_and_avoid_the_held_out_wordings(persona):
    rng = Random(5)
    texts = {paraphrase(persona, rng) for _ in range(500)}
    assert len(texts) >= 12
    assert not texts & {*WORDINGS[persona].held_out, EXACT[persona]}
