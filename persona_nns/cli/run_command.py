"""The commands under ``persona-nns run``: one an experiment, its options those of its file.

An experiment's options are the keyword arguments of its `plan` and `measure`, and their help is
what its docstrings say of them. Heavy imports wait until a command needs them.
"""

import inspect
import re
import shlex
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

import typer
from rich.markup import escape

from persona_nns.cli import terminal
from persona_nns.cli.arguments import GRID_HELP, POSITIONS, TASKS_HELP
from persona_nns.declarations.options import NamesFile, absolute
from persona_nns.errors import UsageError
from persona_nns.organism.bundled import ORGANISMS

if TYPE_CHECKING:
    from persona_nns.declarations.catalog import Experiment
    from persona_nns.declarations.plans import Plan
    from persona_nns.models.adapters import Adapter

DEFAULT_STORE = "stores/results.zarr"


def experiment_command(experiment: "Experiment") -> Any:
    """Make a command of an experiment: the options all share, then its own."""
    help_of = _argument_help(experiment)
    own = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=parameter.default,
            annotation=Annotated[
                _without_checks(parameter.annotation), typer.Option(help=help_of.get(name))
            ],
        )
        for name, parameter in experiment.options.items()
    ]
    shared = inspect.signature(_run_experiment).parameters.values()
    kept = [
        _as_of(parameter, experiment)
        for parameter in shared
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        and (parameter.name not in ("grid", "tasks", "frame", "cells") or experiment.plan is None)
        and (parameter.name != "layers" or experiment.layers is not None)
        and (parameter.name != "layer_sets" or experiment.layer_sets is not None)
        and (parameter.name != "positions" or experiment.positions is not None)
        and (parameter.name != "reuse" or experiment.reuses)
        and (parameter.name != "keep_residuals" or experiment.keeps_residuals)
    ]

    def command(**arguments: Any) -> None:
        _run_experiment(experiment, **arguments)

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
        return parameter.replace(annotation=Annotated[_without_checks(plain), option])
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


