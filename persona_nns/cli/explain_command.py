"""The commands under ``persona-nns explain``: those under ``run``, told before they start."""

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_nns.cli import terminal
from persona_nns.cli.experiment_commands import ExperimentCommands

if TYPE_CHECKING:
    from persona_nns.declarations.catalog import Experiment

_CALIBRATE = inspect.Parameter(
    "calibrate",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Load the model and measure up to four units, to tell how long all of them take.",
        ),
    ],
)


class ExplainedCommands(ExperimentCommands):
    """The commands under ``explain``: with the arguments of those under ``run``."""

    def command_of(self, experiment: "Experiment") -> Any:
        """The command that tells what running one experiment would do."""
        from persona_nns.cli.run_command import experiment_command

        return experiment_command(experiment, _explain, [_CALIBRATE])


def _explain(experiment: "Experiment", arguments: dict[str, Any]) -> None:
    """Tell what running an experiment as its command asks would do."""
    from persona_nns.cli.run_options import SHARED, runs_asked
    from persona_nns.models.load import load_model, outline_model
    from persona_nns.runs.explain import check_explainable, explain_planned
    from persona_nns.runs.run import plan_run
    from persona_nns.runs.threads import set_threads

    calibrate = arguments.pop("calibrate")
    options = {name: arguments[name] for name in arguments if name not in SHARED}
    check_explainable(experiment, options)
    remote = arguments["backend"] != "local"
    if not remote:
        set_threads(arguments["threads"])
    load = load_model if calibrate and not remote else outline_model
    for asked in runs_asked(experiment, arguments):
        planned = plan_run(experiment, load(**asked.loading), **asked.settings)
        terminal.say(str(explain_planned(planned, calibrate=calibrate, remote=remote)))


explain_app = typer.Typer(
    cls=ExplainedCommands, no_args_is_help=True, subcommand_metavar="EXPERIMENT|FILE.py …"
)
