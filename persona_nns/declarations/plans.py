"""What a run is made of: units that are measured, written and resumed one at a time.

A unit is a cell of a grid, unless an experiment's file says otherwise in a function `plan`: a
pair of personas, say, or a trait. Each has a place in the result: of some dimensions, the label
at which it writes. Nothing here knows about models or about Zarr.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

Label = str | int | float


class Unit(Protocol):
    """What `measure` is given a list of; its fields beside these are the experiment's own.

    All that `measure` needs of the inputs travels in the units: texts, and token ids.
    """

    @property
    def label(self) -> str:
        """What it is called in messages; no two units of a plan share it."""
        ...

    @property
    def place(self) -> Mapping[str, Label]:
        """Dimension → label at which it writes.

        A unit writes the variables all of whose unit dimensions are here.
        """
        ...


@dataclass(frozen=True)
class ShownPrompt:
    """A rendered prompt as a reader sees it: no token ids, which mean nothing without a tokenizer.

    Attributes:
        text: the prompt, template included.
        ends: where each token ends in it; a token begins where the one before ends. (Of a
            character that is several tokens, all but the first are empty.)
        stops: the token after the last one of each of `SPANS`, in their order.
        user_last: index of the last token before the generation header, if that is defined.
    """

    text: str
    ends: tuple[int, ...]
    stops: tuple[int, ...]
    user_last: int | None


#: The spans of a prompt, in their order.
SPANS = ("prefix", "persona", "task", "tail")


@dataclass(frozen=True)
class Plan:
    """Everything that an experiment is to measure on a model.

    Attributes:
        name: what the inputs are called; `open_results(grid=…)` chooses by it.
        units: in the order in which they are measured.
        axes: labels of the dimensions that the inputs determine, those of the units first.
        unit_axes: the dimensions that every unit has a place on: those of ``completed``.
        content: the inputs themselves as JSON-able values (contents, not paths), the same for
            every model. With the token ids, they are the inputs' share of a run's identity.
        token_ids: all that was rendered, by any two names.
        digest: hash of the content: runs of several models are joined if they agree in it.
        coords: what else is known of a dimension's labels: name → (dimension, values).
        attrs: what the run's group says of the inputs, as JSON-able values.
        batch_size: units at a time where none is asked for; None is as many as memory allows,
            taking a unit for the size of a grid's cell.
        variables: those of the experiment's variables that these inputs give; None is all.
        width: number of blocks and width of the residual stream that the inputs were made for;
            None where they go with every model.
        unverifiable: why `verify` must not compute its units anew, as the end of a sentence; empty
            where it may. What a run costs, or writes beside its store, is such a reason.
        within_window: every prompt has to fit into a sliding window of the model, if it has one.
        shown: the prompt of each label of ``cell``, to be looked at beside the results.
    """

    name: str
    units: Sequence[Unit]
    axes: Mapping[str, Sequence[Label]]
    unit_axes: tuple[str, ...]
    content: Mapping[str, Any]
    token_ids: Mapping[str, Mapping[str, Sequence[int]]]
    digest: str
    coords: Mapping[str, tuple[str, Sequence[Label]]] = field(
        default_factory=dict[str, tuple[str, Sequence[Label]]]
    )
    attrs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    batch_size: int | None = None
    variables: Sequence[str] | None = None
    width: tuple[int, int] | None = None
    unverifiable: str = ""
    within_window: bool = False
    shown: Mapping[str, ShownPrompt] = field(default_factory=dict[str, ShownPrompt])

    @property
    def noun(self) -> str:
        """What one of its units is called in messages."""
        return noun_of(self.unit_axes)

    @cached_property
    def placed_axes(self) -> frozenset[str]:
        """The dimensions that some unit has a place on."""
        return frozenset(axis for unit in self.units for axis in unit.place)

    def names_written(self, unit: Unit, axes: Mapping[str, Sequence[str]]) -> list[str]:
        """The variables that a unit writes.

        Args:
            unit: one of the plan's.
            axes: the dimensions of each variable.
        """
        placed = self.placed_axes
        return [name for name, dims in axes.items() if placed & set(dims) <= set(unit.place)]


def noun_of(unit_axes: tuple[str, ...]) -> str:
    """What a unit with a place on these dimensions is called in messages."""
    return "cell" if unit_axes == ("cell",) else "unit"


def content_digest(content: Any) -> str:
    """Hash of JSON-able values, 64 hexadecimal digits.

    It is that of ``json.dumps(content, sort_keys=True)``, which of a large grid would be hundreds
    of megabytes: mappings are taken an entry at a time.
    """
    digest = hashlib.sha256()
    for piece in _pieces(content):
        digest.update(piece.encode())
    return digest.hexdigest()


def _pieces(content: Any, depth: int = 2) -> Iterator[str]:
    """The parts of a JSON text, of mappings and of those in them an entry at a time."""
    entries: dict[Any, Any] = content if depth and isinstance(content, dict) else {}
    if not entries or not all(isinstance(key, str) for key in entries):
        yield json.dumps(content, sort_keys=True)
        return
    before = "{"
    for key in sorted(entries):
        yield f"{before}{json.dumps(key)}: "
        yield from _pieces(entries[key], depth - 1)
        before = ", "
    yield "}"
