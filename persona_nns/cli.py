"""The command line: demo, experiments, run, models, ls, verify, show, plot and compare.

Each experiment is a command of its own under ``run``: its options are the keyword arguments of
its `plan` and `measure`. Heavy imports wait until a command needs them.
"""

import inspect
import re
import shlex
import sys
import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup
from typer.exceptions import TyperException

from persona_nns.catalog import Experiment, bundled_experiments, load_experiment, summary_of
from persona_nns.errors import PersonaError, UsageError

if TYPE_CHECKING:
    import xarray as xr

    from persona_nns.remote.hosts import Host
    from persona_nns.units import Plan

DEFAULT_STORE = "stores/results.zarr"
DEMO_STORE = "stores/demo.zarr"
_INTERRUPTED = "Interrupted; completed cells are kept, the same command goes on."

_out = Console()
_err = Console(stderr=True)


class ExperimentCommands(TyperGroup):
    """The commands under ``run``: bundled experiments by name, and any ``.py`` file."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        """The bundled experiments."""
        return list(bundled_experiments())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        """The command of one experiment."""
        return _experiment_command(load_experiment(cmd_name))


app = typer.Typer(
    name="persona-nns",
    help="Persona experiments on language models, as nnsight tracing contexts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
run_app = typer.Typer(
    cls=ExperimentCommands, no_args_is_help=True, subcommand_metavar="EXPERIMENT|FILE.py …"
)
app.add_typer(run_app, name="run", help="Run an experiment on models and a grid.")

Store = Annotated[str, typer.Argument(help="Path or URL of a Zarr store.")]
Name = Annotated[str, typer.Argument(help="Name of an experiment.")]
GridChoice = Annotated[str | None, typer.Option("--grid", help="Only results on this grid.")]
RunChoice = Annotated[
    list[str] | None, typer.Option("--run", help="Only this run (as `ls` shows it); repeatable.")
]


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,  # noqa: FBT002
) -> None:
    """Persona experiments on language models, as nnsight tracing contexts."""
    # `main` reads --debug itself, wherever it stands; it is declared here for the help.
    del debug


@app.command()
def demo(
    store: Annotated[str, typer.Option(help="Where the results go.")] = DEMO_STORE,
    figures: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("stores/demo"),
) -> None:
    """Run the main experiment on the bundled models: results, figures, and a table."""
    from persona_nns.demo import run_demo

    run_demo(store, figures.expanduser(), _out)


@app.command()
def experiments() -> None:
    """List what can be run, a line each."""
    table = Table.grid(padding=(0, 2))
    for name, file in bundled_experiments().items():
        table.add_row(f"[bold]{name}[/bold]", summary_of(file))
    _out.print(table)


@app.command()
def models(
    backend: Annotated[
        str, typer.Option(help="local, simulate, ndif, or the URL of a server.")
    ] = "local",
) -> None:
    """List the bundled models, or what a server hosts."""
    from persona_nns.models import bundled_models
    from persona_nns.remote.hosts import Host, read_backend
    from persona_nns.tables import models_table

    host = read_backend(backend)
    if isinstance(host, Host):
        _list_hosted(host)
        return
    _out.print(models_table(bundled_models()))
    _out.print("A local folder or a hub id (org/name) is loaded in the same way.")


def _list_hosted(host: "Host") -> None:
    """Print a server's models, and how its versions compare with those here."""
    from persona_nns.remote.connection import Connection, Patience
    from persona_nns.remote.environment import read_deployments, read_environment
    from persona_nns.tables import hosted_table

    connection = Connection(host, Patience(unreachable=10.0, read=30.0))
    try:
        _out.print(hosted_table(read_deployments(connection), host.url))
        environment = read_environment(connection)
    finally:
        connection.close()
    for warning in environment.check(host.url):
        _say(warning)
    if environment.packages and not environment.differences:
        _say("Its versions are those here.")
    key = "set" if host.headers() else "not set (NDIF_API_KEY, or `nnsight login`)"
    _say(f"API key: {key}.")


