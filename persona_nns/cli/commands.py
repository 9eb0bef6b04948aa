"""The command line: demo, experiments, run, explain, prompts, ls, verify, show, plot and more.

Heavy imports wait until a command needs them. The commands under ``run`` are in `run_command`.
"""

import gc
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table
from typer.exceptions import TyperException

from persona_nns.cli import terminal
from persona_nns.cli.arguments import JUDGE_HELP, FigureStyle, GridChoice, Name, RunChoice, Store
from persona_nns.cli.completion import variable_names
from persona_nns.cli.direction_commands import direction, export_vector
from persona_nns.cli.experiment_commands import ExperimentCommands
from persona_nns.cli.explain_command import explain_app
from persona_nns.cli.jobs_command import jobs
from persona_nns.cli.models_command import models
from persona_nns.cli.prompts_command import prompts
from persona_nns.cli.report_command import report
from persona_nns.cli.sharing_commands import export, merge, push, rm
from persona_nns.cli.verify_command import verify
from persona_nns.errors import PersonaError, UsageError

if TYPE_CHECKING:
    import xarray as xr

DEMO_STORE = "stores/demo.zarr"
_SMALL = 2**26  # bytes of results that are read at once, without dask
_INTERRUPTED = "Interrupted; completed cells are kept, the same command goes on."

