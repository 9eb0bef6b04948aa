"""``persona-nns report``: a store as one page."""

from pathlib import Path
from typing import Annotated

import typer

from persona_nns.cli import terminal
from persona_nns.cli.arguments import Store


def report(
    store: Store,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="The file; by default the store's name with .report.html, beside the store.",
        ),
    ] = None,
    experiment: Annotated[
        list[str] | None, typer.Option("--experiment", help="Only this experiment; repeatable.")
    ] = None,
) -> None:
    """Write a store as one HTML file to look at, to slice and to share; it needs no server."""
    from persona_nns.report.page import write_report

    written = write_report(store, output, experiments=experiment or ())
    runs = "1 run" if written.n_runs == 1 else f"{written.n_runs} runs"
    terminal.say(f"{written.file} ({written.size / 1e6:.1f} MB, {runs})")
    if written.left_out:
        terminal.say(f"Summaries alone, for want of room: {'; '.join(written.left_out)}.")
