from persona_nns.prompts.markers import find_markers


def test_single_words_stand_on_word_boundaries():
    assert find_markers("Shipping is not a relationship.", ["ship", "shipping"]) == ["shipping"]


def test_markers_with_a_space_or_hyphen_are_substrings():
    text = "Single points of failure; capital-efficiently."
    assert find_markers(text, ["points of fail", "capital-efficient"]) == [
        "points of fail",
        "capital-efficient",
    ]


def test_case_does_not_matter():
    assert find_markers("a spof", ["SPOF"]) == ["SPOF"]
