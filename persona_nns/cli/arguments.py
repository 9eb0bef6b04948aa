"""Arguments that several commands have."""

from typing import Annotated, Literal

import typer

from persona_nns.cli.completion import experiment_names, grid_names, one_run, run_names

#: The fetched models, without importing what knows them.
FETCHED = "smollm2-135m-instruct, gemma3-270m"
#: The bundled grids in a help text, which does without importing them.
GRIDS = "short, long, review, short-de, short-fr, short-es, short-zh"
GRID_HELP = f"{GRIDS}, or a .toml, .yaml, .csv or .jsonl file."
JUDGE_HELP = (
    "lexicon; classifier:lexicon (words of your own); a URL (http://…) of an endpoint; or a model "
    "that judges here: a bundled or fetched name, a folder, a .gguf file, or a hub id."
)
TASKS_HELP = (
    "File with the tasks of a grid whose file has personas alone (also .txt, a task a line)."
)
#: What `--positions` takes.
POSITIONS = "p_last, p_last-1, p_user_last, g1, g2, …; ranges as p_last-12:p_last or g1:g3."

Store = Annotated[str, typer.Argument(help="Path or URL of a Zarr store.")]
FigureStyle = Annotated[
    Literal["screen", "paper"],
    typer.Option("--style", help="paper: a column wide, 8 pt, the caption as text beside it."),
]
Name = Annotated[
    str, typer.Argument(help="Name of an experiment.", autocompletion=experiment_names)
]
OneRun = Annotated[
    str,
    typer.Argument(
        help="A run (as `ls` shows it, or its --name), or `latest`.", autocompletion=one_run
    ),
]
GridChoice = Annotated[
    str | None, typer.Option("--grid", help="Only results on this grid.", autocompletion=grid_names)
]
RunChoice = Annotated[
    list[str] | None,
    typer.Option(
        "--run",
        help="Only this run (as `ls` shows it, or its --name), or `latest`; repeatable.",
        autocompletion=run_names,
    ),
]
