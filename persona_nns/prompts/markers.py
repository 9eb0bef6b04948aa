"""Persona markers in a text, matched as the paper matches them."""

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from persona_nns.errors import UsageError
from persona_nns.prompts.grids import Cell

#: What stands in place of a count where a persona has no markers.
NOT_COUNTED = -1

# A space, a hyphen, or a letter of a script without spaces: Thai, kana, Chinese characters.
_ANYWHERE = re.compile("[ \\-\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]")


def find_markers(text: str, markers: Iterable[str]) -> list[str]:
    """The markers that occur in a text, case-insensitively.

    A marker with a space or a hyphen is a substring test, and so is one in a script that puts
    nothing between words (Chinese, Japanese, Thai); any other stands on word boundaries.
    """
    lowered = text.lower()
    return [marker for marker in markers if _occurs(marker.lower(), lowered)]


def marker_spans(text: str, markers: Iterable[str]) -> list[range]:
    """Where markers stand in a text, each of them as often as it occurs, as `find_markers` does."""
    found = {marker.lower() for marker in find_markers(text, markers)}
    return [
        range(*match.span())
        for marker in sorted(found)
        for match in re.finditer(_pattern(marker), text, re.IGNORECASE)
    ]


def count_markers(text: str, cell: Cell) -> int:
    """How many different markers of the cell's persona occur in a text; −1 where it has none."""
    if not cell.markers:
        return NOT_COUNTED
    return len({marker.lower() for marker in find_markers(text, cell.markers)})


def count_each(texts: Sequence[Any], cells: Sequence[Cell]) -> list[Any]:
    """`count_markers` of each cell's text, or of all texts in what it has as lists of lists."""
    return [
        count_markers(of_cell, cell)
        if isinstance(of_cell, str)
        else count_each(of_cell, [cell] * len(of_cell))
        for of_cell, cell in zip(texts, cells, strict=True)
    ]


def require_markers(cells: Sequence[Cell]) -> None:
    """See that there is something to look for in every cell.

    Raises:
        UsageError: the grid has no markers for a persona.
    """
    if without := _without_markers(cells):
        raise UsageError(
            f"The grid has no markers for {', '.join(without)}; add a [markers] table to its file "
            "(persona key = list of words), or leave these personas out with --cells."
        )


def warn_without_markers(cells: Sequence[Cell]) -> None:
    """Warn of personas whose markers cannot be counted because the grid has none for them."""
    if without := _without_markers(cells):
        warnings.warn(
            f"The grid has no markers for {', '.join(without)}: there distinct_markers is "
            f"{NOT_COUNTED} and any_marker says nothing.",
            stacklevel=3,
        )


def _without_markers(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.persona for cell in cells if not cell.markers))


def _occurs(marker: str, text: str) -> bool:
    return re.search(_pattern(marker), text) is not None


def _pattern(marker: str) -> str:
    escaped = re.escape(marker)
    return escaped if _ANYWHERE.search(marker) else rf"\b{escaped}\b"
