"""README and documentation: blocks run, commands parse, links lead somewhere, numbers are known."""

import subprocess
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
from pages import (
    DOCS,
    PAGES,
    README,
    ROOT,
    Block,
    anchors_of,
    blocks_of,
    commands_of,
    decimals_in,
    links_of,
    name_of,
    prose_of,
)
from readme_example import EXAMPLE
from test_help import commands
from typer.exceptions import TyperException
from typer.main import get_command

from persona_nns.cli import app
from persona_nns.declarations import bundled_experiments

# In words, where nothing is left out of a command.
LEFT_OUT = {"…", "..."}


def test_the_readme_fits_a_screen_or_two() -> None:
    assert len(README.read_bytes()) <= 6000
    assert len(EXAMPLE.strip().splitlines()) < 30


def test_the_readme_names_the_two_commands() -> None:
    text = README.read_text("utf-8")
    assert "\nmake demo " in text
    assert "\nmake test " in text


def parse(arguments: list[str]) -> None:
    """Parse a command as the command line does, and go no further."""
    complete = not LEFT_OUT & set(arguments)
    command: Any = get_command(app)
    if arguments[:1] and "completion" in arguments[0]:  # parsing it would change the shell's files
        assert arguments[0] in [option for known in command.params for option in known.opts]
        return
    rest, context, path = [word for word in arguments if word not in LEFT_OUT], None, "persona-nns"
    while True:
        try:
            context = command.make_context(path, rest, parent=context)
        except typer.Exit:  # it was asked for help
            return
        except TyperException as error:
            if complete or type(error).__name__ != "MissingParameter":
                raise
            return
        if not hasattr(command, "resolve_command"):
            return
        rest = [*context._protected_args, *context.args]
        if not rest:
            return
        path, command, rest = command.resolve_command(context, rest)


def write_files(page: Path) -> None:
    """Save what a page says to save."""
    for block in blocks_of(page):
        if block.file:
            Path(block.file).write_text(block.text, "utf-8")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_is_one(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(page)
    wrong = []
    for block in blocks_of(page):
        for arguments in commands_of(block):
            try:
                parse(arguments)
            except Exception as error:
                shown = " ".join(arguments)
                wrong.append(f"{name_of(page)}:{block.line}: persona-nns {shown}: {error!r}")
    assert not wrong


@pytest.mark.parametrize(
    "arguments",
    [
        ["runn", "localized_positions"],
        ["run", "localised_positions", "--model", "m", "--grid", "short"],
        ["run", "localized_positions", "--model", "m", "--grid", "short", "--layer", "3"],
        ["run", "localized_positions", "--model", "m"],
        ["show", "store.zarr"],
    ],
    ids=" ".join,
)
def test_what_is_no_command_is_noticed(arguments: list[str]) -> None:
    with pytest.raises(Exception, match=r"o such|nknown|issing"):
        parse(arguments)


RUN = [page for page in PAGES if any(block.is_run for block in blocks_of(page))]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which `persona-nns` starts at once: its imports are done."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS)
        patch.setenv("MPLBACKEND", "Agg")
        with import_module("preloaded").preloaded(tmp_path_factory.mktemp("preloaded")) as found:
            yield found


@pytest.mark.parametrize(
    "page",
    [pytest.param(x, marks=[] if x == README else pytest.mark.slow, id=name_of(x)) for x in RUN],
)
def test_every_block_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: dict[str, str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", programs["PATH"])
    monkeypatch.setenv("MPLBACKEND", "Agg")
    write_files(page)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.is_run:
            run(block, names)


def run(block: Block, names: dict[str, Any]) -> None:
    """Run a block; those in Python share their names."""
    if block.language == "bash":
        command = ["bash", "-euo", "pipefail", "-c", block.text]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{name_of(block.page)}:{block.line}\n{done.stderr}"
    else:
        file = Path(f"block_{block.line}.py").absolute()  # nnsight reads the source of traces
        file.write_text(block.text, "utf-8")
        exec(compile(block.text, file, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for link in links_of(page):
        address, _, anchor = link.partition("#")
        if "://" in address or address.startswith("mailto:"):
            continue
        target = (page.parent / address).resolve() if address else page
        inside = target.exists() and ROOT in target.parents
        if not inside or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    assert broken == []


def numbers_of(folder: Path) -> set[str]:
    """Every decimal number in the tables below a folder."""
    tables = [table for table in folder.rglob("*.csv") if "_build" not in table.parts]
    return decimals_in(" ".join(table.read_text("utf-8") for table in tables))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_number_is_in_a_table_that_a_command_wrote(page: Path) -> None:
    known = numbers_of(DOCS / "findings" if page.stem == "findings" else DOCS)
    assert decimals_in(prose_of(page)) - known == set()


def test_every_command_is_on_the_reference_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS / "extensions")
    made = import_module("command_line")
    listed = {section["names"][0]: section.astext() for section in sections(made.Commands)}
    assert set(listed) == {path[0] for path in commands(get_command(app)) if path}
    assert "--bootstrap" in listed["show"]
    of_run = {part["names"][0]: part for part in sections(made.ExperimentOptions)}
    assert set(of_run) == {"shared options", *bundled_experiments()}
    assert "--batch-size" in of_run["shared options"].astext()
    assert "--bands" in of_run["kv_graft"].astext()
    assert "```{commands}" in (DOCS / "reference" / "commands.md").read_text("utf-8")
    assert "```{experiment-options}" in (DOCS / "reference" / "experiments.md").read_text("utf-8")


def sections(directive: Any) -> list[Any]:
    """What a directive makes, asked of it without a page."""
    return directive.run(object.__new__(directive))


def test_every_experiment_has_a_page() -> None:
    pages = {page.stem for page in (DOCS / "experiments").glob("*.md")} - {"index"}
    assert pages == set(bundled_experiments())