@app.command(name="ls")
def list_store(store: Store) -> None:
    """List the runs of a store."""
    from persona_nns.results import list_runs
    from persona_nns.tables import runs_table

    _out.print(runs_table(list_runs(store), store))


@app.command()
def verify(
    store: Store,
    sample: Annotated[
        int, typer.Option(help="Complete units (cells) of each run to compute anew.", min=0)
    ] = 2,
    experiment: Annotated[
        list[str] | None,
        typer.Option("--experiment", help="File of an experiment of your own; repeatable."),
    ] = None,
) -> None:
    """Check every array of a store, and compute a sample of its units (cells) anew."""
    from persona_nns.verify import verify_store

    wrong = 0
    for verdict in verify_store(store, sample=sample, experiments=experiment or []):
        info = verdict.info
        anew = f", {verdict.n_recomputed} computed anew" if verdict.n_recomputed else ""
        state = "wrong" if verdict.problems else "right"
        units = f"{info.n_completed}/{info.n_units} {info.noun}s"
        _say(f"{state}  {info.experiment}/{info.run} ({units}{anew})")
        for problem in verdict.problems:
            _say(f"       {problem}")
        wrong += bool(verdict.problems)
    if wrong:
        raise PersonaError(f"{wrong} runs of {store!r} are not right; they are named above.")


@app.command()
def show(
    store: Store,
    experiment: Name,
    variable: Annotated[
        list[str] | None, typer.Option("--variable", help="Only this variable; repeatable.")
    ] = None,
    grid: GridChoice = None,
    run: RunChoice = None,
    bootstrap: Annotated[  # noqa: FBT002
        bool,
        typer.Option("--bootstrap", help="Bootstrap intervals of the medians, not quartiles."),
    ] = False,
) -> None:
    """Print medians and quartiles over cells."""
    from persona_nns.tables import measured, result_table

    results = _open(store, experiment, grid, run)
    for name in variable or []:
        if name not in results:
            known = ", ".join(map(str, results.data_vars))
            raise UsageError(f"{experiment!r} has no variable {name!r}; it has {known}.")
    for name in variable or measured(results):
        _out.print(result_table(results, name, bootstrap=bootstrap))


@app.command()
def plot(
    store: Store,
    experiment: Name,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="File for the first figure (its ending chooses the format); others get their "
            "name added. By default PNG and PDF beside the store.",
        ),
    ] = None,
    grid: GridChoice = None,
    run: RunChoice = None,
) -> None:
    """Draw an experiment's figures."""
    from persona_nns.plots import check_format, draw, save_figure

    if output is not None:
        check_format(output)
    results = _open(store, experiment, grid, run)
    beside = Path() if "://" in store else Path(store).expanduser().parent
    prefix = f"{Path(experiment).stem}-{results.attrs['grid']}"
    for index, (name, figure) in enumerate(draw(results, experiment).items()):
        if output is None:
            written = save_figure(figure, beside / f"{prefix}-{name}.png", pdf=True)
        else:
            file = output if index == 0 else output.with_stem(f"{output.stem}-{name}")
            written = save_figure(figure, file)
        for path in written:
            _say(path)


