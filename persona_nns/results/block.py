"""What is known about a run's group before the first unit is measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from persona_nns.declarations.plans import Plan
from persona_nns.declarations.variables import Variable


def bookkeeping(plan: Plan) -> dict[str, Variable]:
    """What is stored of every unit beside its results; ``completed`` is last."""
    dims, noun = " ".join(plan.unit_axes), plan.noun
    return {
        "seconds": Variable(
            dims,
            "time",
            units="s",
            description=f"Wall-clock time of the {noun}'s batch, divided by {noun}s.",
        ),
        "completed": Variable(
            dims,
            f"{noun} is complete",
            description=f"True once everything else of the {noun} has been written.",
            kind="bool",
        ),
    }


@dataclass(frozen=True)
class Block:
    """Everything that is known about a run's group before the first unit is measured.

    Attributes:
        experiment: name of the experiment.
        run: name of the run's group.
        model: label of the model.
        n_layers: its number of decoder blocks.
        d_model: width of its residual stream.
        precision: its precision.
        plan: what there is to measure.
        layers: labels of the layer axis.
        positions: labels of the position axis.
        variables: the arrays.
        attrs: provenance, as JSON-able values.
        per_chunk: how many units a chunk is to hold along the first dimension of ``completed``;
            None is as many as the run has, or as suit the number of its units.
    """

    experiment: str
    run: str
    model: str
    n_layers: int
    d_model: int
    precision: str
    plan: Plan
    layers: Sequence[int]
    positions: Sequence[str]
    variables: Mapping[str, Variable]
    attrs: Mapping[str, Any]
    per_chunk: int | None = None

    def labels(self, variable: Variable, axis: str) -> Sequence[Any]:
        """The labels of one of a variable's dimensions."""
        shared: dict[str, Sequence[Any]] = {
            **self.plan.axes,
            "layer": self.layers,
            "position": self.positions,
            "d_model": range(self.d_model),
        }
        return shared[axis] if axis in shared else variable.labels(axis)
