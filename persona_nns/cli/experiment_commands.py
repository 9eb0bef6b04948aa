"""Which commands there are under ``persona-nns run``."""

from typing import TYPE_CHECKING, Any

from typer.core import TyperGroup

if TYPE_CHECKING:
    from persona_nns.declarations.catalog import Experiment


class ExperimentCommands(TyperGroup):
    """The commands under ``run``: bundled experiments by name, and any ``.py`` file."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        """The bundled experiments."""
        from persona_nns.declarations.shipped import bundled_experiments

        return list(bundled_experiments())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of one experiment."""
        if ctx.resilient_parsing:  # the tab key was pressed
            from persona_nns.cli.completion import quick_command

            return quick_command(cmd_name)
        import persona_nns.runs.threads  # noqa: F401 - from now on it sees which cores are idle
        from persona_nns.declarations.catalog import load_experiment

        return self.command_of(load_experiment(cmd_name))

    def command_of(self, experiment: "Experiment") -> Any:
        """The command that runs one experiment."""
        from persona_nns.cli.run_command import experiment_command

        return experiment_command(experiment)
