"""Which experiments there are, and how a file becomes one.

An experiment is a Python file with a docstring (its first line is the summary), ``variables``
(name → `Variable`) and ``measure(model, cells, *, layers, positions, …)``. It may set
``defaults`` for grid, layers, layer sets and positions, ``figures`` (name → function of the
result), and ``protocol_version``, to be raised by hand whenever a change alters the numbers;
without it, every edit of the code that they come from counts as another version (`source`).

One that does not run on a grid of personas and tasks also has ``plan(tokenizer, *, …)``, which
makes a `Plan` of its inputs: the units, with their token ids, that `measure` then gets instead of
cells. The keyword arguments of both are the experiment's options; one that `plan` alone takes is
known by the plan's content, not by its value. Where `plan` has an argument ``model``, it gets the
label of the model; an option called ``grid`` is what is given as the grid. Options that belong
together may be a group: a frozen dataclass, documented under ``Attributes:``, that a function takes
as one keyword argument annotated with it. Its fields are options of the same names, so that what it
holds is given, stored and shown like all others.

One that runs on a grid, and needs to know more than a cell at a time, has
``arrange(tokenizer, plan, cells, *, …)``. It gets the grid's `Plan`, the cells that are asked for
and those options of `measure` that it names. It returns the plan with more ``axes`` (a label for
each token of the longest persona, say), with other units in place of the cells, each with its
cell's label and place, or with those ``variables`` alone that the options ask for. No number may
depend on which cells are asked for: a run keeps what it has.

Two more functions run where the command runs, whatever machine `measure` runs on.
``prepare(model, store, options, *, progress)`` runs what has to be there first and returns the
options that say where it is; where it does so with some options only, ``prepares(options)`` says
with which. ``finish(tokenizer, units, measured, *, …)`` makes the declared
variables of what `measure` returned (decodes and judges texts, say); its keyword arguments are
options of `plan` or `measure`, or have a default.
"""

import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from persona_nns.declarations.checks import check_declarations, check_finish, site_axes_of
from persona_nns.declarations.function_code import FunctionCode, shown_file
from persona_nns.declarations.options import options_of
from persona_nns.declarations.plans import Plan, content_digest
from persona_nns.declarations.shipped import bundled_experiments
from persona_nns.declarations.source import Code
from persona_nns.declarations.variables import Variable
from persona_nns.errors import PersonaError, UsageError


@dataclass(frozen=True)
class Experiment:
    """An experiment, from a file or of a function.

    Attributes:
        name: its file's stem, or the function's name.
        file: where it is; None of a function.
        code: of a function, its source and what it uses; None of a file.
        summary: first line of its docstring.
        version: its protocol version, or the digest of its source.
        variables: what `measure` returns, by name.
        measure: the function with the tracing contexts.
        plan: the function that makes units of the inputs; None where they are a grid's cells.
        plan_only: options of `plan` that `measure` does not take.
        arrange: the function that says more of a grid's plan; None where nothing is to be said.
        site_axes: dimensions whose labels every experiment has, where its `measure` asks for
            them.
        prepare: the function that runs what has to be there first; None where nothing has.
        prepares: whether it does so with some options; None where it does with any.
        finish: the function that makes the variables of what `measure` returned; None where
            they are what it returned.
        options: those of `plan` and `measure`, beside those that all experiments share.
        grid: the grid where none is given; None where one has to be, or is of no use.
        layers: request for layers where none is given; None where it has no layers.
        layer_sets: request for sets of layers where none is given; None where it has none.
        positions: request for positions where none is given; None where it has no positions.
        reuses: it can reuse prefixes (``reuse``), and do without.
        keeps_residuals: it can return its residuals too (``keep_residuals``).
        figures: functions of the result, by name.
    """

    name: str
    file: Path | None
    code: FunctionCode | None
    summary: str
    version: str
    variables: Mapping[str, Variable]
    measure: Callable[..., dict[str, Any]]
    plan: Callable[..., Plan] | None
    plan_only: frozenset[str]
    arrange: Callable[..., Plan] | None
    site_axes: frozenset[str]
    prepare: Callable[..., dict[str, Any]] | None
    prepares: Callable[[Mapping[str, Any]], bool] | None
    finish: Callable[..., dict[str, Any]] | None
    options: Mapping[str, inspect.Parameter]
    grid: str | None
    layers: str | None
    layer_sets: str | None
    positions: str | None
    reuses: bool
    keeps_residuals: bool
    figures: Mapping[str, Callable[..., Any]]

    @property
    def is_shipped(self) -> bool:
        """Whether it is one of the package's own."""
        return self.file in {file.resolve() for file in bundled_experiments().values()}

    @property
    def called(self) -> str:
        """What its `measure` is called in messages."""
        return f"measure() of {self.name!r}" if self.code is None else f"{self.name}()"

    def is_own_file(self, file: str) -> bool:
        """Whether a file, or a notebook's cell, has some of its code."""
        if self.code is not None:
            return file in self.code.files
        return self.file is not None and self.file.parent in Path(file).parents


