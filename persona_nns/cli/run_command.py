"""The commands under ``persona-nns run``: one an experiment, its options those of its file.

An experiment's options are the keyword arguments of its `plan` and `measure`, and their help is
what its docstrings say of them. Heavy imports wait until a command needs them.
"""

import inspect
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

import typer
from rich.markup import escape

from persona_nns.cli import terminal
from persona_nns.cli.run_options import SHARED, AskedRun, runs_asked
from persona_nns.declarations.options import absolute
from persona_nns.errors import UsageError

if TYPE_CHECKING:
    from persona_nns.declarations.catalog import Experiment


def experiment_command(
    experiment: "Experiment",
    carry_out: "Callable[[Experiment, dict[str, Any]], None] | None" = None,
    more: Sequence[inspect.Parameter] = (),
) -> Any:
    """Make a command of an experiment: the options all share, then its own.

    Args:
        experiment: whose command it is.
        carry_out: takes the experiment and what was asked for; by default it is run.
        more: options of the command beside these.
    """
    carry_out = carry_out or run_experiment
    help_of = _argument_help(experiment)
    own = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=parameter.default,
            annotation=Annotated[
                without_checks(parameter.annotation), typer.Option(help=help_of.get(name))
            ],
        )
        for name, parameter in experiment.options.items()
    ]
    kept = [
        _as_of(parameter, experiment)
        for parameter in (*SHARED.values(), *more)
        if (parameter.name not in ("grid", "tasks", "frame", "cells") or experiment.plan is None)
        and (parameter.name != "layers" or experiment.layers is not None)
        and (parameter.name != "layer_sets" or experiment.layer_sets is not None)
        and (parameter.name != "positions" or experiment.positions is not None)
        and (parameter.name != "reuse" or experiment.reuses)
        and (parameter.name != "keep_residuals" or experiment.keeps_residuals)
    ]

    def command(**arguments: Any) -> None:
        carry_out(experiment, arguments)

    command.__signature__ = inspect.Signature([*kept, *own])  # type: ignore[attr-defined]
    command.__doc__ = escape(experiment.summary)
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name=experiment.name)(command)
    return typer.main.get_command(single)


def _as_of(parameter: inspect.Parameter, experiment: "Experiment") -> inspect.Parameter:
    """A shared parameter with what an experiment does by default."""
    if parameter.name == "grid":  # without a default it has to be given
        grid = inspect.Parameter.empty if experiment.grid is None else experiment.grid
        return parameter.replace(default=grid)
    plain, *_, option = get_args(parameter.annotation)
    if parameter.name not in ("layers", "layer_sets", "positions"):
        return parameter.replace(annotation=Annotated[without_checks(plain), option])
    sites = getattr(experiment, parameter.name)
    shown = copy(option)
    shown.show_default = _in_words(sites or "")
    return parameter.replace(default=sites, annotation=Annotated[plain, shown])


def _in_words(sites: str) -> bool | str:
    """How a default is shown: depths are other layers in each model; all else is as it is."""
    if not re.match(r"0?\.\d", sites):
        return True
    several = "s" if "," in sites else ""
    return f"the layer{several} at {sites.replace(',', ', ')} of the depth"


