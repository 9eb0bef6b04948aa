"""``persona-nns direction`` and ``export-vector``: directions from a store into files, and on."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from persona_nns.cli import terminal
from persona_nns.cli.arguments import Store

_Output = Annotated[
    Path,
    typer.Option(
        "-o",
        "--output",
        help="A .safetensors, .pt or .npy file, or .gguf for a control vector of llama.cpp.",
    ),
]
_Average = Annotated[
    str, typer.Option(help="Of a trait's vectors: response_avg, prompt_avg or prompt_last.")
]


def direction(
    source: Annotated[
        str,
        typer.Argument(help="STORE#axis, STORE#component:0, STORE#TRAIT (and @RUN), or a file."),
    ],
    output: _Output,
    model: Annotated[
        str | None, typer.Option(help="Label of the model, where the store has several.")
    ] = None,
    average: _Average = "response_avg",
    *,
    opposite: Annotated[
        bool,
        typer.Option(
            "--opposite",
            help="Write what points the other way: of an axis to the assistant, away from it.",
        ),
    ] = False,
) -> None:
    """Write a direction of a store to a file, or that of a file in another format."""
    _write(source, output, model, average, None, opposite=opposite)


def export_vector(
    store: Store,
    trait: Annotated[str, typer.Argument(help="Name of a trait.")],
    output: _Output,
    model: Annotated[str, typer.Option(help="Label of the model.")],
    average: _Average = "response_avg",
    run: Annotated[str | None, typer.Option(help="Only this run (as `ls` shows it).")] = None,
) -> None:
    """Write a trait vector to a file, (n_layers + 1, d_model)."""
    _write(f"{store}#{trait}", output, model, average, run)


def _write(
    source: str,
    output: Path,
    model: str | None,
    average: str,
    run: str | None,
    *,
    opposite: bool = False,
) -> None:
    from persona_nns.traits.directions import load_direction, save_direction

    found = load_direction(source, model, average=average, run=run)
    if opposite:
        found = replace(found, name=f"-{found.name}", vectors=-found.vectors)
    save_direction(found, output)
    terminal.say(f"Written: {output}")
