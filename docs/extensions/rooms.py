"""Sections of a page for what a room of the package offers: ``{room} tracing``.

The names are those of the room's face, ``__init__.pyi``; what is said of each is its docstring.
"""

import ast
import importlib
import inspect
from itertools import groupby
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

import persona_nns

PACKAGE = Path(persona_nns.__file__).parent
SHORT = 100  # characters of a value that is shown


def offered(room: str) -> list[tuple[str, str]]:
    """What a room offers: the module of each name, and the name, in the order of its face."""
    face = PACKAGE.joinpath(*room.split(".")[1:], "__init__.pyi")
    return [
        (f"{room}.{line.module}", alias.asname or alias.name)
        for line in ast.parse(face.read_text("utf-8")).body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    ]


def _entry(room: str, module: str, name: str, value: Any) -> list[str]:
    """What is said of a name; of what another room offers too, the index has that room's."""
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return _constant(f"{room}.{name}", module, name, value)
    kind = "autofunction" if inspect.isroutine(value) else "autoclass"
    home = room != "persona_nns" and f"{value.__module__}.".startswith(f"{room}.")
    options = ["   :members:"] if kind == "autoclass" else []
    options += [] if home else ["   :no-index:"]
    return [f".. {kind}:: {room}.{name}", *options, ""]


def _constant(path: str, module: str, name: str, value: Any) -> list[str]:
    """What is said of a constant: its value, where that is short, and the comment above it."""
    said = ModuleAnalyzer.for_module(module).find_attr_docs().get(("", name), [])
    shown = repr(value)
    options = [f"   :value: {shown}"] if len(shown) < SHORT else []
    return [f".. py:data:: {path}", *options, "", *(f"   {line}" for line in said), ""]


class Room(SphinxDirective):
    """What a room offers, a section for each of its modules."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Sections with what autodoc makes of each name."""
        room = self.arguments[0]
        face = importlib.import_module(room)
        made: list[nodes.Node] = []
        for module, names in groupby(offered(room), key=lambda pair: pair[0]):
            title = module.removeprefix(f"{room}.")
            section = nodes.section(ids=[nodes.make_id(title)], names=[title])
            section += nodes.title("", "", nodes.literal("", title))
            about = inspect.getdoc(importlib.import_module(module)) or ""
            lines = [" ".join(about.partition("\n\n")[0].split()), ""]
            for _, name in names:
                lines += _entry(room, module, name, getattr(face, name))
            self._parse(lines, section)
            made.append(section)
        return made

    def _parse(self, lines: list[str], section: nodes.section) -> None:
        fenced = ["````{eval-rst}", *lines, "````"]
        self.state.nested_parse(StringList(fenced, source=""), self.content_offset, section)


def setup(app: Sphinx) -> dict[str, Any]:
    """Make the directive known."""
    app.add_directive("room", Room)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
