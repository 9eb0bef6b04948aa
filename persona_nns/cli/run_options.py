"""What is asked of a run on the command line: the options that all experiments have, checked."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_nns.cli.arguments import GRID_HELP, POSITIONS, TASKS_HELP
from persona_nns.cli.completion import grid_names, model_names
from persona_nns.declarations.options import NamesFile
from persona_nns.errors import UsageError
from persona_nns.organism.bundled import ORGANISMS

if TYPE_CHECKING:
    from persona_nns.declarations.catalog import Experiment
    from persona_nns.declarations.plans import Plan
    from persona_nns.models.adapters import Adapter

DEFAULT_STORE = "stores/results.zarr"


def shared_options(
    *,
    model: Annotated[
        list[Annotated[str, NamesFile(ORGANISMS)]],
        typer.Option(
            help="Bundled name, folder, or hub id; repeatable.", autocompletion=model_names
        ),
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
    grid: Annotated[str | None, typer.Option(help=GRID_HELP, autocompletion=grid_names)] = None,
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
    device_map: Annotated[
        str | None,
        typer.Option(help="auto spreads a model over several devices; by default it is on one."),
    ] = None,
    quantise: Annotated[
        str | None,
        typer.Option(help="nf4 keeps weights in four bits (extra: quantise); by default whole."),
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
    cells_per_chunk: Annotated[
        int | None,
        typer.Option(
            help="Cells (units) that a file of the store holds, when a run is begun; by default 1 "
            "up to 1,000 cells, and more in larger grids, so that there are thousands of files "
            "and not a million.",
            min=1,
        ),
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
) -> None:
    """The options that all experiments share; each has those of them that it knows."""


#: They, as parameters by name.
SHARED = inspect.signature(shared_options).parameters


@dataclass(frozen=True)
class AskedRun:
    """A run of one model, whose request was checked without the model.

    Attributes:
        loading: arguments of `load_model`.
        settings: arguments of `run`, the grid and the experiment's own options among them.
        plan: what there is to measure.
    """

    loading: Mapping[str, Any]
    settings: Mapping[str, Any]
    plan: "Plan"


def runs_asked(experiment: "Experiment", arguments: Mapping[str, Any]) -> list[AskedRun]:
    """The runs that a command asks for, one a model; what is wrong with the last is said first.

    Args:
        experiment: what to measure.
        arguments: of its command, by name: shared options and its own.

    Raises:
        UsageError: the request is wrong.
        PersonaError: a model's files are not as they should be.
    """
    from persona_nns.models.checkpoints import count_layers, load_tokenizer
    from persona_nns.models.load import check_hosting
    from persona_nns.prompts.grids import load_grid
    from persona_nns.results.store import check_writable
    from persona_nns.runs.request import check_inputs, check_options, check_sites, make_plan

    given = {name: each.default for name, each in SHARED.items()} | dict(arguments)
    options = {name: given.pop(name) for name in arguments if name not in SHARED}
    if "grid" in experiment.options:  # an input among others
        options, given["grid"] = {**options, "grid": given["grid"]}, None
    models, backend = given["model"], given["backend"]
    adapters = _adapters(models, given["adapter"] or [])
    labels = _labels(models, adapters, given["as_"] or [])
    check_hosting(models, given["as_"], backend)
    check_writable(given["store"])
    grid = None
    if given["grid"] is not None:
        grid = load_grid(given["grid"], given["frame"], given["tasks"])
    check_inputs(experiment, grid, given["cells"])
    own = check_options(experiment, options)
    trust = {"trust_remote_code": given["trust_remote_code"]}
    sites = [given[name] for name in ("layers", "layer_sets", "positions")]
    runs: list[AskedRun] = []
    for name, beside, label in zip(models, adapters, labels, strict=True):
        places = check_sites(experiment, count_layers(name, **trust), *sites).get("positions", [])
        tokenizer = load_tokenizer(name, given["template"], adapter=beside, **trust)
        cells = given["cells"]
        plan = make_plan(experiment, tokenizer, grid, places, own, label, cells=cells)
        adapter = beside and beside.asked
        loading = {each: given[each] for each in _LOADING}
        loading |= {"name": name, "adapter": adapter, "label": label}
        settings = {each: given[each] for each in _SETTINGS}
        settings |= {"grid": grid, "name": given["called"], **options}
        runs.append(AskedRun(loading, settings, plan))
    return runs


# Of the shared options, arguments of `load_model` and of `run`.
_LOADING = (
    *("revision", "backend", "dtype", "device", "device_map", "quantise", "attention"),
    *("template", "allow_float16", "trust_remote_code"),
)
_SETTINGS = (
    *(
        "cells",
        "store",
        "batch_size",
        "cells_per_chunk",
        "reuse",
        "keep_residuals",
        "layers",
        "layer_sets",
    ),
    *("positions", "deadline", "verbose"),
)


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
