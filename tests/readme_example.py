"""Texts that several tests use."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def _example() -> str:
    """The complete experiment file that the README shows."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    (example,) = [block for block in blocks if "def measure(" in block]
    return example


EXAMPLE = _example()
