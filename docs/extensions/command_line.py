"""Sections of a page for the commands that there are: ``{commands}`` and ``{experiment-options}``.

What they say is asked of the command line itself, as ``--help`` is: nothing is kept by hand.
"""

import re
from collections.abc import Iterable
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx
from typer.main import get_command

from persona_nns.cli import app
from persona_nns.declarations import bundled_experiments, load_experiment

#: What all experiments share is said once, but for these: their defaults are the experiment's own.
OWN_DEFAULTS = ("grid", "layers", "layer_sets", "positions")


def _context(command: Any, path: str) -> Any:
    return command.make_context(path, [], resilient_parsing=True)


def _section(title: str, name: str) -> nodes.section:
    section = nodes.section(ids=[nodes.make_id(name)], names=[nodes.fully_normalize_name(name)])
    section += nodes.title("", "", nodes.literal("", title))
    return section


def _in_words(text: str) -> nodes.paragraph:
    """A paragraph of a help text, in which `words` between backticks and options are code."""
    paragraph = nodes.paragraph()
    for part in re.split(r"(`[^`]+`|--[a-z][\w-]*)", text.replace("\\[", "[")):
        code = part.startswith(("`", "--"))
        paragraph += nodes.literal("", part.strip("`")) if code else nodes.Text(part)
    return paragraph


def _records(records: Iterable[tuple[str, str]]) -> nodes.definition_list:
    items = [
        nodes.definition_list_item(
            "",
            nodes.term("", "", nodes.literal("", name)),
            nodes.definition("", _in_words(text or "")),
        )
        for name, text in records
    ]
    return nodes.definition_list("", *items)


def _records_of(command: Any, context: Any, names: Iterable[str] | None = None) -> list[Any]:
    chosen = [p for p in command.params if names is None or p.name in set(names)]
    found = [parameter.get_help_record(context) for parameter in chosen if parameter.name != "help"]
    return [record for record in found if record]


def _usage(context: Any) -> nodes.literal_block:
    usage = " ".join(context.command.get_usage(context).split()).removeprefix("Usage: ")
    return nodes.literal_block(usage, usage, language="text")


class Commands(Directive):
    """Every command, with its usage and its options."""

    def run(self) -> list[nodes.Node]:
        """A section for each."""
        root = get_command(app)
        made: list[nodes.Node] = []
        for name, command in getattr(root, "commands").items():  # noqa: B009 - of groups alone
            context = _context(command, f"persona-nns {name}")
            section = _section(name, name)
            section += _usage(context)
            for text in (command.help or "").split("\n\n"):
                section += _in_words(" ".join(text.split()))
            if name != "run" and (records := _records_of(command, context)):
                section += _records(records)
            made.append(section)
        return made


class ExperimentOptions(Directive):
    """The options that all experiments share, then those of each."""

    def run(self) -> list[nodes.Node]:
        """A section for what is shared, and one for each experiment."""
        run = getattr(get_command(app), "commands")["run"]  # noqa: B009 - of groups alone
        every = {name: run.command_of(load_experiment(name)) for name in bundled_experiments()}
        options = {name: [p.name for p in of.params] for name, of in every.items()}
        widest = max(options, key=lambda name: len(self._shared(every[name])))
        shared = self._shared(every[widest])
        context = _context(every[widest], f"persona-nns run {widest}")
        common = nodes.section(ids=["shared-options"], names=["shared options"])
        common += nodes.title("", "Options that experiments share")
        common += nodes.paragraph(
            "", "Each experiment has those of them that say something to it; its help shows which."
        )
        common += _records(
            record
            for record in _records_of(every[widest], context, set(shared) - set(OWN_DEFAULTS))
        )
        made: list[nodes.Node] = [common]
        for name, command in every.items():
            context = _context(command, f"persona-nns run {name}")
            section = _section(name, name)
            section += _in_words(" ".join((command.help or "").split()))
            section += _usage(context)
            own = {*(set(options[name]) - set(shared)), *OWN_DEFAULTS}
            if records := _records_of(command, context, own):
                section += _records(records)
            made.append(section)
        return made

    @staticmethod
    def _shared(command: Any) -> list[str]:
        """The options of a command that come before the experiment's own."""
        names = [parameter.name for parameter in command.params]
        return names[: names.index("called") + 1]


def setup(app: Sphinx) -> dict[str, Any]:
    """Make the directives known."""
    app.add_directive("commands", Commands)
    app.add_directive("experiment-options", ExperimentOptions)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