def without_checks(annotation: Any) -> Any:
    """A type of which the help shows only what it is: checks of its parts come when it runs."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return Annotated[without_checks(parts[0]), *parts[1:]]
    if origin is list or origin in (Union, UnionType):
        plain = [
            get_args(part)[0] if get_origin(part) is Annotated else without_checks(part)
            for part in parts
        ]
        return list[*plain] if origin is list else Union[*plain]
    return annotation


def run_experiment(experiment: "Experiment", arguments: dict[str, Any]) -> None:
    """Run an experiment as its command asks, and show what came of it."""
    from persona_nns.cli.listings import made_table, with_values
    from persona_nns.cli.shortening import shorten
    from persona_nns.figures.tables import result_table
    from persona_nns.models.load import load_model
    from persona_nns.results.reading import open_results
    from persona_nns.runs.run import run
    from persona_nns.runs.threads import set_threads

    store, workers = arguments["store"], arguments["workers"]
    _check_workers(experiment, arguments)
    if workers is None and arguments["backend"] == "local":
        set_threads(arguments["threads"])
    names: list[str] = []
    for asked in runs_asked(experiment, arguments):
        if workers is None:
            results = run(experiment, load_model(**asked.loading), **asked.settings)
            names.append(results.attrs["run"])
        else:
            names.append(_by_workers(experiment, asked, arguments))
    results = open_results(store, experiment.name, run=names)
    shown, left_out = shorten(results)
    for name in with_values(results)[:1]:
        terminal.out.print(result_table(shown, name))
    if not with_values(results):
        terminal.out.print(made_table(results))
    if "score" in results and "score" not in with_values(results):
        again = f"persona-nns rescore {shlex.quote(store)} {experiment.name} --judge …"
        terminal.say(f"Nobody judged the answers; {again} does.")
    if left_out:
        terminal.say(left_out.replace("--every-band", "`show --every-band`"))
    terminal.say(f"Stored in {store}: {', '.join(names)}")
    terminal.say(f"All of it: persona-nns show {shlex.quote(store)} {experiment.name}")


def _check_workers(experiment: "Experiment", arguments: Mapping[str, Any]) -> None:
    """See that a run can be shared by workers, where it is to be.

    Raises:
        UsageError: it cannot.
    """
    workers, backend = arguments["workers"], arguments["backend"]
    if arguments["ray_address"] is not None and workers is None:
        raise UsageError("A Ray address was given and no number of workers; use --workers N.")
    if workers is not None and backend != "local":
        raise UsageError(
            f"Workers hold a model each; leave out --workers with the backend {backend!r}, which "
            "is sent several jobs at a time."
        )
    options = {name: arguments[name] for name in arguments if name not in SHARED}
    prepares = experiment.prepares or (lambda _: experiment.prepare is not None)
    if workers is not None and prepares(options):
        raise UsageError(
            f"The experiment {experiment.name!r} prepares its inputs in one process; leave out "
            "--workers."
        )
    if experiment.prepares is not None and prepares(options) and len(arguments["model"]) > 1:
        raise UsageError(
            f"What {experiment.name!r} prepares is another for each model, and so are the results; "
            "give one --model at a time."
        )


def _by_workers(experiment: "Experiment", asked: AskedRun, arguments: Mapping[str, Any]) -> str:
    """Have a run carried out by workers; returns its name."""
    from persona_nns.runs.workers import launch

    grid = asked.settings["grid"]
    units = asked.plan.units if grid is None else grid.select_cells(arguments["cells"])
    # Workers need not stand in this folder.
    name = absolute(SHARED, {"model": asked.loading["name"]})["model"]
    return launch(
        experiment,
        {**absolute(SHARED, asked.loading), "name": name},
        absolute({**SHARED, **experiment.options}, asked.settings),
        replace(asked.plan, units=units),
        arguments["workers"],
        arguments["ray_address"],
        n_threads=arguments["threads"],
    )


def _argument_help(experiment: "Experiment") -> dict[str, str]:
    """What docstrings say of the options: those of `plan` and `measure`, and of their groups.

    A function's own words about an option of a group go before those of the group.
    """
    from docstring_parser import DocstringStyle, parse

    from persona_nns.declarations.options import groups_of

    said: dict[str, str] = {}
    for function in filter(None, (experiment.plan, experiment.measure)):
        bases = [base for group in groups_of(function) for base in reversed(group.__mro__)]
        for documented in (*bases, function):
            parsed = parse(documented.__doc__ or "", DocstringStyle.GOOGLE)
            said |= {of.arg_name: of.description or "" for of in parsed.params}
    return {name: _for_help(text) for name, text in said.items()}


def _for_help(text: str) -> str:
    """What a docstring says, for the terminal: on one line, and nothing in it is markup."""
    return escape(" ".join(text.split()).replace("``", "`"))