def load_experiment(name: str | Path) -> Experiment:
    """Load a bundled experiment by its name, or any ``.py`` file by its path.

    Raises:
        UsageError: no such experiment.
        PersonaError: the file does not run, or is not an experiment.
    """
    bundled = bundled_experiments()
    file = bundled.get(str(name), Path(name))
    if file.suffix != ".py":
        raise UsageError(
            f"Unknown experiment {str(name)!r}; use {', '.join(bundled)}, or a path ending in .py."
        )
    if not os.path.isfile(file):  # False, too, for what can be no path
        raise UsageError(f"The experiment file {str(name)!r} does not exist.")
    return _loaded(file.resolve(), str(name))


#: Experiments by their file, with the code that they were read from.
_LOADED: dict[Path, tuple[Code, Experiment]] = {}


def _loaded(file: Path, shown: str) -> Experiment:
    """An experiment as its file is now: executed anew where any of its code has changed."""
    if file in _LOADED and _LOADED[file][0].is_as_read():
        return _LOADED[file][1]
    try:
        code = Code(file)
    except (SyntaxError, ValueError, OSError) as error:
        raise PersonaError(
            f"The experiment file {shown!r} does not run: {type(error).__name__}: {error}."
        ) from error
    if file in _LOADED:
        _LOADED.pop(file)[0].forget()
    code.forget()
    experiment = _read(file, code)
    _LOADED[file] = code, experiment
    return experiment


def _read(file: Path, code: Code) -> Experiment:
    module = _execute(file)
    variables = getattr(module, "variables", None)
    if not callable(getattr(module, "measure", None)) or not isinstance(variables, dict):
        variables = None
    if not variables:
        raise PersonaError(
            f"{str(file)!r} is not an experiment: it has to define 'variables' (name to Variable) "
            "and a function 'measure(model, cells, *, layers, positions)'."
        )
    return experiment_of(
        module,
        file.stem,
        source=repr(str(file)),
        summary=(inspect.getdoc(module) or "").partition("\n")[0],
        version=str(getattr(module, "protocol_version", code.digest)),
        file=file,
    )


def experiment_of(
    declared: Any,
    name: str,
    *,
    source: str,
    summary: str,
    version: str,
    file: Path | None = None,
    code: FunctionCode | None = None,
) -> Experiment:
    """An experiment of what declares it.

    Args:
        declared: has ``variables`` and ``measure``, and what else an experiment may have.
        name: of the experiment.
        source: what declares it, for messages.
        summary: what it is about.
        version: its protocol version.
        file: that it stands in.
        code: of a function.

    Raises:
        PersonaError: what is declared cannot be an experiment.
    """
    variables, measure = declared.variables, declared.measure
    parameters = options_of(measure, 2)
    plan = getattr(declared, "plan", None)
    of_plan = {} if plan is None else options_of(plan, 1)
    of_plan.pop("model", None)
    finish = getattr(declared, "finish", None)
    if finish is not None:
        check_finish(source, finish, {**of_plan, **parameters})
    plan_only = frozenset(set(of_plan) - set(parameters))
    arrange = getattr(declared, "arrange", None)
    check_declarations(
        source,
        variables,
        {**of_plan, **parameters},
        on_grid=plan is None,
        labelled=plan is None and arrange is None,
    )
    site_axes = site_axes_of(parameters)
    defaults = getattr(declared, "defaults", {})

    def site(name: str, otherwise: str) -> str | None:
        """What is asked for by default, where `measure` has such an argument."""
        return defaults.get(name, otherwise) if parameters.pop(name, None) else None

    return Experiment(
        name=name,
        file=file,
        code=code,
        summary=summary,
        version=version,
        variables=variables,
        measure=cast("Callable[..., dict[str, Any]]", measure),
        plan=cast("Callable[..., Plan] | None", plan),
        plan_only=plan_only,
        arrange=cast("Callable[..., Plan] | None", arrange),
        site_axes=frozenset(site_axes),
        prepare=getattr(declared, "prepare", None),
        prepares=getattr(declared, "prepares", None),
        finish=finish,
        grid=defaults.get("grid"),
        layers=site("layers", "all"),
        layer_sets=site("layer_sets", "0.55"),
        positions=site("positions", "p_last"),
        reuses=parameters.pop("reuse", None) is not None,
        keeps_residuals=parameters.pop("keep_residuals", None) is not None,
        options={**of_plan, **parameters},
        figures=getattr(declared, "figures", {}),
    )


@contextmanager
def shown_where(experiment: Experiment) -> Iterator[None]:
    """Add to what is raised in here where in the experiment's own files it comes from."""
    try:
        yield
    except PersonaError:
        raise
    except Exception as error:
        if place := _place_of(error, experiment.is_own_file):
            error.add_note(place)
        if isinstance(error, UnboundLocalError):
            error.add_note(
                "What a trace sets is known after it only where it was saved: name = save(...)."
            )
        raise


def _place_of(error: BaseException, is_own: Callable[[str], bool]) -> str:
    """The innermost line of one's own files that an exception went through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if is_own(frame.filename)]
    return f"{shown_file(own[-1].filename)}, line {own[-1].lineno}: {own[-1].line}" if own else ""


def _execute(file: Path) -> Any:
    # Two files may have one name.
    name = f"persona_nns_experiment_{file.stem}_{content_digest(str(file))[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(file.parent))  # as for a script: what lies beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        place = _place_of(error, lambda name: file.parent in Path(name).parents)
        raise PersonaError(
            f"The experiment file {str(file)!r} does not run: {type(error).__name__}: {error}"
            + (f" ({place})." if place else ".")
        ) from error
    finally:
        sys.path.remove(str(file.parent))
    return module
