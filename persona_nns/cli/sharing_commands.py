"""``persona-nns export``, ``rm``, ``merge``, ``push``: results that leave a store or enter it."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from persona_nns.cli import terminal
from persona_nns.cli.arguments import OneRun, RunChoice, Store
from persona_nns.cli.completion import one_run, variable_names
from persona_nns.errors import UsageError

if TYPE_CHECKING:
    from persona_nns.results.merging import Merged

_YES = typer.Option("--yes", "-y", help="Do not ask.")


def export(
    store: Store,
    run: Annotated[
        str,
        typer.Argument(
            help="A run (as `ls` shows it, or its --name), `latest`, or an experiment: all its "
            "models, joined.",
            autocompletion=one_run,
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="File to write: .csv, .parquet or .nc.")
    ],
    variable: Annotated[
        list[str] | None,
        typer.Option(
            "--variable", help="Only this variable; repeatable.", autocompletion=variable_names
        ),
    ] = None,
) -> None:
    """Write a run as a table for R, pandas or Excel, or as netCDF.

    A row for each cell, layer, position and so on; a column for each variable. Variables of other
    dimensions go to a table of their own beside FILE, and what the columns mean to
    FILE-columns.csv.
    """
    from persona_nns.results.choosing import open_chosen
    from persona_nns.results.exporting import export_results

    for file in export_results(open_chosen(store, run), output.expanduser(), variable):
        terminal.say(file)


def rm(store: Store, run: OneRun, yes: Annotated[bool, _YES] = False) -> None:  # noqa: FBT002
    """Remove a run from a store.

    What other runs took over from it stays with them: they have copies. Asks first; without a
    terminal, --yes is needed.
    """
    from persona_nns.results.choosing import choose_run
    from persona_nns.results.claims import at_work
    from persona_nns.results.removing import remove_run
    from persona_nns.results.store import begun_group

    experiment, _, name = run.rpartition("/")
    left = begun_group(store, experiment, name) if experiment and name else None
    try:
        info = choose_run(store, run)
    except UsageError:
        if left is None:  # a removal that was cut off leaves a group that is no run
            raise
        shown, elsewhere = f"what is left of {run}", at_work(left)[1]
    else:
        experiment, name = info.experiment, info.run
        shown = f"{experiment}/{name} ({info.n_completed}/{info.n_units} {info.noun}s complete)"
        elsewhere = at_work(info.group)[1]
    if elsewhere:
        terminal.show_warning(
            f"Not known to have ended: {', '.join(elsewhere)}; what computes a run while it is "
            "removed leaves a run that lacks units."
        )
    _ask(f"Remove {shown} from {store}?", yes=yes)
    remove_run(store, experiment, name)
    terminal.say(f"Removed: {experiment}/{name}")


def merge(
    target: Annotated[str, typer.Argument(help="Store that is added to; made if need be.")],
    source: Annotated[str, typer.Argument(help="Store that is read; it stays as it is.")],
    run: RunChoice = None,
) -> None:
    """Put the runs of one store into another: MERGE TARGET SOURCE.

    Runs that TARGET lacks are copied; of a run that both have, the cells that only SOURCE has are
    added. Where both have numbers, they have to be the same but for rounding (TARGET's stay);
    otherwise nothing is written. The same command goes on where it was cut off.
    """
    from persona_nns.results.hub import merge as put_into

    _say_merged(put_into(target, source, run or ()), target)


def push(
    store: Store,
    target: Annotated[
        str,
        typer.Argument(
            help="hf://datasets/USER/NAME, a folder in it, with @BRANCH after NAME if need be; or "
            "any other store."
        ),
    ],
    run: RunChoice = None,
    create: Annotated[
        Literal["private", "public"] | None,
        typer.Option(help="Make the dataset on the hub where there is none."),
    ] = None,
) -> None:
    """Publish a store, or some of its runs, as a dataset of the Hugging Face hub.

    As `merge` into a store there, in one commit, without what only this machine needs to know
    (names of machines, folders, jobs on servers). A dataset without README.md gets one. The token
    is that of `hf auth login`, or HF_TOKEN.
    """
    from persona_nns.results.hub import push as publish

    address, merged = publish(store, target, run or (), create=create)
    _say_merged(merged, address)


def _say_merged(merged: "Iterable[Merged]", target: str) -> None:
    for one in merged:
        how = "new" if one.is_new else f"{one.n_added} added"
        terminal.say(f"{one.experiment}/{one.run}: {how}, {one.n_complete}/{one.n_units} complete")
    terminal.say(f"In {target}")


def _ask(question: str, *, yes: bool) -> None:
    """Go on where somebody says so.

    Raises:
        UsageError: nobody can be asked.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("There is no terminal to ask at; --yes goes on without.")
    if not typer.confirm(question):
        raise typer.Exit(1)
