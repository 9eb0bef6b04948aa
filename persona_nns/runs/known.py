"""What other runs of a store hold of a run: it is taken over, and only the rest is measured.

Runs are kindred where they differ in nothing but their layers and the inputs that they have
beside the shared ones. A unit that is the same in both, with the layers that both have, has the
same numbers, because units do not depend on each other and layers not on which others were asked
for. Of the shipped experiments that is tested; of others, one unit is measured again at one layer
and compared.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persona_nns.declarations.plans import Unit
from persona_nns.declarations.variables import FILL, Variable
from persona_nns.results.claims import Claims
from persona_nns.results.groups import open_root
from persona_nns.results.reading import RunInfo, list_runs
from persona_nns.results.rounding import same_but_for_rounding
from persona_nns.runs.identity import now, session_name
from persona_nns.runs.request import Request


@dataclass(frozen=True)
class Known:
    """A kindred run.

    Attributes:
        info: the run.
        layers: those that it was asked for.
        units: labels of its complete units that are the same.
    """

    info: RunInfo
    layers: frozenset[int]
    units: frozenset[str]


def known_of(store: str | Path, request: Request) -> list[Known]:
    """The runs of a store that hold some of what is asked for; those that hold most come first."""
    if request.residuals is not None or open_root(store) is None:
        return []
    block = request.block
    asked, digests = frozenset(_layers(request)), block.attrs["unit_digests"]
    found: list[Known] = []
    for info in list_runs(store, block.experiment):
        theirs = info.attrs.get("unit_digests", {})
        same = [unit for unit in request.units if _same(theirs, digests, unit.label)]
        if (
            info.run == block.run
            or info.attrs.get("kindred") != block.attrs["kindred"]
            or info.attrs["model"] != block.model
            or not _fits(info, request, same)
        ):
            continue
        layers = frozenset(info.attrs["parameters"].get("layers", ()))
        units = frozenset(info.group.completed(same))
        if units and (layers & asked or not asked):
            found.append(Known(info, layers, units))
    found.sort(key=lambda known: -len(known.layers & asked) * len(known.units))
    # Of a hosted model the identity does not say on which weights, and in which precision.
    return [each for each in found if _computed(each) == _computed(found[0])]


def _computed(known: Known) -> tuple[Any, Any]:
    return known.info.attrs["precision"], known.info.attrs.get("server_revision")


def _layers(request: Request) -> Sequence[int]:
    return request.arguments.get("layers", ())


def _same(theirs: Mapping[str, str], ours: Mapping[str, str], label: str) -> bool:
    return label in theirs and theirs[label] == ours[label]


def _fits(info: RunInfo, request: Request, units: Sequence[Unit]) -> bool:
    """Whether a run's arrays are those of the request, but for layers and further units."""
    block = request.block
    if not units or set(info.attrs["variables"]) != set(block.variables):
        return False
    free = {"layer", *units[0].place}
    return all(
        info.group.axes(name) == variable.axes
        and all(
            info.group.labels(axis) == list(block.labels(variable, axis))
            for axis in variable.axes
            if axis not in free
        )
        for name, variable in block.variables.items()
    )


def missing_layers(
    known: Sequence[Known], request: Request, pending: Sequence[Unit]
) -> dict[tuple[int, ...], list[Unit]]:
    """Units of which other runs hold some of the layers, by the layers that they lack."""
    asked = _layers(request)
    by_layers: dict[tuple[int, ...], list[Unit]] = {}
    for unit in pending:
        held = set(itertools.chain(*(each.layers for each in known if unit.label in each.units)))
        lacking = tuple(layer for layer in asked if layer not in held)
        if held & set(asked) and lacking:
            by_layers.setdefault(lacking, []).append(unit)
    return by_layers


def take_over(
    store: str | Path, request: Request, known: Sequence[Known], session: Mapping[str, Any]
) -> None:
    """Write the units all of whose layers other runs hold.

    Args:
        store: path or URL of the store.
        request: what is asked for.
        known: the runs.
        session: what is known of this process.
    """
    runs = [each.info.run for each in known]
    note = {**session, "taken_over_from": runs}
    claims = Claims(store, request.blocks, session_name(), note)
    done = claims.completed(request.units)
    taken: dict[tuple[str, ...], list[tuple[Unit, dict[str, NDArray[Any]], float]]] = {}
    for unit in request.units:
        holding = [each for each in known if unit.label in each.units]
        held = set(itertools.chain(*(each.layers for each in holding)))
        if unit.label not in done and holding and held >= set(_layers(request)):
            values = values_of(request, holding, unit)
            seconds = sum(float(each.info.group.read_unit(unit, "seconds")) for each in holding)
            taken.setdefault(tuple(values), []).append((unit, values, seconds))
    for names, rows in taken.items():
        arrays = {name: np.stack([values[name] for _, values, _ in rows]) for name in names}
        seconds = sum(seconds for *_, seconds in rows) / len(rows)
        claims.write([unit for unit, *_ in rows], arrays, seconds)
    claims.end(now())


def values_of(request: Request, known: Sequence[Known], unit: Unit) -> dict[str, NDArray[Any]]:
    """What some runs hold of a unit, on the request's layers."""
    block = request.block
    axes = {name: variable.axes for name, variable in block.variables.items()}
    values: dict[str, NDArray[Any]] = {}
    for name in block.plan.names_written(unit, axes):
        variable = block.variables[name]
        values[name] = known[0].info.group.read_unit(unit, name)
        if variable.has_asked_layers:
            values[name] = _on_layers(request, variable, name, known, unit)
    return values


def _on_layers(
    request: Request, variable: Variable, name: str, known: Sequence[Known], unit: Unit
) -> NDArray[Any]:
    axis = [each for each in variable.axes if each not in unit.place].index("layer")
    labels = list(request.block.layers)
    pieces = [np.moveaxis(each.info.group.read_unit(unit, name), axis, 0) for each in known]
    whole = np.full((len(labels), *pieces[0].shape[1:]), FILL[variable.kind], pieces[0].dtype)
    for each, piece in zip(known, pieces, strict=True):
        own = each.info.group.labels("layer")
        for layer in each.layers & set(_layers(request)):
            whole[labels.index(layer)] = piece[own.index(layer)]
    return np.moveaxis(whole, 0, axis)


def agrees(known: Known, request: Request, unit: Unit, anew: Mapping[str, NDArray[Any]]) -> bool:
    """Whether a unit measured anew, on the request's layers, is what a run holds of it."""
    variables = request.block.variables
    return all(
        same_but_for_rounding(
            held, np.asarray(anew[name][0]), exact=variables[name].kind != "float"
        )
        for name, held in values_of(request, [known], unit).items()
    )
