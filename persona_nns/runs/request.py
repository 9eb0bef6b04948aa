"""A request for a run, checked before anything is computed or written."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from nnsight import TransformersModel
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerBase

from persona_nns.declarations.catalog import Experiment, shown_where
from persona_nns.declarations.checks import check_axes
from persona_nns.declarations.options import arguments_of
from persona_nns.declarations.plans import Plan, Unit
from persona_nns.declarations.record import ModelRecord
from persona_nns.declarations.sites import parse_layer_sets, parse_layers, parse_positions
from persona_nns.declarations.variables import Variable
from persona_nns.errors import PersonaError, UsageError
from persona_nns.models.load import record_of
from persona_nns.prompts.grids import Grid
from persona_nns.results.block import Block
from persona_nns.runs.grid_plan import plan_grid
from persona_nns.runs.identity import identity, run_attributes, run_name
from persona_nns.runs.tokens import check_tokens


@dataclass(frozen=True)
class Asked:
    """What is asked of an experiment, model and grid, as `run` documents it."""

    layers: str | int | Sequence[int] | None = None
    layer_sets: str | int | Sequence[int | Sequence[int]] | None = None
    positions: str | Sequence[str] | None = None
    cells: str | Sequence[str] | None = None
    batch_size: int | None = None
    reuse: bool = True
    keep_residuals: bool = False
    deadline: float | None = None
    verbose: bool = False
    name: str | None = None
    cells_per_chunk: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Asked":
        """Keyword arguments of `run`; those that it does not name are the experiment's options."""
        own = {name: value for name, value in settings.items() if name not in _SHARED}
        return cls(**{name: settings[name] for name in settings if name in _SHARED}, options=own)

    def execution(self, experiment: Experiment) -> dict[str, bool]:
        """Keyword arguments of `measure` that do not change its numbers."""
        reuse = {"reuse": self.reuse} if experiment.reuses else {}
        return reuse | (
            {"keep_residuals": self.keep_residuals} if experiment.keeps_residuals else {}
        )


_SHARED = {each.name for each in fields(Asked)} - {"options"}


