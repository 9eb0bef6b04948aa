"""What an experiment says about each array that it returns."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["float", "int", "bool", "text"]

#: What stands in an array where nothing was measured (yet).
FILL: dict[Kind, float | int | bool | str] = {
    "float": float("nan"),
    "int": -1,
    "bool": False,
    "text": "",
}


@dataclass(frozen=True)
class Variable:
    """One labelled array of an experiment's result.

    Attributes:
        dims: its dimensions after ``model``, ``cell`` first: ``"cell layer position"``. Beside
            ``layer`` and ``position``, any dimension whose labels are in ``coords``. An array
            with ``d_model`` is measured where residuals are kept, and has a group of its own.
        long_name: what it is called on an axis.
        units: ``nat``, ``token`` or ``1``.
        description: one or two sentences: what it is, over what, in which direction.
        kind: what it holds; ``float`` is stored as float32.
        every_layer: it has all layers 0 … n_layers, not only those asked for.
        coords: labels of the dimensions of its own.
    """

    dims: str
    long_name: str
    units: str = "1"
    description: str = ""
    kind: Kind = "float"
    every_layer: bool = False
    coords: dict[str, Sequence[str | int]] = field(default_factory=dict[str, Sequence[str | int]])

    @property
    def axes(self) -> tuple[str, ...]:
        """The dimensions by name, ``cell`` first."""
        return tuple(self.dims.split())

    @property
    def is_residual(self) -> bool:
        """Whether its width is the model's, so that results of two models cannot be joined."""
        return "d_model" in self.axes
