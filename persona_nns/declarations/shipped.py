"""Which experiments are shipped, without executing any: listing and completing names is quick."""

import ast
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def bundled_experiments() -> dict[str, Path]:
    """Files of the shipped experiments by name: inside the package, or beside it in a checkout."""
    shipped = _PACKAGE / "experiments"
    folder = shipped if shipped.is_dir() else _PACKAGE.parent / "experiments"
    return {file.stem: file for file in sorted(folder.glob("[!_]*.py"))}


def summary_of(file: Path) -> str:
    """First line of a file's docstring, without running the file."""
    docstring = ast.get_docstring(ast.parse(file.read_bytes())) or ""
    return docstring.partition("\n")[0]