def _without_checks(annotation: Any) -> Any:
    """A type of which the help shows only what it is: checks of its parts come when it runs."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return Annotated[_without_checks(parts[0]), *parts[1:]]
    if origin is list or origin in (Union, UnionType):
        plain = [
            get_args(part)[0] if get_origin(part) is Annotated else _without_checks(part)
            for part in parts
        ]
        return list[*plain] if origin is list else Union[*plain]
    return annotation


def _run_experiment(
    experiment: "Experiment",
    *,
    model: Annotated[
        list[Annotated[str, NamesFile(ORGANISMS)]],
        typer.Option(help="Bundled name, folder, or hub id; repeatable."),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder or hub id of a LoRA adapter (peft's) that is put on the model, one for "
            "each --model. A server fetches it itself."
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of the model on a server; by default its own."),
    ] = None,
    grid: Annotated[str | None, typer.Option(help=GRID_HELP)] = None,
    tasks: Annotated[str | None, typer.Option(help=TASKS_HELP)] = None,
    frame: Annotated[
        str | None,
        typer.Option(
            help="How persona and task are put to the model: role, system, later, or a .toml file; "
            "by default as the grid says."
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="all, layers (6,10,14), or depths (0.25,0.5).")
    ] = None,
    layer_sets: Annotated[str | None, typer.Option(help="Sets of layers, as 14;10,12,14.")] = None,
    positions: Annotated[str | None, typer.Option(help=POSITIONS)] = None,
    cells: Annotated[
        str | None, typer.Option(help="Only these, as engineer/arch,…; by default all of the grid.")
    ] = None,
    backend: Annotated[
        str,
        typer.Option(help="Where it runs: local, simulate, ndif, or the URL of a server."),
    ] = "local",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; by default the checkpoint's own (float32 for "
            "Gemma-2 and for float16 checkpoints)."
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:1, mps, …; by default cuda where there is one."),
    ] = None,
    attention: Annotated[str | None, typer.Option(help="eager or sdpa; by default eager.")] = None,
    template: Annotated[
        Annotated[str, NamesFile(("plain",))] | None,
        typer.Option(help="plain, or a Jinja file; by default the model's own."),
    ] = None,
    as_: Annotated[
        list[str] | None,
        typer.Option(
            "--as",
            help="Label of the model in the results, one for each --model; by default its own "
            "name. On a server, the hosted model (org/name) that a folder stands for.",
        ),
    ] = None,
    store: Annotated[
        str, NamesFile(made=True), typer.Option(help="Path or URL of the Zarr store.")
    ] = DEFAULT_STORE,
    batch_size: Annotated[
        int | None, typer.Option(help="Units (cells) at a time; by default what fits.", min=1)
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that share the work (needs Ray); by default this one alone.", min=1
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            help="Threads that torch computes with, in each process; by default what "
            "OMP_NUM_THREADS says, else the cores that other processes leave free.",
            min=1,
        ),
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
        typer.Option(
            help="Seconds that a job on a server may go without news; by default 3600.", min=1
        ),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print what becomes of each job on a server.")
    ] = False,
    called: Annotated[
        str | None,
        typer.Option(
            "--name", help="What the run is called: `show --run` and `plot --run` know it."
        ),
    ] = None,
    **options: Any,
) -> None:
    from persona_nns.cli.listings import made_table, with_values
    from persona_nns.cli.shortening import shorten
    from persona_nns.figures.tables import result_table
    from persona_nns.models.checkpoints import count_layers, load_tokenizer
    from persona_nns.models.load import check_hosting, load_model
    from persona_nns.prompts.grids import load_grid
    from persona_nns.results.reading import open_results
    from persona_nns.results.store import check_writable
    from persona_nns.runs.request import check_inputs, check_options, check_sites, make_plan
    from persona_nns.runs.run import run
    from persona_nns.runs.threads import set_threads
    from persona_nns.runs.workers import launch

    if ray_address is not None and workers is None:
        raise UsageError("A Ray address was given and no number of workers; use --workers N.")
    if workers is not None and backend != "local":
        raise UsageError(
            f"Workers hold a model each; leave out --workers with the backend {backend!r}, which "
            "is sent several jobs at a time."
        )
    prepares = experiment.prepares or (lambda _: experiment.prepare is not None)
    if workers is not None and prepares(options):
        raise UsageError(
            f"The experiment {experiment.name!r} prepares its inputs in one process; leave out "
            "--workers."
        )
    if experiment.prepares is not None and prepares(options) and len(model) > 1:
        raise UsageError(
            f"What {experiment.name!r} prepares is another for each model, and so are the results; "
            "give one --model at a time."
        )
    if workers is None and backend == "local":
        set_threads(threads)
    if "grid" in experiment.options:  # an input among others
        options, grid = {**options, "grid": grid}, None
    adapters = _adapters(model, adapter or [])
    labels = _labels(model, adapters, as_ or [])
    check_hosting(model, as_, backend)
    check_writable(store)
    loaded_grid = None if grid is None else load_grid(grid, frame, tasks)
    check_inputs(experiment, loaded_grid, cells)
    own = check_options(experiment, options)
    plans: list[Plan] = []
    # What is wrong with the last model is said before the first one is run.
    for name, beside, label in zip(model, adapters, labels, strict=True):
        trust = {"trust_remote_code": trust_remote_code}
        sites = check_sites(experiment, count_layers(name, **trust), layers, layer_sets, positions)
        tokenizer = load_tokenizer(name, template, adapter=beside, **trust)
        places = sites.get("positions", [])
        plans.append(make_plan(experiment, tokenizer, loaded_grid, places, own, label, cells=cells))
    names: list[str] = []
    for name, beside, label, plan in zip(model, adapters, labels, plans, strict=True):
        loading: dict[str, Any] = {
            "name": name,
            "adapter": beside and beside.asked,
            "revision": revision,
            "backend": backend,
            "dtype": dtype,
            "device": device,
            "attention": attention,
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
            "name": called,
            **options,
        }
        if workers is None:
            results = run(experiment, load_model(**loading), **settings)
            names.append(results.attrs["run"])
        else:
            units = plan.units if loaded_grid is None else loaded_grid.select_cells(cells)
            asked = replace(plan, units=units)
            # Workers need not stand in this folder.
            known = inspect.signature(_run_experiment).parameters
            there = absolute({**known, **experiment.options}, settings)
            its = {**absolute(known, loading), "name": absolute(known, {"model": name})["model"]}
            names.append(
                launch(experiment, its, there, asked, workers, ray_address, n_threads=threads)
            )
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


def _adapters(models: list[str], given: list[str]) -> "list[Adapter | None]":
    """What is put on each model; None where nothing is."""
    from persona_nns.models.adapters import find_adapter

    if given and len(given) != len(models):
        raise UsageError(
            f"{len(models)} models and {len(given)} adapters were given; use --adapter once a "
            "model, and name a model again for each adapter on it."
        )
    return [find_adapter(name) for name in given] or [None] * len(models)


def _labels(models: list[str], adapters: "Sequence[Adapter | None]", given: list[str]) -> list[str]:
    """The label of each model; all have to be different."""
    from persona_nns.models.checkpoints import model_label

    if given and len(given) != len(models):
        raise UsageError(
            f"{len(models)} models and {len(given)} labels were given; use --as once a model."
        )
    own = [model_label(*each) for each in zip(models, adapters, strict=True)]
    labels = given or own
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(
                f"Two models have the label {label!r}; give each its own with --as NAME."
            )
    return labels


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
