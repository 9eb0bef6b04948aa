"""``persona-nns models``: what can be run, here and on a server."""

from typing import TYPE_CHECKING, Annotated

import typer

from persona_nns.cli import terminal

if TYPE_CHECKING:
    from persona_nns.models.servers import Server


def models(
    backend: Annotated[
        str, typer.Option(help="local, simulate, ndif, or the URL of a server.")
    ] = "local",
    get: Annotated[
        str | None, typer.Option(help="Fetch a model now, so that no network is needed later.")
    ] = None,
) -> None:
    """List the models that come with the package or can be fetched, or what a server hosts."""
    from persona_nns.cli.listings import fetched_table, models_table
    from persona_nns.models.checkpoints import bundled_models
    from persona_nns.models.fetched import fetch_model, fetched_models
    from persona_nns.models.servers import Server, read_backend

    if get is not None:
        terminal.say(f"{get} is in {fetch_model(get)}")
        return

    server = read_backend(backend)
    if isinstance(server, Server):
        _list_hosted(server)
        return
    terminal.out.print(models_table(bundled_models()))
    terminal.out.print(fetched_table(fetched_models()))
    terminal.say("A model is fetched when it is first used, or by persona-nns models --get NAME.")
    terminal.say("A local folder, a .gguf file or a hub id (org/name) is loaded in the same way.")
    terminal.say("--adapter FOLDER|org/name of `run` puts a LoRA adapter on any of them.")


def _list_hosted(server: "Server") -> None:
    """Print a server's models, and how its versions compare with those here."""
    from persona_nns.cli.listings import hosted_table
    from persona_nns.runs.remote.connection import Connection, Patience
    from persona_nns.runs.remote.environment import read_deployments, read_environment

    connection = Connection(server, Patience(unreachable=10.0, read=30.0))
    try:
        terminal.out.print(hosted_table(read_deployments(connection), server.url))
        environment = read_environment(connection)
    finally:
        connection.close()
    for warning in environment.check(server.url):
        terminal.say(warning)
    if environment.packages and not environment.differences:
        terminal.say("Its versions are those here.")
    if not environment.attaches:
        terminal.say("It has no peft: no adapter can be attached there (--adapter).")
    key = "set" if server.headers() else "not set (NDIF_API_KEY, or `nnsight login`)"
    terminal.say(f"API key: {key}.")
