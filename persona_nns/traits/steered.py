"""What is done to the streams of questions and given answers that are steered, edit by edit.

Runs where `measure` runs, which may be a server: torch and builtins only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from persona_nns.tracing.averages import normalised
from persona_nns.tracing.given import Given
from persona_nns.tracing.steering import ablate, cap, increments, steer, steer_on_sphere
from persona_nns.traits.receipts import Receipts
from persona_nns.traits.trait import TraitUnit

#: Layer → what becomes of the stream that enters its block.
Edits = dict[int, Callable[[Tensor], Tensor]]


@dataclass(frozen=True, eq=False)
class Steered(TraitUnit):
    """A question, or a row of given answers, to be run under every coefficient or threshold.

    Attributes:
        number: of the question or row.
        prompt: token ids, no system prompt.
        response: token ids of a given answer; None where the model is to answer.
        vector: [n_layers + 1, d_model].
        alphas: coefficients.
        position_sets: which tokens are steered.
        operations: what is done.
        norm_preserving: whether the stream gets its norm back after adding.
        thresholds: [tau, n_layers + 1].
        receipts: what they are measured with, where they are asked for.
        shows: label of a given answer: ``pos`` where it shows the trait.
    """

    number: int
    prompt: tuple[int, ...]
    response: tuple[int, ...] | None
    vector: Tensor
    alphas: tuple[float, ...]
    position_sets: tuple[str, ...]
    operations: tuple[str, ...] = ("add", "ablate")
    norm_preserving: bool = False
    thresholds: Tensor | None = None
    receipts: Receipts | None = None
    shows: str | None = None

    @property
    def place(self) -> dict[str, Any]:
        """Where it stands in the result."""
        axis = "question" if self.response is None else "row"
        return {"trait": self.trait, axis: self.number}

    @property
    def conditions(self) -> list[tuple[float, str]]:
        """Coefficients and position sets, in the order of the result."""
        return [(alpha, tokens) for alpha in self.alphas for tokens in self.position_sets]


def operate(
    unit: Steered, given: Given, layers: list[int], layer_sets: Sequence[list[int]]
) -> dict[str, tuple[tuple[int, ...], list[Edits]]]:
    """Everything that is done to the stream of some rows, one after another.

    Returns:
        The end of its variables' names → the dimensions' lengths, and the edits at each place.
    """
    device, sets = given.last.device, unit.position_sets
    vector, tokens = unit.vector.to(device), {name: given.steered(name) for name in sets}
    direction = normalised(vector)
    add = steer_on_sphere if unit.norm_preserving else steer

    def adding(at: Sequence[int], of: Tensor, alpha: float, where: str) -> Edits:
        strength = alpha * tokens[where]
        return {layer: partial(add, direction=of[layer], strength=strength) for layer in at}

    def capping(at: Sequence[int], tau: Tensor, where: str) -> Edits:
        every = {layer: (direction[layer], float(tau[layer])) for layer in at}
        return {
            layer: partial(cap, direction=of, tau=limit, steered=tokens[where])
            for layer, (of, limit) in every.items()
        }

    done: dict[str, tuple[tuple[int, ...], list[Edits]]] = {}
    if "add" in unit.operations:
        vectors = {"": vector}
        if unit.receipts is not None:
            vectors["_random"] = unit.receipts.random.to(device)
        for end, of in vectors.items():
            edits = [adding([at], of, *each) for at in layers for each in unit.conditions]
            done[end] = (len(layers), len(unit.alphas), len(sets)), edits
        steps = increments(vector)
        edits = [adding(range(len(steps)), steps, *each) for each in unit.conditions]
        done["_all_layers"] = (len(unit.alphas), len(sets)), edits
    if "ablate" in unit.operations:
        edits = [{at: partial(ablate, direction=direction[at])} for at in layers]
        done["_ablate"] = (len(layers),), edits
    if "cap" in unit.operations and unit.thresholds is not None:
        taus = unit.thresholds
        edits = [capping(at, tau, where) for at in layer_sets for tau in taus for where in sets]
        done["_cap"] = (len(layer_sets), len(taus), len(sets)), edits
    return done


def swept(
    read: Callable[[Edits], Tensor], lengths: tuple[int, ...], edits: Sequence[Edits]
) -> Tensor:
    """What is read under each of some edits, [row, …]."""
    return torch.stack([read(each) for each in edits], 1).unflatten(1, lengths)
