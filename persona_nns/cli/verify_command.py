"""``persona-nns verify``: is a store right, wrong, or can it not be told?"""

from typing import Annotated

import typer

from persona_nns.cli import terminal
from persona_nns.cli.arguments import Store
from persona_nns.errors import PersonaError

_NOT_CHECKED = 3


def verify(
    store: Store,
    sample: Annotated[
        int, typer.Option(help="Complete units (cells) of each run to compute anew.", min=0)
    ] = 2,
    experiment: Annotated[
        list[str] | None,
        typer.Option("--experiment", help="File of an experiment of your own; repeatable."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="Folder where a model is now that was elsewhere, or that stood for a hosted "
            "one; known by its contents; repeatable.",
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help="ndif or the URL of a server: compute there what was made on a server; "
            "otherwise it is not checked.",
            show_default=False,
        ),
    ] = None,
    trust_remote_code: Annotated[  # noqa: FBT002
        bool, typer.Option("--trust-remote-code", help="Run code that a model brings with it.")
    ] = False,
) -> None:
    """Check every array of a store, and compute a sample of its units (cells) anew.

    A run is right, wrong, or not checked: its numbers cannot be computed anew here, and the reason
    is given. Exit code: 0 all are right; 1 some are wrong; 3 none is wrong, some are not checked;
    2 the request is wrong.
    """
    from persona_nns.runs.verify import verify_store

    states: list[str] = []
    for verdict in verify_store(
        store,
        sample=sample,
        experiments=experiment or [],
        models=model or [],
        backend=backend,
        trust_remote_code=trust_remote_code,
    ):
        info = verdict.info
        anew = f", {verdict.n_recomputed} computed anew" if verdict.n_recomputed else ""
        units = f"{info.n_completed}/{info.n_units} {info.noun}s"
        terminal.say(f"{verdict.state}  {info.experiment}/{info.run} ({units}{anew})")
        for reason in (*verdict.problems, *filter(None, [verdict.not_checked])):
            terminal.say(f"       {reason}")
        states.append(verdict.state)
    wrong, unchecked = states.count("wrong"), states.count("not checked")
    if wrong:
        also = f", and {unchecked} not checked" if unchecked else ""
        raise PersonaError(
            f"{wrong} of {len(states)} runs of {store!r} are wrong{also}; they are named above."
        )
    if unchecked:
        terminal.show_warning(
            f"Nothing in {store!r} is wrong, but {unchecked} of {len(states)} runs are not "
            "checked; the reasons are above."
        )
        raise typer.Exit(_NOT_CHECKED)
