"""Arguments that several commands have."""

from typing import Annotated

import typer

Store = Annotated[str, typer.Argument(help="Path or URL of a Zarr store.")]
Name = Annotated[str, typer.Argument(help="Name of an experiment.")]
GridChoice = Annotated[str | None, typer.Option("--grid", help="Only results on this grid.")]
RunChoice = Annotated[
    list[str] | None,
    typer.Option(
        "--run", help="Only this run (as `ls` shows it, or its --name), or `latest`; repeatable."
    ),
]
