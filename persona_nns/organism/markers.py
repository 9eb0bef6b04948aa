"""Persona markers in a text, matched as the paper matches them."""

import re
from collections.abc import Iterable


def find_markers(text: str, markers: Iterable[str]) -> list[str]:
    """The markers that occur in a text, case-insensitively.

    A marker with a space or a hyphen is a substring test; any other stands on word boundaries.
    """
    lowered = text.lower()
    return [marker for marker in markers if _occurs(marker.lower(), lowered)]


def _occurs(marker: str, text: str) -> bool:
    if " " in marker or "-" in marker:
        return marker in text
    return re.search(rf"\b{re.escape(marker)}\b", text) is not None