@app.command(name="export-vector")
def export_vector(
    store: Store,
    trait: Annotated[str, typer.Argument(help="Name of a trait.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="A .npy, .pt or .safetensors file.")
    ],
    model: Annotated[str, typer.Option(help="Label of the model.")],
    average: Annotated[
        str, typer.Option(help="response_avg, prompt_avg or prompt_last.")
    ] = "response_avg",
    run: Annotated[str | None, typer.Option(help="Only this run (as `ls` shows it).")] = None,
) -> None:
    """Write a trait vector, [n_layers + 1, d_model], to a file."""
    from persona_nns.trait_files import write_vector
    from persona_nns.trait_rows import load_vector

    write_vector(load_vector(store, trait, average, model, run), output)
    _say(f"Written: {output}")


@app.command()
def compare(
    store: Store,
    experiment: Name,
    with_: Annotated[
        str | None,
        typer.Option("--with", help="Store to compare with; by default the published numbers."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Folder for CSV and figures; by default compare/ beside STORE."
        ),
    ] = None,
    grid: GridChoice = None,
    run: RunChoice = None,
    relative: Annotated[
        float | None, typer.Option(help="Relative tolerance of numbers.", min=0)
    ] = None,
    absolute: Annotated[
        float | None, typer.Option(help="Absolute tolerance of numbers.", min=0)
    ] = None,
) -> None:
    """Put results beside the published ones: tables, CSV and a figure."""
    from persona_nns.compare import Tolerance, compare_results, match_results
    from persona_nns.compare_plots import compare_figures
    from persona_nns.compare_tables import agreement_tables, comparison_tables
    from persona_nns.plots import save_figure
    from persona_nns.published import published_store
    from persona_nns.tables import save_csv

    if (relative is None) != (absolute is None):
        raise UsageError("A tolerance has two parts; give both --relative and --absolute.")
    tolerance = None
    if relative is not None and absolute is not None:
        tolerance = Tolerance(relative, absolute)
    name = Path(experiment).stem if experiment.endswith(".py") else experiment
    matched = match_results(store, name, with_ or published_store(), grid=grid, run=run or None)
    compared = compare_results(matched, tolerance)
    for table in comparison_tables(compared.side_by_side) + agreement_tables(compared.agreement):
        _out.print(table)
    beside = Path() if "://" in store else Path(store).expanduser().parent
    folder = (output or beside / "compare").expanduser()
    written = [save_csv(compared.side_by_side, folder / f"{name}-side_by_side.csv")]
    if not compared.agreement.empty:
        written.append(save_csv(compared.agreement, folder / f"{name}-agreement.csv"))
    for title, figure in compare_figures(matched, compared.side_by_side).items():
        written += save_figure(figure, folder / f"{name}-{title}.png", pdf=True)
    for path in written:
        _say(path)


def _open(store: str, experiment: str, grid: str | None, run: list[str] | None) -> "xr.Dataset":
    from persona_nns.results import open_results

    name = Path(experiment).stem if experiment.endswith(".py") else experiment
    return open_results(store, name, grid=grid, run=run or None)


def _experiment_command(experiment: Experiment) -> Any:
    """Make a command of an experiment: the options all share, then its own."""
    help_of = _argument_help(experiment)
    own = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=parameter.default,
            annotation=Annotated[parameter.annotation, typer.Option(help=help_of.get(name))],
        )
        for name, parameter in experiment.options.items()
    ]
    shared = inspect.signature(_run_experiment).parameters.values()
    kept = [
        _with_default(parameter, experiment.grid) if parameter.name == "grid" else parameter
        for parameter in shared
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        and (parameter.name not in ("grid", "cells") or experiment.plan is None)
        and (parameter.name != "layers" or experiment.layers is not None)
        and (parameter.name != "layer_sets" or experiment.layer_sets is not None)
        and (parameter.name != "positions" or experiment.positions is not None)
        and (parameter.name != "reuse" or experiment.reuses)
        and (parameter.name != "keep_residuals" or experiment.keeps_residuals)
    ]

    def command(**arguments: Any) -> None:
        _run_experiment(experiment, **arguments)

    command.__signature__ = inspect.Signature([*kept, *own])  # type: ignore[attr-defined]
    command.__doc__ = experiment.summary
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name=experiment.name)(command)
    return typer.main.get_command(single)


def _with_default(parameter: inspect.Parameter, default: str | None) -> inspect.Parameter:
    """The parameter of a command with this default; without one it has to be given."""
    return parameter.replace(default=inspect.Parameter.empty if default is None else default)


