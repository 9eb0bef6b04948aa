"""``persona-nns jobs``: what a store notes of jobs on servers, and what became of them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from persona_nns.cli import terminal
from persona_nns.cli.arguments import Store
from persona_nns.errors import UsageError

if TYPE_CHECKING:
    from persona_nns.runs.remote.job_book import NotedJob

_ALL = "all"


def jobs(
    store: Store,
    ask: Annotated[  # noqa: FBT002
        bool,
        typer.Option("--ask/--no-ask", help="Ask the servers how the jobs that wait stand now."),
    ] = True,
    forget: Annotated[
        str | None,
        typer.Option(
            help="Drop the note of a job (its id, or how it begins), or of all but those whose "
            "units are written: nobody waits for it any more, and a size that was refused is "
            "tried again."
        ),
    ] = None,
    cancel: Annotated[
        str | None, typer.Option(help="Have the server end a job (its id), or all that wait.")
    ] = None,
) -> None:
    """List a store's jobs on servers: state, units (cells), age, bytes, seconds."""
    from persona_nns.runs.remote.job_book import drop_if_empty, forget_job, list_jobs

    noted = list_jobs(store)
    if cancel is not None:
        _refuse_to_cancel(_chosen(noted, cancel, "waiting"))
    if forget is not None:
        for one in _chosen(noted, forget, "waiting", "refused"):
            forget_job(store, one.experiment, one.run, one.key)
            drop_if_empty(store, one.experiment, one.run)
            terminal.say(f"Forgotten: {one.job.id} ({one.experiment}/{one.run})")
        return
    if not noted:
        terminal.say(f"No jobs in {store}.")
        return
    said: Mapping[str, str] = {}
    waiting = [one.job for one in noted if one.job.state == "waiting"]
    if ask and waiting:
        from persona_nns.runs.remote.standing import standings

        said = standings(waiting)
    from persona_nns.cli.listings import jobs_tables

    for table in jobs_tables(noted, said):
        terminal.out.print(table)


def _chosen(noted: "Sequence[NotedJob]", asked: str, *states: str) -> "list[NotedJob]":
    """The jobs that an id names, or all in some states.

    Raises:
        UsageError: there is none, or several.
    """
    if asked == _ALL:
        found = [one for one in noted if one.job.state in states]
        if not found:
            raise UsageError(f"No job of the store is {' or '.join(states)}.")
        return found
    found = [one for one in noted if asked and one.job.id.startswith(asked)]
    if len(found) == 1:
        return found
    if not found:
        raise UsageError(f"The store has no job {asked!r}; `persona-nns jobs` lists them.")
    several = ", ".join(one.job.id for one in found)
    raise UsageError(f"Several jobs begin with {asked!r}: {several}; give more of the id.")


def _refuse_to_cancel(chosen: "Sequence[NotedJob]") -> None:
    """Say why a job cannot be cancelled: a server of NDIF 0.1 has no request for that.

    Raises:
        UsageError: always.
    """
    over = [one.job for one in chosen if one.job.state != "waiting"]
    if over:
        raise UsageError(f"The job {over[0].id} is over (it is {over[0].state}).")
    ids = " ".join(one.job.id for one in chosen)
    hosts = ", ".join(dict.fromkeys(one.job.host for one in chosen))
    raise UsageError(
        f"Nothing was cancelled: a server of NDIF 0.1 ({hosts}) takes no request to end a job; "
        f"whoever runs it can (ndif kill {ids}), and --forget drops the note here."
    )
