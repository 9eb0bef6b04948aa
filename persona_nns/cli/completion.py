"""What the tab key offers: experiments, models, grids, and what a store on this disk holds.

A shell asks at every press of the key, so that nothing here imports torch, zarr or xarray: a
store's folders are read as such, and an experiment's file is parsed and not executed.
"""

import ast
import json
import re
from collections.abc import Iterable, Iterator
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer

_GROUP = re.compile(r"\b[A-Z]\w*Options\b")


def experiment_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Experiments that the store on the line holds; all bundled ones where none is there."""
    held = [name for name, _ in _experiments(_given(ctx, "store"))]
    if not held:
        from persona_nns.declarations.shipped import bundled_experiments

        held = list(bundled_experiments())
    return _beginning(incomplete, held)


def run_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """What ``--run`` takes: groups, given names, and ``latest``."""
    asked = _given(ctx, "experiment")
    runs = [
        each
        for name, folder in _experiments(_given(ctx, "source") or _given(ctx, "store"))
        if asked in (None, name)
        for run, said in _groups(folder)
        for each in (run, said.get("name"))
        if each
    ]
    return _beginning(incomplete, [*runs, "latest"] if runs else [])


def one_run(ctx: typer.Context, incomplete: str) -> list[str]:
    """What ``export`` and ``rm`` take: experiments, and runs as ``experiment/run``."""
    found: list[str] = []
    for name, folder in _experiments(_given(ctx, "store")):
        found += [name, *(f"{name}/{run}" for run, _ in _groups(folder))]
    return _beginning(incomplete, found)


def variable_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """The variables of the experiment, or of the run, on the line."""
    named = _given(ctx, "experiment") or _given(ctx, "run") or ""
    experiment, _, asked = named.partition("/")
    for name, folder in _experiments(_given(ctx, "store")):
        for run, said in _groups(folder):
            if name == experiment and asked in ("", "latest", run, said.get("name")):
                return _beginning(incomplete, said.get("variables", []))
    return []


def grid_names(incomplete: str) -> list[str]:
    """The bundled grids."""
    from persona_nns.cli.arguments import GRIDS

    return _beginning(incomplete, GRIDS.split(", "))


def model_names(incomplete: str) -> list[str]:
    """The bundled models, and those that are fetched."""
    from persona_nns.cli.arguments import FETCHED
    from persona_nns.organism.bundled import ORGANISMS

    return _beginning(incomplete, [*ORGANISMS, *FETCHED.split(", ")])


def quick_command(name: str) -> Any:
    """The command of an experiment without what its file imports, for a line that is not run yet.

    Args:
        name: of a bundled experiment, or its file.
    """
    from persona_nns.declarations.shipped import bundled_experiments

    try:
        tree = ast.parse(bundled_experiments().get(name, Path(name)).read_bytes())
    except (OSError, SyntaxError, ValueError):
        tree = ast.Module([], [])
    from persona_nns.cli.run_command import without_checks
    from persona_nns.cli.run_options import SHARED

    shared = [each.replace(annotation=without_checks(each.annotation)) for each in SHARED.values()]
    own = [
        Parameter(
            name,
            Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[list[str] | None, typer.Option()],
        )
        for name in dict.fromkeys(_own_options(tree))
        if name not in SHARED
    ]

    def command(**_: Any) -> None:
        pass  # nothing is run while a line is completed

    command.__doc__ = (ast.get_docstring(tree) or "").partition("\n")[0]
    command.__signature__ = Signature([*shared, *own])  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False)
    app.command(name=name)(command)
    return typer.main.get_command(app)


def _own_options(tree: ast.Module) -> list[str]:
    """Names of the options that an experiment's file adds to those that all have.

    Those of a group, which is a dataclass elsewhere, are not among them.
    """
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [
        argument.arg
        for function in functions
        if function.name in ("plan", "measure")
        for argument in function.args.kwonlyargs
        if argument.annotation and not _GROUP.search(ast.unparse(argument.annotation))
    ]


def _given(ctx: typer.Context, name: str) -> str | None:
    """An argument on the line; behind an option without a value click leaves them unparsed."""
    if isinstance(value := ctx.params.get(name), str):
        return value
    names = [each.name for each in ctx.command.params if each.param_type_name == "argument"]
    place = names.index(name) if name in names else len(ctx.args)
    return ctx.args[place] if place < len(ctx.args) else None


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _experiments(store: str | None) -> Iterator[tuple[str, Path]]:
    """The experiments of a store on this disk, and their folders."""
    if store and "://" not in store:
        for name, _ in _groups(Path(store).expanduser()):
            yield name, Path(store).expanduser() / name


def _groups(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The groups in a folder, and what they say of themselves."""
    for file in sorted(folder.glob("*/zarr.json")):
        try:
            said = json.loads(file.read_bytes())
        except (OSError, ValueError):
            continue
        if said.get("node_type") == "group":
            yield file.parent.name, said.get("attributes") or {}
