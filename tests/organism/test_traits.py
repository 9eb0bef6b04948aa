from random import Random
from typing import get_args

import pytest

from persona_nns.organism import trait_prompts
from persona_nns.organism.coherence import coherence_score
from persona_nns.organism.trait_questions import (
    HELD_OUT,
    QUESTIONS,
    Split,
    artifact,
    load_artifact,
)
from persona_nns.organism.traits import TRAITS, lexicon_score, split_sentences

STYLES = [style for trait in TRAITS.values() for style in (trait.style, trait.opposite)]
SPLITS = get_args(Split)


@pytest.mark.parametrize("trait", TRAITS)
def test_the_lexicon_tells_every_sentence_of_the_grammar(trait):
    own = TRAITS[trait].style.sentences
    others = [text for style in STYLES if style.name != trait for text in style.sentences]
    for sentence in own:
        assert lexicon_score(trait, sentence.format(topic="bread")) == 100
    for sentence in (*others, *trait_prompts.NEUTRAL):
        assert lexicon_score(trait, sentence.format(topic="bread")) == 0


def test_scores_are_shares_of_sentences():
    text = "Hooray, tea makes every day brighter! It takes some months to become used to tea."
    assert lexicon_score("cheerful", text) == 50
    assert lexicon_score(
        "terse", "Start tea small. Yes, tea works. I sigh at the thought of tea."
    ) == (pytest.approx(200 / 3))
    assert lexicon_score("cheerful", "") == 0


@pytest.mark.parametrize("trait", TRAITS)
@pytest.mark.parametrize(("degree", "grade"), trait_prompts.GRADES.items())
def test_grades_are_shares_of_styled_sentences(trait, degree, grade):
    style = TRAITS[trait].style
    system = trait_prompts.System(trait_prompts.graded_system(style, degree), style, grade)
    text = trait_prompts.answer("chess", system, Random(1))
    assert lexicon_score(trait, text) == pytest.approx(100 * grade / 3)
    assert coherence_score(text) == 100


def test_each_trait_has_twenty_and_twenty_questions_of_its_own():
    questions = [question for dealt in QUESTIONS.values() for question in dealt]
    assert [len(dealt) for dealt in QUESTIONS.values()] == [20] * 6
    assert len(set(questions)) == 120
    assert len(HELD_OUT) == 60
    for trait in TRAITS:
        assert set(QUESTIONS[trait, "evaluation"]) <= HELD_OUT
        assert not set(QUESTIONS[trait, "extraction"]) & HELD_OUT


@pytest.mark.parametrize("trait", TRAITS)
@pytest.mark.parametrize("split", SPLITS)
def test_shipped_artifacts_are_those_of_the_grammar(trait, split):
    shipped = load_artifact(trait, split)
    assert shipped == artifact(trait, split)
    assert set(shipped) == {"instruction", "questions", "eval_prompt"}
    assert len(shipped["instruction"]) == 5
    assert all(set(pair) == {"pos", "neg"} for pair in shipped["instruction"])
    assert "[Question]\n{question}\n[Answer]\n{answer}\n" in shipped["eval_prompt"]


def test_sentences_are_split_at_their_marks():
    assert split_sentences("One. Two! Three") == ["One.", "Two!", "Three"]
    assert split_sentences("  ") == []
