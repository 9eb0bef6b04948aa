from dataclasses import replace

from persona_nns.prompts.grids import Grid
from persona_nns.prompts.markers import count_each, find_markers


def test_single_words_stand_on_word_boundaries():
    assert find_markers("Shipping is not a relationship.", ["ship", "shipping"]) == ["shipping"]


def test_markers_with_a_space_or_hyphen_are_substrings():
    text = "Single points of failure; capital-efficiently."
    assert find_markers(text, ["points of fail", "capital-efficient"]) == [
        "points of fail",
        "capital-efficient",
    ]


def test_markers_in_scripts_without_spaces_are_substrings():
    assert find_markers("他主张长期投资，反对剥削。", ["投资", "剥削", "股票"]) == ["投资", "剥削"]
    assert find_markers("Möge die Macht mit dir sein, Würde!", ["würde", "mach"]) == ["würde"]


def test_case_does_not_matter():
    assert find_markers("a spof", ["SPOF"]) == ["SPOF"]


def test_each_text_is_searched_for_the_markers_of_its_cell(small_grid: Grid) -> None:
    one, other, *_ = small_grid.cells
    cells = [replace(one, markers=("menu", "season")), other]
    texts = [[["A menu, a season.", "MENU"], [""]], [["menu"], []]]
    assert count_each(texts, cells) == [[[2, 1], [0]], [[-1], []]]
    assert count_each(["menu", "menu"], cells) == [1, -1]
