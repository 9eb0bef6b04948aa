"""A request for a run, checked before anything is computed or written."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from nnsight import TransformersModel
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerBase

from persona_nns.catalog import Experiment
from persona_nns.errors import UsageError
from persona_nns.grids import Cell, Grid, PromptName
from persona_nns.models import record_of
from persona_nns.prompts import ROLE_PROMPTS, Prompt, RenderedCell, render_cell
from persona_nns.provenance import identity, run_attributes, run_name
from persona_nns.sites import parse_layer_sets, parse_layers, parse_positions, position_index
from persona_nns.store import Block
from persona_nns.variables import Variable

_PROMPTS: tuple[PromptName, ...] = (*ROLE_PROMPTS, "BARE")


@dataclass(frozen=True)
class Request:
    """A checked request: nothing in it can still be a usage error.

    Attributes:
        experiment: what to measure.
        cells: the cells asked for.
        prompts: every prompt of every cell of the grid, by cell label and prompt name.
        arguments: keyword arguments of `measure`.
        block: the group the results go to.
        residuals: the group for residuals below it, where they are kept.
    """

    experiment: Experiment
    cells: tuple[Cell, ...]
    prompts: Mapping[str, Mapping[PromptName, Prompt]]
    arguments: Mapping[str, Any]
    block: Block
    residuals: Block | None

    @property
    def blocks(self) -> list[Block]:
        """Where a cell is written: residuals first, so that a completed cell has them."""
        return [block for block in (self.residuals, self.block) if block is not None]

    @property
    def every_prompt(self) -> list[Prompt]:
        """The prompts of all cells, one after the other."""
        return [prompt for of_cell in self.prompts.values() for prompt in of_cell.values()]

    def rendered(self, cell: Cell) -> RenderedCell:
        """A cell with its prompts, for a place that renders none itself."""
        texts = {part.name: getattr(cell, part.name) for part in fields(Cell)}
        return RenderedCell(**texts, prompts=self.prompts[cell.label])

    def as_hosted(self, precision: str) -> "Request":
        """The same request with the precision that a server has told of."""
        return replace(
            self,
            block=_in_precision(self.block, precision),
            residuals=self.residuals and _in_precision(self.residuals, precision),
        )

    def into(self, run: str) -> "Request":
        """The same request with its results in the group of this name."""
        residuals = self.residuals and replace(self.residuals, run=f"{run}/residuals")
        return replace(self, block=replace(self.block, run=run), residuals=residuals)


def check_request(
    experiment: Experiment,
    model: TransformersModel,
    grid: Grid,
    layers: str | int | Sequence[int] | None,
    layer_sets: str | int | Sequence[int | Sequence[int]] | None,
    positions: str | Sequence[str] | None,
    cells: str | Sequence[str] | None,
    options: Mapping[str, Any],
    *,
    keep_residuals: bool,
) -> Request:
    """Check a request against the experiment, the model and the grid.

    Raises:
        UsageError: something in it is wrong; the message says what, and what to do.
    """
    record = record_of(model)
    sites = check_sites(experiment, record.n_layers, layers, layer_sets, positions)
    arguments = {**sites, **_check_options(experiment, options)}
    asked = grid.select_cells(cells)
    prompts = render_grid(model.tokenizer, grid, sites.get("positions", []))
    digest = identity(experiment, record, grid.cells, prompts, arguments)
    template = model.tokenizer.chat_template
    variables = {name: v.for_run(record, arguments) for name, v in experiment.variables.items()}
    every = any(variable.every_layer for variable in variables.values())
    block = Block(
        experiment=experiment.name,
        run=run_name(record.label, grid, digest),
        model=record.label,
        n_layers=record.n_layers,
        d_model=record.d_model,
        precision=record.precision,
        cells=[(cell.persona, cell.task) for cell in grid.cells],
        layers=list(range(record.n_layers + 1)) if every else sites.get("layers", []),
        positions=sites.get("positions", []),
        variables={name: v for name, v in variables.items() if not v.is_residual},
        attrs=run_attributes(experiment, record, grid, arguments, digest, template),
    )
    return Request(
        experiment=experiment,
        cells=asked,
        prompts=prompts,
        arguments=arguments,
        block=block,
        residuals=_residuals(variables, block) if keep_residuals else None,
    )


def _in_precision(block: Block, precision: str) -> Block:
    return replace(block, precision=precision, attrs={**block.attrs, "precision": precision})


def _residuals(variables: Mapping[str, Variable], block: Block) -> Block:
    """The group for what is as wide as the model, below the run it belongs to."""
    wide = {name: v for name, v in variables.items() if v.is_residual}
    return replace(block, run=f"{block.run}/residuals", variables=wide)


def render_grid(
    tokenizer: PreTrainedTokenizerBase, grid: Grid, positions: Sequence[str]
) -> dict[str, dict[PromptName, Prompt]]:
    """Render every prompt of every cell, and see that the positions exist in them.

    Raises:
        UsageError: no chat template, or a prompt too short for a position.
    """
    prompts = {cell.label: render_cell(tokenizer, cell, _PROMPTS) for cell in grid.cells}
    for of_cell in prompts.values():
        for name in ROLE_PROMPTS:
            for position in positions:
                position_index(of_cell[name], position)
    return prompts


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
    sites: dict[str, Any] = {}
    for name, asked, default in (
        ("layers", layers, experiment.layers),
        ("layer sets", layer_sets, experiment.layer_sets),
        ("positions", positions, experiment.positions),
    ):
        if default is None and asked is not None:
            raise UsageError(f"The experiment {experiment.name!r} has no {name} to choose.")
    if experiment.layers is not None:
        spec = experiment.layers if layers is None else layers
        sites["layers"] = parse_layers(spec, n_layers)
    if experiment.layer_sets is not None:
        spec = experiment.layer_sets if layer_sets is None else layer_sets
        sites["layer_sets"] = parse_layer_sets(spec, n_layers)
    if experiment.positions is not None:
        spec = experiment.positions if positions is None else positions
        sites["positions"] = parse_positions(spec)
    return sites


def _check_options(experiment: Experiment, options: Mapping[str, Any]) -> dict[str, Any]:
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
