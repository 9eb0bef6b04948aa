"""The tutorial notebook says what happens: it is executed, in a kernel of its own."""

from pathlib import Path
from typing import Any

import pytest
from myst_nb.core.read import read_myst_markdown_notebook
from nbclient import NotebookClient
from nbformat import NotebookNode

PAGE = Path(__file__).parents[1] / "docs" / "guides" / "notebook.md"


@pytest.fixture(scope="module")
def notebook() -> NotebookNode:
    """The page with the outputs of its cells; any error in one is raised."""
    notebook = read_myst_markdown_notebook(PAGE.read_text())
    return NotebookClient(notebook, timeout=120, kernel_name="python3").execute()


def outputs(notebook: NotebookNode, beginning: str) -> list[dict[str, Any]]:
    """What stands below the first cell that has some text."""
    return next(cell for cell in notebook.cells if beginning in cell.source)["outputs"]


def shown(notebook: NotebookNode, text: str, kind: str = "text/plain") -> str:
    every = [
        each.get("data", {}).get(kind, each.get("text", "")) for each in outputs(notebook, text)
    ]
    return "\n".join(every)


def test_the_page_runs_and_shows_what_it_says(notebook: NotebookNode) -> None:
    assert "8 layers" in shown(notebook, "pn.load_model")
    assert shown(notebook, "pn.Grid(").count("/") == 4
    spans = shown(notebook, "prompt.spans")
    assert [line.split()[0] for line in spans.splitlines()] == ["prefix", "persona", "task", "tail"]
    assert "Y" in spans.splitlines()[1]
    assert "4 cells asked for, 0 complete: 4 to measure" in shown(notebook, "pn.explain")
    runs = [cell for cell in notebook.cells if "pn.run(persona_turn" in cell.source]
    first, again, edited = (str(cell.outputs) for cell in runs)
    assert "4 of 4 cells, " in first
    assert "4 of 4 cells complete, nothing computed" in again
    assert "complete" in edited
    assert "nothing computed" not in edited
    for drawn in ("turn.plot.line", "sns.heatmap"):
        assert shown(notebook, drawn, "image/png")
    assert shown(notebook, "pn.list_runs").count("4/4 cells") == 2
    assert "distance" not in shown(notebook, "json.loads")
    assert "def persona_turn(model, cells" in shown(notebook, "json.loads")


def test_the_page_is_short_and_one_idea_a_cell(notebook: NotebookNode) -> None:
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert max(source.count("\n") for source in code) < 17