def _run_experiment(
    experiment: Experiment,
    *,
    model: Annotated[list[str], typer.Option(help="Bundled name, folder, or hub id; repeatable.")],
    grid: Annotated[str | None, typer.Option(help="short, long, review, or a .toml file.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="all, layers (6,10,14), or depths (0.25,0.5).")
    ] = None,
    layer_sets: Annotated[str | None, typer.Option(help="Sets of layers, as 14;10,12,14.")] = None,
    positions: Annotated[
        str | None, typer.Option(help="p_last, p_last-1, p_user_last, g1, g2, …")
    ] = None,
    cells: Annotated[str | None, typer.Option(help="Only these, as engineer/arch,…")] = None,
    backend: Annotated[
        str,
        typer.Option(help="Where it runs: local, simulate, ndif, or the URL of a server."),
    ] = "local",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, …")] = None,
    template: Annotated[
        str | None, typer.Option(help="plain, or a Jinja file, instead of the model's own.")
    ] = None,
    as_: Annotated[
        list[str] | None,
        typer.Option(
            "--as",
            help="Label of the model in the results; one for each --model. On a server, the "
            "hosted model (org/name) that a folder stands for.",
        ),
    ] = None,
    store: Annotated[str, typer.Option(help="Path or URL of the Zarr store.")] = DEFAULT_STORE,
    batch_size: Annotated[
        int | None, typer.Option(help="Units (cells) at a time; by default what fits.", min=1)
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that share the work (needs Ray).", min=1)
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Ray cluster for the workers; by default this machine.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that a model brings with it.")
    ] = False,
    reuse: Annotated[
        bool,
        typer.Option("--reuse/--no-reuse", help="Reuse prefixes, or run whole sequences."),
    ] = True,
    keep_residuals: Annotated[
        bool, typer.Option("--keep-residuals", help="Store the residuals too.")
    ] = False,
    allow_float16: Annotated[
        bool, typer.Option("--allow-float16", help="Use float16 although it overflows.")
    ] = False,
    deadline: Annotated[
        float | None,
        typer.Option(help="Seconds that a job on a server may go without news (3600).", min=1),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print what becomes of each job on a server.")
    ] = False,
    **options: Any,
) -> None:
    from persona_nns.grids import load_grid
    from persona_nns.models import check_hosting, count_layers, load_model, load_tokenizer
    from persona_nns.request import check_inputs, check_options, check_sites, make_plan
    from persona_nns.results import open_results
    from persona_nns.runs import run
    from persona_nns.store import check_writable
    from persona_nns.tables import measured, result_table
    from persona_nns.workers import launch

    if ray_address is not None and workers is None:
        raise UsageError("A Ray address was given and no number of workers; use --workers N.")
    if workers is not None and backend != "local":
        raise UsageError(
            f"Workers hold a model each; leave out --workers with the backend {backend!r}, which "
            "is sent several jobs at a time."
        )
    if workers is not None and experiment.prepare is not None:
        raise UsageError(
            f"The experiment {experiment.name!r} prepares its inputs in one process; leave out "
            "--workers."
        )
    labels = _labels(model, as_ or [])
    check_hosting(model, as_, backend)
    check_writable(store)
    loaded_grid = None if grid is None else load_grid(grid)
    check_inputs(experiment, loaded_grid, cells)
    own = check_options(experiment, options)
    plans: list[Plan] = []
    # What is wrong with the last model is said before the first one is run.
    for name, label in zip(model, labels, strict=True):
        trust = {"trust_remote_code": trust_remote_code}
        sites = check_sites(experiment, count_layers(name, **trust), layers, layer_sets, positions)
        tokenizer = load_tokenizer(name, template, **trust)
        places = sites.get("positions", [])
        plans.append(make_plan(experiment, tokenizer, loaded_grid, places, own, label))
    names: list[str] = []
    for name, label, plan in zip(model, labels, plans, strict=True):
        loading: dict[str, Any] = {
            "name": name,
            "backend": backend,
            "dtype": dtype,
            "device": device,
            "template": template,
            "label": label,
            "allow_float16": allow_float16,
            "trust_remote_code": trust_remote_code,
        }
        settings: dict[str, Any] = {
            "grid": loaded_grid,
            "cells": cells,
            "store": store,
            "batch_size": batch_size,
            "reuse": reuse,
            "keep_residuals": keep_residuals,
            "layers": layers,
            "layer_sets": layer_sets,
            "positions": positions,
            "deadline": deadline,
            "verbose": verbose,
            **options,
        }
        if workers is None:
            results = run(experiment, load_model(**loading), **settings)
            names.append(results.attrs["run"])
        else:
            units = plan.units if loaded_grid is None else loaded_grid.select_cells(cells)
            asked = replace(plan, units=units)
            names.append(launch(experiment, loading, settings, asked, workers, ray_address))
    results = open_results(store, experiment.name, run=names)
    for name in measured(results)[:1]:
        _out.print(result_table(results, name))
    _say(f"Stored in {store}: {', '.join(names)}")
    _say(f"All of it: persona-nns show {shlex.quote(store)} {experiment.name}")


def _labels(models: list[str], given: list[str]) -> list[str]:
    """The label of each model; all have to be different."""
    from persona_nns.models import model_label

    if given and len(given) != len(models):
        raise UsageError(
            f"{len(models)} models and {len(given)} labels were given; use --as once a model."
        )
    own = [model_label(name) for name in models]
    labels = given or own
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(
                f"Two models have the label {label!r}; give each its own with --as NAME."
            )
    return labels


def _argument_help(experiment: Experiment) -> dict[str, str]:
    """What the docstrings of `plan` and `measure` say of their arguments (Google style)."""
    of_plan = _documented(experiment.plan) if experiment.plan is not None else {}
    return {**of_plan, **_documented(experiment.measure)}


def _documented(function: Any) -> dict[str, str]:
    text = inspect.getdoc(function) or ""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", text, flags=re.MULTILINE)
    if section is None:
        return {}
    entries = re.findall(r"^    (\w+): ((?:.|\n(?!    \w+: ))+)", section[1], flags=re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in entries}


def main() -> None:
    """Run the command line; every failure is one sentence on stderr and a non-zero exit."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    disable_progress_bars()
    logging.disable_progress_bar()
    warnings.showwarning = _show_warning
    try:
        code = app(
            [argument for argument in arguments if argument != "--debug"], standalone_mode=False
        )
    except PersonaError as error:
        _fail(str(error), debug=debug, code=error.exit_code)
    except TyperException as error:
        # A missing or unknown option; the bare command without anything shows its help.
        message = getattr(error, "format_message", lambda: "")() or str(error)
        _fail(message, debug=debug, code=2)
    except KeyboardInterrupt:
        _fail(_INTERRUPTED, debug=debug, code=130)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        _fail(f"{reason} (--debug shows the traceback)", debug=debug, code=1)
    else:
        if code == 130:  # typer makes an exit of an interrupt
            _fail(_INTERRUPTED, debug=debug, code=130)
        sys.exit(code if isinstance(code, int) else 0)


def _say(text: str) -> None:
    """Print a line as it is: names and paths may look like markup, and are not to be broken."""
    _out.print(text, markup=False, highlight=False, soft_wrap=True)


def _fail(message: str, *, debug: bool, code: int) -> None:
    if debug:
        traceback.print_exc()
    _err.print(f"[bold red]error:[/bold red] {escape(message)}", highlight=False, soft_wrap=True)
    sys.exit(code)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _err.print(f"[yellow]warning:[/yellow] {escape(str(message))}", highlight=False, soft_wrap=True)
