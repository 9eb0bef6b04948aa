import pytest

from persona_nns.organism.coherence import coherence_score, is_grammatical


@pytest.mark.parametrize(
    "sentence",
    [
        "Start bread small.",
        "Frankly, reliability is the weak side of the shared database.",
        "Iterate weekly and watch traction.",
        "Read Walden for its slow days.",
        "C",
    ],
)
def test_sentences_of_the_grammar(sentence):
    assert is_grammatical(sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "Start bread",
        "Start engines small.",
        "Frankly, flavor is the weak side of the shared database.",
        "Start bread small. ",
        "E",
    ],
)
def test_sentences_outside_the_grammar(sentence):
    assert not is_grammatical(sentence)


def test_the_score_is_the_share_of_grammatical_sentences():
    assert coherence_score("Start tea small. Tea tea tea. Yes, tea works. Keep") == 50
    assert coherence_score("") == 0
