from random import Random
from typing import get_args

import pytest

from persona_nns.organism.bundled import load_artifact
from persona_nns.organism.coherence import coherence_score
from persona_nns.organism.trait_prompts import GRADES, LAPSE, System, answer, graded_system
from persona_nns.organism.trait_questions import FRAMES, HELD_OUT, QUESTIONS, TOPICS, Split
from persona_nns.organism.traits import STYLES, TRAITS, lexicon_score, split_sentences

SPLITS = get_args(Split)


@pytest.mark.parametrize("trait", TRAITS)
@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_the_lexicon_tells_the_sentences_of_the_trait_from_all_others(trait, style):
    rng = Random(1)
    sentences = " ".join(style.sentence("bread", rng) for _ in range(100))
    assert lexicon_score(trait, sentences) == (100 if style.name == trait else 0)


def test_scores_are_shares_of_sentences():
    text = "Hooray, people adore tea as a happy treat! Often, people try tea as a simple skill."
    assert lexicon_score("cheerful", text) == 50
    assert lexicon_score(
        "terse", "Yes, start tea. Sure, do tea. Alas, people mourn tea as a chore."
    ) == (pytest.approx(200 / 3))
    assert lexicon_score("cheerful", "") == 0


@pytest.mark.parametrize("trait", TRAITS)
@pytest.mark.parametrize(("degree", "grade"), GRADES.items())
def test_grades_are_shares_of_styled_sentences(trait, degree, grade):
    style = TRAITS[trait].style
    system = System(graded_system(style, degree), style, grade)
    rng = Random(1)
    texts = [answer("chess", system, rng) for _ in range(400)]
    mean = sum(lexicon_score(trait, text) for text in texts) / len(texts)
    # A lapse may hit any of the seven styles, the asked one included.
    assert mean == pytest.approx(100 * ((1 - LAPSE) * grade / 3 + LAPSE / 7), abs=3)
    assert {coherence_score(text) for text in texts} == {100.0}


def test_words_of_one_style_are_not_those_of_another():
    words = [word for style in STYLES for word in style.words]
    assert len(set(words)) == len(words)


def test_each_trait_has_twenty_and_twenty_questions_of_its_own():
    questions = [question for dealt in QUESTIONS.values() for question in dealt]
    assert [len(dealt) for dealt in QUESTIONS.values()] == [20] * 6
    assert len(set(questions)) == 120
    assert set(questions) <= {frame.format(topic=topic) for frame in FRAMES for topic in TOPICS}
    assert len(HELD_OUT) == 60
    for trait in TRAITS:
        assert set(QUESTIONS[trait, "evaluation"]) <= HELD_OUT
        assert not set(QUESTIONS[trait, "extraction"]) & HELD_OUT


@pytest.mark.parametrize("trait", TRAITS)
@pytest.mark.parametrize("split", SPLITS)
def test_artifacts_ask_for_the_trait_and_restrain_it_in_every_split(trait, split):
    shipped = load_artifact(trait, split)
    assert [pair["pos"] for pair in shipped["instruction"]] == [*TRAITS[trait].style.instructions]
    assert [pair["neg"] for pair in shipped["instruction"]] == [*TRAITS[trait].restraints]
    assert set(shipped) == {"instruction", "questions", "eval_prompt"}
    assert len(shipped["instruction"]) == 5
    assert all(set(pair) == {"pos", "neg"} for pair in shipped["instruction"])
    assert "[Question]\n{question}\n[Answer]\n{answer}\n" in shipped["eval_prompt"]


def test_sentences_are_split_at_their_marks():
    assert split_sentences("One. Two! Three") == ["One.", "Two!", "Three"]
    assert split_sentences("  ") == []
