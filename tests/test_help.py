"""Every help text of the command line, and how little has to be imported for it."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

import persona_nns as pn
from persona_nns.cli import terminal
from persona_nns.cli.commands import app, main
from persona_nns.declarations.catalog import bundled_experiments, load_experiment

HEAVY = ("torch", "transformers", "nnsight", "scipy", "dask.array", "matplotlib", "openai")
PUBLISHED = Path(__file__).parents[1] / "stores" / "published"


def commands(command: Any, *names: str) -> Iterator[tuple[str, ...]]:
    """The names of a command and of all that are below it."""
    yield names
    for name in getattr(command, "commands", {}):
        yield from commands(command.commands[name], *names, name)


EVERY = [
    *commands(get_command(app)),
    *(("run", name) for name in bundled_experiments()),
]


@pytest.mark.parametrize("names", EVERY, ids=" ".join)
def test_a_help_text_is_whole_and_readable(names: tuple[str, ...]) -> None:
    found = CliRunner().invoke(app, [*names, "-h"], env={"COLUMNS": "240"})
    assert found.exit_code == 0
    for defect in ("Annotated", "FieldInfo", "typing.", "PROTOCOLS", "``", ", ,", "()", "\\["):
        assert defect not in found.output
    lines = [line.strip("│ ") for line in found.output.splitlines()]
    described = [line for line in lines if re.match(r"(\*? *)(--?[a-z]|[a-z-]+  )", line)]
    assert described
    for line in described:
        assert re.search(r">(?: \[[^\]]+\])? {2,}\S|^\S+ {2,}[A-Z]", line), line  # it says what


@pytest.mark.parametrize("name", bundled_experiments())
def test_the_help_says_which_layers_and_positions_are_measured_by_default(name: str) -> None:
    experiment = load_experiment(name)
    shown = CliRunner().invoke(app, ["run", name, "-h"], env={"COLUMNS": "240"}).output
    for option in ("layers", "layer_sets", "positions"):
        default = getattr(experiment, option)
        line = next((x for x in shown.splitlines() if f"--{option.replace('_', '-')} " in x), "")
        assert bool(line) == (default is not None)
        assert (default or "") in line.partition("[default: ")[2].replace(", ", ",")


def called(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[Any, ...]:
    monkeypatch.setattr(sys, "argv", ["persona-nns", *arguments])
    monkeypatch.setattr(terminal, "out", Console(width=200))
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, *capsys.readouterr()


@pytest.mark.parametrize("arguments", [(), ("run",), ("--debug",)], ids=" ".join)
def test_without_arguments_the_help_is_printed(
    arguments: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = called(monkeypatch, capsys, *arguments)
    assert (code, err) == (0, "")
    assert "Usage: persona-nns" in out
    assert "Commands" in out


def test_the_version_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = called(monkeypatch, capsys, "--version")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"persona-nns \d+\.\d+\S*\n", out)


def test_the_interface_can_be_listed() -> None:
    assert {"run", "open_results", "load_model", "Variable"} <= set(dir(pn))


@pytest.mark.parametrize(
    "arguments",
    [["ls", str(PUBLISHED)], ["show", str(PUBLISHED), "localized_positions", "--grid", "long"]],
    ids=lambda arguments: arguments[0],
)
def test_reading_a_store_imports_neither_models_nor_figures(arguments: list[str]) -> None:
    program = f"""
import sys
import persona_nns as pn
light = set(sys.modules)
from persona_nns.cli import main
for arguments in (["--help"], ["--version"], {arguments!r}):
    sys.argv = ["persona-nns", *arguments]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, arguments
print([name for name in {HEAVY!r} if sys.modules.get(name)])
print([name for name in ("numpy", "xarray", "zarr", "pydantic") if name in light])
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout.splitlines()[-2:] == ["[]", "[]"], ran.stderr
    assert "Qwen" in ran.stdout
