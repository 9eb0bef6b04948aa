"""What an experiment says about each array that it returns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from persona_nns.errors import PersonaError

if TYPE_CHECKING:
    from persona_nns.declarations.record import ModelRecord

Kind = Literal["float", "int", "bool", "text"]

#: What stands in an array where nothing was measured (yet).
FILL: dict[Kind, float | int | bool | str] = {
    "float": float("nan"),
    "int": -1,
    "bool": False,
    "text": "",
}


#: Labels of a dimension, or a function that gives them for a model and the run's parameters, among
#: them, by its name, the labels of each dimension that the inputs determine.
Labels = (
    Sequence[str | int | float]
    | Callable[["ModelRecord", Mapping[str, Any]], Sequence[str | int | float]]
)


@dataclass(frozen=True)
class Variable:
    """One labelled array of an experiment's result.

    Attributes:
        dims: its dimensions after ``model``, ``cell`` first: ``"cell layer position"``. Beside
            ``layer`` and ``position``, any dimension whose labels are in ``coords`` or, of an
            experiment that plans its own units instead of cells or arranges them, in its plan.
            An array with ``d_model`` is measured where residuals are kept, and has a group of its
            own.
        long_name: what it is called on an axis.
        units: ``nat``, ``logit``, ``token`` or ``1``.
        description: one or two sentences: what it is, over what, in which direction.
        kind: what it holds; ``float`` is stored as float32.
        every_layer: it has all layers 0 … n_layers, not only those asked for.
        unmeasured: of ``int``, the value that stands where there was nothing to measure in a
            complete unit. It is read as NaN, and so are truth values of the same dimensions there.
        judged: a judge is asked once for each of its values.
        coords: labels of the dimensions of its own; those that depend on the model or on the
            options are given as a function of the model's record and the run's parameters. A
            ``layer`` among them is every block, say, of an experiment that is asked for no layers.
    """

    dims: str
    long_name: str
    units: str = "1"
    description: str = ""
    kind: Kind = "float"
    every_layer: bool = False
    unmeasured: int | None = None
    judged: bool = False
    coords: Mapping[str, Labels] = field(default_factory=dict[str, Labels])

    def __post_init__(self) -> None:
        if self.kind not in FILL:
            raise PersonaError(
                f"A variable cannot be of the kind {self.kind!r}; use {', '.join(FILL)}."
            )
        if not isinstance(self.dims, str) or not self.dims.split():
            raise PersonaError(
                f"The dims of a variable cannot be {self.dims!r}; give their names in a text, such "
                "as 'cell layer'."
            )

    @property
    def axes(self) -> tuple[str, ...]:
        """The dimensions by name."""
        return tuple(self.dims.split())

    @property
    def is_residual(self) -> bool:
        """Whether its width is the model's, so that results of two models cannot be joined."""
        return "d_model" in self.axes

    @property
    def has_asked_layers(self) -> bool:
        """Whether its layers are those that are asked for."""
        return "layer" in self.axes and "layer" not in self.coords and not self.every_layer

    def labels(self, axis: str) -> Sequence[str | int | float]:
        """Labels of one of its own dimensions, known once `for_run` has been asked."""
        labels = self.coords[axis]
        assert not callable(labels), f"{axis} has no labels before the model is known"
        return labels

    def for_run(self, record: "ModelRecord", parameters: Mapping[str, Any]) -> "Variable":
        """The same variable with the labels that it has for a model and a run's parameters."""
        labels: dict[str, Labels] = {
            axis: labels(record, parameters) if callable(labels) else labels
            for axis, labels in self.coords.items()
        }
        return replace(self, coords=labels)


def scored_tokens(dims: str = "cell", *, measured: str = "KL is") -> Variable:
    """How many reference tokens something is summed over."""
    return Variable(
        dims,
        "scored tokens",
        units="token",
        description=f"Reference tokens the {measured} summed over; fewer than asked for where the "
        "continuation ends early.",
        kind="int",
    )


def marker_variables(
    dims: str, said: str, coords: Mapping[str, Labels], /, **descriptions: str
) -> dict[str, Variable]:
    """What is said in each cell, and which of its persona's markers occur in it.

    Args:
        dims: of all of them.
        said: what is said, as a long name.
        coords: labels of the dimensions.
        **descriptions: of ``any_marker``, ``distinct_markers`` and ``text``.
    """
    named: dict[str, tuple[str, Kind]] = {
        "any_marker": ("any persona marker", "bool"),
        "distinct_markers": ("distinct persona markers", "int"),
        "text": (said, "text"),
    }
    variables: dict[str, Variable] = {}
    for name, description in descriptions.items():
        long_name, kind = named[name]
        variables[name] = Variable(
            dims,
            long_name,
            description=description,
            kind=kind,
            coords=coords,
            # Of a persona without markers, or where nothing is said.
            unmeasured=-1 if kind == "int" else None,
        )
    return variables