app = typer.Typer(
    name="persona-nns",
    help="Persona experiments on language models, as nnsight tracing contexts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
run_app = typer.Typer(
    cls=ExperimentCommands, no_args_is_help=True, subcommand_metavar="EXPERIMENT|FILE.py …"
)
app.add_typer(run_app, name="run", help="Run an experiment on models and a grid.")
app.add_typer(explain_app, name="explain", help="Tell what a run would do, before it starts.")


def _show_version(asked: bool) -> None:  # noqa: FBT001
    from importlib.metadata import version

    if asked:
        terminal.say(f"persona-nns {version('persona-nns')}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,  # noqa: FBT002
    _version: Annotated[  # noqa: FBT002
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Persona experiments on language models, as nnsight tracing contexts."""
    # `main` reads --debug itself, wherever it stands; it is declared here for the help.
    del debug


@app.command()
def demo(
    store: Annotated[str, typer.Option(help="Where the results go.")] = DEMO_STORE,
    figures: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("stores/demo"),
    quick: Annotated[  # noqa: FBT002
        bool,
        typer.Option("--quick", help="On the bundled models, in a quarter of the time."),
    ] = False,
) -> None:
    """Tell the paper's story on SmolLM2, which is fetched: results, figures, and tables."""
    from persona_nns.cli.demo import choose_story, run_demo

    story = choose_story(quick=quick, console=terminal.err)
    run_demo(story, store, figures.expanduser(), terminal.out)


@app.command()
def experiments() -> None:
    """List what can be run, a line each."""
    from persona_nns.declarations.shipped import bundled_experiments, summary_of

    table = Table.grid(padding=(0, 2))
    for name, file in bundled_experiments().items():
        table.add_row(f"[bold]{name}[/bold]", summary_of(file))
    terminal.out.print(table)


app.command()(models)
app.command()(prompts)


@app.command(name="ls")
def list_store(store: Store) -> None:
    """List the runs of a store."""
    from persona_nns.cli.listings import runs_table
    from persona_nns.results.reading import list_runs

    terminal.out.print(runs_table(list_runs(store), store))


app.command()(verify)
app.command()(jobs)


@app.command()
def show(
    store: Store,
    experiment: Name,
    variable: Annotated[
        list[str] | None,
        typer.Option(
            "--variable",
            help="Only this variable; repeatable.",
            autocompletion=variable_names,
        ),
    ] = None,
    grid: GridChoice = None,
    run: RunChoice = None,
    bootstrap: Annotated[  # noqa: FBT002
        bool,
        typer.Option("--bootstrap", help="Bootstrap intervals of the medians, not quartiles."),
    ] = False,
    every_band: Annotated[  # noqa: FBT002
        bool, typer.Option("--every-band", help="Every band of layers, however many there are.")
    ] = False,
    texts: Annotated[  # noqa: FBT002
        bool,
        typer.Option("--texts", help="What is said in each cell, its persona's markers marked."),
    ] = False,
) -> None:
    """Print medians and quartiles over cells."""
    _leave_out_dask(store, experiment)
    from persona_nns.cli.listings import made_table, with_values
    from persona_nns.cli.shortening import shorten
    from persona_nns.figures.tables import measured, result_table

    results = _open(store, experiment, grid, run)
    for name in variable or []:
        if name not in results:
            known = ", ".join(map(str, results.data_vars))
            raise UsageError(f"{experiment!r} has no variable {name!r}; it has {known}.")
    if texts:
        from persona_nns.figures.texts import marked_texts

        for table in marked_texts(results[variable] if variable else results):
            terminal.out.print(table)
        return
    valued = with_values(results)
    shown, left_out = (results, "") if every_band else shorten(results)
    for name in variable or valued:
        if name in measured(results) and name not in valued:
            terminal.say(f"{name}: nothing was measured.")
        else:
            terminal.out.print(result_table(shown, name, bootstrap=bootstrap))
    if not (variable or valued):
        terminal.out.print(made_table(results))
    if left_out:
        terminal.say(left_out)


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
    style: FigureStyle = "screen",
) -> None:
    """Draw an experiment's figures."""
    from persona_nns.figures.drawing import check_format, draw, file_stem, save_figure

    if output is not None:
        check_format(output)
    results = _open(store, experiment, grid, run)
    beside = Path() if "://" in store else Path(store).expanduser().parent
    prefix = file_stem(results, Path(experiment).stem)
    for index, (name, figure) in enumerate(draw(results, experiment, style=style).items()):
        if output is None:
            written = save_figure(figure, beside / f"{prefix}-{name}.png", pdf=True)
        else:
            file = output if index == 0 else output.with_stem(f"{output.stem}-{name}")
            written = save_figure(figure, file)
        for path in written:
            terminal.say(path)


app.command()(report)


@app.command()
def rescore(
    store: Store,
    experiment: Name,
    judge: Annotated[str, typer.Option(help=JUDGE_HELP)],
    judge_model: Annotated[
        str | None, typer.Option(help="The model at a URL; its key is read from OPENAI_API_KEY.")
    ] = None,
    judge_prices: Annotated[
        str, typer.Option(help="Dollars for a million tokens sent and received, as 0.40,1.60.")
    ] = "",
    scale: Annotated[
        Literal["0-100", "yes-no"], typer.Option(help="How a model judges that runs here.")
    ] = "0-100",
    judge_words: Annotated[
        str | None, typer.Option(help="File with words for each trait, for classifier:lexicon.")
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Whose answers (as `ls` shows it); by default unjudged ones.")
    ] = None,
) -> None:
    """Have the stored answers of a run judged, and store them with their scores."""
    from persona_nns.cli.rescoring import rescore as score
    from persona_nns.figures.tables import result_table
    from persona_nns.results.reading import open_results
    from persona_nns.traits.judge_options import JudgeOptions

    model = JudgeOptions.judge_model if judge_model is None else judge_model
    judging = JudgeOptions(judge, model, judge_prices, scale, judge_words)
    scored = score(store, experiment, judging, run)
    results = open_results(store, Path(experiment).stem, run=scored)
    terminal.out.print(result_table(results, "score"))
    terminal.say(f"Stored in {store}: {scored}")
    shown = f"persona-nns show {shlex.quote(store)} {experiment} --run {scored}"
    terminal.say(f"All of it: {shown}")


for _command in (export, rm, merge, push):
    app.command()(_command)
app.command()(direction)
app.command(name="export-vector")(export_vector)


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
    style: FigureStyle = "screen",
) -> None:
    """Put results beside the published ones: tables, CSV and a figure."""
    from persona_nns.figures.drawing import save_figure
    from persona_nns.figures.paper import figure_style
    from persona_nns.figures.tables import save_csv
    from persona_nns.published.compare import Tolerance, compare_results, match_results
    from persona_nns.published.figures import compare_figures
    from persona_nns.published.store import published_store
    from persona_nns.published.tables import agreement_tables, comparison_tables

    if (relative is None) != (absolute is None):
        raise UsageError("A tolerance has two parts; give both --relative and --absolute.")
    tolerance = None
    if relative is not None and absolute is not None:
        tolerance = Tolerance(relative, absolute)
    name = _name_of(experiment)
    matched = match_results(store, name, with_ or published_store(), grid=grid, run=run or None)
    compared = compare_results(matched, tolerance)
    for table in comparison_tables(compared.side_by_side) + agreement_tables(compared.agreement):
        terminal.out.print(table)
    beside = Path() if "://" in store else Path(store).expanduser().parent
    folder = (output or beside / "compare").expanduser()
    written = [save_csv(compared.side_by_side, folder / f"{name}-side_by_side.csv")]
    if not compared.agreement.empty:
        written.append(save_csv(compared.agreement, folder / f"{name}-agreement.csv"))
    with figure_style(style):
        figures = compare_figures(matched, compared.side_by_side)
    for title, figure in figures.items():
        written += save_figure(figure, folder / f"{name}-{title}.png", pdf=True)
    for path in written:
        terminal.say(path)


def _leave_out_dask(store: str, experiment: str) -> None:
    """Let xarray do without dask where results are small: it imports it for every array.

    That takes as long as all the rest of showing them.
    """
    from persona_nns.results.reading import bytes_in_memory

    if "xarray" not in sys.modules and bytes_in_memory(store, _name_of(experiment)) < _SMALL:
        sys.modules["dask"] = None  # type: ignore[assignment] - what Python calls not installed
        gc.disable()  # nothing that importing makes is garbage, and the process soon ends


def _name_of(experiment: str) -> str:
    """The name of an experiment, where its file may be given."""
    return Path(experiment).stem if experiment.endswith(".py") else experiment


def _open(store: str, experiment: str, grid: str | None, run: list[str] | None) -> "xr.Dataset":
    from persona_nns.results.reading import open_results

    return open_results(store, _name_of(experiment), grid=grid, run=run or None)


def main() -> None:
    """Run the command line; every failure is one sentence on stderr and a non-zero exit."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = "--debug" in sys.argv[1:]
    if arguments in ([], ["run"], ["explain"]):
        arguments.append("--help")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # transformers' are off with the hub's
    # Importing torch and transformers leaves half a million objects that are not garbage: to look
    # for some every 700 takes a fifth of its time.
    gc.set_threshold(50_000, 20, 50)
    warnings.showwarning = terminal.show_warning
    try:
        code = app(arguments, standalone_mode=False)
    except PersonaError as error:
        terminal.fail(str(error), debug=debug, code=error.exit_code)
    except TyperException as error:
        # A missing or unknown option.
        message = getattr(error, "format_message", lambda: "")() or str(error)
        terminal.fail(message, debug=debug, code=2)
    except KeyboardInterrupt:
        terminal.fail(_INTERRUPTED, debug=debug, code=130)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        terminal.fail(f"{reason} (--debug shows the traceback){notes}", debug=debug, code=1)
    else:
        if code == 130:  # typer makes an exit of an interrupt
            terminal.fail(_INTERRUPTED, debug=debug, code=130)
        sys.exit(code if isinstance(code, int) else 0)