@dataclass(frozen=True)
class Request:
    """A checked request: nothing in it can still be a usage error.

    Attributes:
        experiment: what to measure.
        plan: what there is to measure.
        units: the units asked for.
        arguments: sites and options of `measure`.
        options: all options of the experiment.
        block: the group the results go to.
        residuals: the group for residuals below it, where they are kept.
    """

    experiment: Experiment
    plan: Plan
    units: tuple[Unit, ...]
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]
    block: Block
    residuals: Block | None

    @property
    def blocks(self) -> list[Block]:
        """Where a unit is written: residuals first, so that a completed unit has them."""
        return [block for block in (self.residuals, self.block) if block is not None]

    def as_hosted(self, precision: str, attention: str | None, revision: str | None) -> "Request":
        """The same request with what a server has told of the model.

        None of it is in the identity of a hosted run: the server decides, and is asked when the
        run has one. A run keeps to its precision and revision.
        """
        return replace(
            self,
            block=_computed(self.block, precision, attention, revision),
            residuals=self.residuals and _computed(self.residuals, precision, attention, revision),
        )

    def measuring(self, execution: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments of `measure`, with those that do not change its numbers."""
        return arguments_of(self.experiment.measure, {**self.arguments, **execution})

    def finish(
        self,
        tokenizer: PreTrainedTokenizerBase,
        units: Sequence[Unit],
        measured: dict[str, Any],
    ) -> dict[str, Any]:
        """The declared variables of what `measure` returned; runs where the command runs."""
        finish = self.experiment.finish
        if finish is None:
            return measured
        with shown_where(self.experiment):
            return finish(tokenizer, units, measured, **arguments_of(finish, self.options))

    def into(self, run: str) -> "Request":
        """The same request with its results in the group of this name."""
        residuals = self.residuals and replace(self.residuals, run=f"{run}/residuals")
        return replace(self, block=replace(self.block, run=run), residuals=residuals)


def check_request(
    experiment: Experiment,
    model: TransformersModel,
    grid: Grid | None,
    asked: Asked,
) -> Request:
    """Check a request against the experiment, the model and the inputs.

    Raises:
        UsageError: something in it is wrong; the message says what, and what to do.
    """
    record = record_of(model)
    sites = check_sites(
        experiment, record.n_layers, asked.layers, asked.layer_sets, asked.positions
    )
    own = check_options(experiment, asked.options)
    positions = sites.get("positions", [])
    plan = make_plan(
        experiment, model.tokenizer, grid, positions, own, record.label, cells=asked.cells
    )
    _check_width(plan, record)
    taken = {name: own[name] for name in own if name not in experiment.plan_only}
    planning = {name: own[name] for name in own if name in experiment.plan_only}
    arguments = {**sites, **taken}
    check_tokens(plan, model, record, arguments)
    chosen = plan.units if grid is None else grid.select_cells(asked.cells)
    labels = {unit.label for unit in chosen}
    units = [unit for unit in plan.units if unit.label in labels]
    digest = identity(experiment, record, plan, arguments)
    template = model.tokenizer.chat_template
    variables = {
        name: v.for_run(record, {**arguments, **plan.axes})
        for name, v in experiment.variables.items()
        if plan.variables is None or name in plan.variables
    }
    every = any(variable.every_layer for variable in variables.values())
    block = Block(
        experiment=experiment.name,
        run=run_name(record.label, plan, digest),
        model=record.label,
        n_layers=record.n_layers,
        d_model=record.d_model,
        precision=record.precision,
        plan=plan,
        layers=list(range(record.n_layers + 1))
        if every
        else sites.get("layers", _own_layers(variables)),
        positions=sites.get("positions", []),
        variables={
            name: v
            for name, v in variables.items()
            if not (v.is_residual and experiment.keeps_residuals)
        },
        attrs=run_attributes(experiment, record, plan, arguments, planning, digest, template),
        per_chunk=asked.cells_per_chunk,
    )
    return Request(
        experiment=experiment,
        plan=plan,
        units=tuple(units),
        arguments=arguments,
        options=own,
        block=block,
        residuals=_residuals(variables, block) if asked.keep_residuals else None,
    )


def _check_width(plan: Plan, record: ModelRecord) -> None:
    """See that inputs as wide as a model go with this one.

    Raises:
        UsageError: they were made for another.
    """
    if plan.width not in (None, (record.n_layers, record.d_model)):
        blocks, width = plan.width
        raise UsageError(
            f"The vector has {blocks + 1} layers of width {width}, but the model {record.label!r} "
            f"needs {record.n_layers + 1} of width {record.d_model} (n_layers + 1, d_model)."
        )


def check_inputs(
    experiment: Experiment,
    grid: Grid | None,
    cells: str | Sequence[str] | None,
    frame: Any = None,
) -> None:
    """See that a grid, or what is said of one, was given exactly where one is asked.

    Raises:
        UsageError: one is missing, or of no use; or the grid has no such cell.
    """
    if experiment.plan is not None and any(of is not None for of in (grid, cells, frame)):
        raise UsageError(
            f"The experiment {experiment.name!r} runs on no grid of personas and tasks; its "
            f"inputs are its options: {', '.join(experiment.options)}."
        )
    if experiment.plan is None and grid is None:
        raise UsageError(f"The experiment {experiment.name!r} needs a grid, such as 'short'.")
    if grid is not None:
        grid.select_cells(cells)


def make_plan(
    experiment: Experiment,
    tokenizer: PreTrainedTokenizerBase,
    grid: Grid | None,
    positions: Sequence[str],
    options: Mapping[str, Any],
    label: str = "",
    *,
    cells: str | Sequence[str] | None = None,
) -> Plan:
    """What there is to measure: the cells of the grid, or what the experiment's file says.

    Args:
        experiment: with its `plan`.
        tokenizer: the model's.
        grid: where it runs on one.
        positions: that have to exist in every prompt of the grid.
        options: the experiment's own.
        label: the model's, for a `plan` that asks for it.
        cells: of the grid, that are asked for; None is all.

    Raises:
        UsageError: the inputs cannot be used, or not with this model.
        PersonaError: a variable has a dimension that the plan gives no labels.
    """
    if experiment.plan is None:
        assert grid is not None
        plan = plan_grid(tokenizer, grid, positions)
        if experiment.arrange is None:
            return plan
        with shown_where(experiment):
            asked, own = grid.select_cells(cells), arguments_of(experiment.arrange, options)
            plan = experiment.arrange(tokenizer, plan, asked, **own)
    else:
        own = arguments_of(experiment.plan, {"model": label, **options})
        with shown_where(experiment):
            plan = experiment.plan(tokenizer, **own)
    for name, variable in experiment.variables.items():
        if plan.variables is not None and name not in plan.variables:
            continue
        every = {"layer"} if variable.every_layer else set()
        known = {*experiment.site_axes, *plan.axes, *every}
        check_axes(name, variable, repr(experiment.name), known)
        # What is of all inputs has no such dimension; then there is one unit, which writes it.
        if len(plan.units) != 1 and not plan.placed_axes & set(variable.axes):
            raise PersonaError(
                f"The variable {name!r} of {experiment.name!r} has none of the dimensions that "
                f"its units have a place on: {', '.join(sorted(plan.placed_axes))}."
            )
    return plan


def told_of(attrs: Mapping[str, Any]) -> tuple[str, str | None, str | None]:
    """Precision, attention and revision of a hosted model, from the attributes of a run."""
    return str(attrs["precision"]), attrs.get("attn_implementation"), attrs.get("server_revision")


def _computed(block: Block, precision: str, attention: str | None, revision: str | None) -> Block:
    told = {"attn_implementation": attention} if attention else {}
    told |= {"server_revision": revision} if revision else {}
    return replace(
        block, precision=precision, attrs={**block.attrs, "precision": precision, **told}
    )


def _own_layers(variables: Mapping[str, Variable]) -> list[int]:
    """The layers that variables say they have, where none can be chosen."""
    own = [v.labels("layer") for v in variables.values() if "layer" in v.coords]
    return [int(layer) for layer in own[0]] if own else []


def _residuals(variables: Mapping[str, Variable], block: Block) -> Block:
    """The group for what is as wide as the model, below the run it belongs to."""
    wide = {name: v for name, v in variables.items() if v.is_residual}
    plan = replace(block.plan, shown={})  # prompts stand below the run's own group
    return replace(block, run=f"{block.run}/residuals", variables=wide, plan=plan)


def check_sites(
    experiment: Experiment,
    n_layers: int,
    layers: str | int | Sequence[int] | None,
    layer_sets: str | int | Sequence[int | Sequence[int]] | None,
    positions: str | Sequence[str] | None,
) -> dict[str, Any]:
    """The layers, layer sets and positions to measure at, where the experiment has them.

    Raises:
        UsageError: not a layer or position, or the experiment has none to choose.
    """
    requests = {
        "layers": (layers, experiment.layers, parse_layers),
        "layer_sets": (layer_sets, experiment.layer_sets, parse_layer_sets),
        "positions": (positions, experiment.positions, lambda spec, _: parse_positions(spec)),
    }
    sites: dict[str, Any] = {}
    for name, (asked, default, parse) in requests.items():
        if default is not None:
            spec = default if asked is None else asked
            # One whose default is none at all does without, unless it is asked for some.
            sites[name] = parse(spec, n_layers) if spec or default else []
        elif asked is not None:
            what = name.replace("_", " ")
            raise UsageError(f"The experiment {experiment.name!r} has no {what} to choose.")
    return sites


def check_options(experiment: Experiment, options: Mapping[str, Any]) -> dict[str, Any]:
    """The experiment's own options, defaults filled in."""
    for name in options:
        if name not in experiment.options:
            known = ", ".join(experiment.options) or "none"
            raise UsageError(
                f"The experiment {experiment.name!r} has no option {name!r}; its options: {known}."
            )
    filled: dict[str, Any] = {}
    for name, parameter in experiment.options.items():
        if name not in options and parameter.default is inspect.Parameter.empty:
            raise UsageError(f"The experiment {experiment.name!r} needs the option {name!r}.")
        filled[name] = _check_value(name, parameter, options.get(name, parameter.default))
    return filled


def _check_value(name: str, parameter: inspect.Parameter, value: Any) -> Any:
    """A value of the type that the option is annotated with."""
    if parameter.annotation is inspect.Parameter.empty:
        return value
    try:
        return TypeAdapter(parameter.annotation).validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise UsageError(f"The option {name!r} cannot be {value!r}: {reason}.") from error
