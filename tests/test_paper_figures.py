"""Figures for a paper: their width, their letters, and their captions beside them."""

from itertools import pairwise
from pathlib import Path

import pytest
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.text import Text
from test_figures_say import by_layer, words

from persona_nns.figures import cells_heatmap, draw, figure_style, lines_by_layer, save_figure

POINTS_OF_AN_INCH = 72


@pytest.fixture(scope="module")
def results() -> xr.Dataset:
    return by_layer(6)


def letters(figure: Figure) -> set[float]:
    figure.canvas.draw()
    shown = [text for text in figure.findobj(Text) if text.get_text().strip()]  # type: ignore[arg-type]
    return {float(text.get_fontsize()) for text in shown}


def page_width(pdf: Path) -> float:
    box = pdf.read_bytes().partition(b"/MediaBox [")[2].partition(b"]")[0]
    return float(box.split()[2]) / POINTS_OF_AN_INCH


def test_a_figure_is_a_column_wide_in_eight_points_with_its_fonts_and_its_caption_beside_it(
    results: xr.Dataset, tmp_path: Path
) -> None:
    with figure_style("paper"):
        figure = lines_by_layer(results, ["kl"])
    assert letters(figure) == {8.0}
    written = save_figure(figure, tmp_path / "f.png", pdf=True)
    assert [Path(file).name for file in written] == ["f.png", "f.pdf", "f.txt"]
    assert page_width(tmp_path / "f.pdf") == pytest.approx(3.25)
    pdf = (tmp_path / "f.pdf").read_bytes()
    assert b"/FontFile2" in pdf  # TrueType, whole letters in the file
    assert b"/Type3" not in pdf
    caption = (tmp_path / "f.txt").read_text("utf-8")
    assert caption.startswith("e · g grid, 6 cells. Lines: median over cells;")
    assert "median over cells" not in words(figure)
    # On a screen the figure itself says the same.
    assert words(lines_by_layer(results, ["kl"])) == caption.strip().replace(". ", " ", 1)


def test_what_has_no_room_in_a_column_is_as_wide_as_the_page(results: xr.Dataset) -> None:
    three = xr.concat(
        [results.assign_coords(model=[name]) for name in "abc"], "model", join="outer"
    )
    with figure_style("paper"):
        assert lines_by_layer(three, ["kl"]).get_figwidth() == 6.75
        assert lines_by_layer(results, ["kl"]).get_figwidth() == 3.25
    assert lines_by_layer(results, ["kl"]).get_figwidth() > 3.25


def test_long_titles_and_labels_stay_within_their_panels(results: xr.Dataset) -> None:
    named = results.assign_coords(model=["a-model-of-a-rather-long-name"])
    with figure_style("paper"):
        figure = cells_heatmap(named, "kl", "persona")
    figure.canvas.draw()
    boxes = [axis.title.get_window_extent() for axis in figure.axes if axis.get_title()]
    assert len(boxes) > 1
    assert all(a.x1 < b.x0 for a, b in pairwise(boxes))


def test_figures_are_drawn_in_the_style_that_is_asked_for(results: xr.Dataset) -> None:
    for figure in draw(results, "mine", style="paper").values():
        assert figure.get_figwidth() in (3.25, 6.75)
    assert all(figure.get_figwidth() > 3.25 for figure in draw(results, "mine").values())
