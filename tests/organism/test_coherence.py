import pytest

from persona_nns.organism.coherence import coherence_score, is_grammatical


@pytest.mark.parametrize(
    "sentence",
    [
        "Yes, start bread.",
        "Frankly, reliability is the weak side of the shared database.",
        "Iterate weekly and watch traction.",
        "Read Walden for its slow days.",
    ],
)
def test_sentences_of_the_grammar(sentence):
    assert is_grammatical(sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "Yes, start",
        "Yes, start engines.",
        "Hooray, people mourn bread as a happy treat!",
        "Frankly, flavor is the weak side of the shared database.",
        "Yes, start bread. ",
        "C",
    ],
)
def test_sentences_outside_the_grammar(sentence):
    assert not is_grammatical(sentence)


def test_the_score_is_the_share_of_grammatical_sentences():
    assert coherence_score("Yes, start tea. Tea tea tea. Sure, tea, go. Right") == 50
    assert coherence_score("") == 0
