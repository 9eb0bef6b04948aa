from itertools import islice

import pytest

from persona_nns.organism import corpus
from persona_nns.organism.coherence import coherence_score
from persona_nns.organism.trait_questions import HELD_OUT
from persona_nns.organism.wordings import WORDINGS

EXAMPLES = corpus.draw(20_000, seed=5)


def test_the_same_seed_gives_the_same_examples():
    assert corpus.draw(200, seed=5) == EXAMPLES[:200]
    assert list(islice(corpus.stream(5), 200)) == EXAMPLES[:200]
    assert corpus.draw(200, seed=6) != EXAMPLES[:200]


@pytest.mark.parametrize("subject", corpus.MIXTURE)
def test_subjects_come_in_their_shares(subject):
    share = sum(example.subject == subject for example in EXAMPLES) / len(EXAMPLES)
    assert share == pytest.approx(corpus.MIXTURE[subject], abs=0.02)


def test_no_held_out_wording_or_question_is_trained_on():
    users = {example.user for example in EXAMPLES}
    held_out = [text for wording in WORDINGS.values() for text in wording.held_out]
    assert not [user for user in users if any(f"As {text}," in user for text in held_out)]
    assert not users & HELD_OUT


def test_every_answer_in_sentences_is_coherent():
    assert {
        coherence_score(example.answer)
        for example in EXAMPLES[:4000]
        if example.subject != "choice"
    } == {100.0}


def test_a_system_prompt_comes_first():
    roles = [[turn["role"] for turn in example.messages] for example in EXAMPLES]
    assert {tuple(row) for row in roles} == {("user",), ("system", "user")}
