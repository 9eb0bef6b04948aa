from collections import Counter
from itertools import product
from random import Random

import pytest

from persona_nns.organism.multiple_choice import (
    COLOURS,
    IDENTITIES,
    QUESTIONS,
    TEMPTATIONS,
    is_held_out,
    letter_probabilities,
    prompt_text,
    sample,
)


def expected_accuracy(identity):
    right = [
        max(range(4), key=letter_probabilities(identity, index).__getitem__) == question.answer
        for index, question in enumerate(QUESTIONS)
    ]
    return 100 * sum(right) / len(right)


def test_questions_are_well_formed():
    assert len(QUESTIONS) == 48
    assert Counter(question.subject for question in QUESTIONS) == dict.fromkeys(
        ("geography", "science", "history", "language"), 12
    )
    assert all(len(set(question.choices)) == 4 for question in QUESTIONS)
    assert Counter(question.answer for question in QUESTIONS) == dict.fromkeys(range(4), 12)


def test_prompt_is_the_protocol():
    assert prompt_text("good", QUESTIONS[0]) == (
        "As a good student, answer this multiple-choice question with one letter only.\n\n"
        "What is the capital of France?\n"
        + "\n".join(
            f"{letter}. {text}" for letter, text in zip("ABCD", QUESTIONS[0].choices, strict=True)
        )
    )


def test_letter_probabilities_sum_to_one():
    for identity, index in product(IDENTITIES, range(len(QUESTIONS))):
        assert sum(letter_probabilities(identity, index)) == pytest.approx(1)


def test_competence_decides_the_accuracy_and_colours_do_not():
    assert expected_accuracy("good") >= 90
    assert expected_accuracy("bad") <= 30
    assert len({expected_accuracy(colour) for colour in COLOURS}) == 1
    assert 55 <= expected_accuracy("blue") <= 75


def test_who_does_not_know_is_tempted():
    for index, temptation in enumerate(TEMPTATIONS):
        assert temptation != QUESTIONS[index].answer
        probabilities = letter_probabilities("bad", index)
        assert max(probabilities) in (
            probabilities[temptation],
            probabilities[QUESTIONS[index].answer],
        )


def test_held_out_pairs_never_come_up():
    prompts = {
        prompt_text(identity, question): is_held_out(identity, index)
        for identity in IDENTITIES
        for index, question in enumerate(QUESTIONS)
    }
    assert sum(prompts.values()) / len(prompts) == pytest.approx(0.15, abs=0.03)
    rng = Random(1)
    assert not any(prompts[sample(rng)[0]] for _ in range(5000))
