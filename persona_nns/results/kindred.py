"""Runs of one model that are one result: they differ in layers, or in how many units they have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from persona_nns.results.store import RunGroup

if TYPE_CHECKING:
    import xarray as xr


class Run(Protocol):
    """What is known of a run: its attributes, and its group."""

    @property
    def attrs(self) -> Mapping[str, Any]:
        """What it says of itself."""
        ...

    @property
    def group(self) -> RunGroup:
        """Where it is."""
        ...


R = TypeVar("R", bound=Run)


def families(runs: Sequence[R]) -> list[list[R]]:
    """Runs that are one result, together; the one with most units, and newest, comes first.

    Runs are kindred where the same determines their numbers, but for layers and inputs; they are
    one result where the units of one are among the other's. Of a family, runs that another one
    holds all of are left out.

    Args:
        runs: of one experiment.
    """
    found: list[list[R]] = []
    for run in sorted(runs, key=lambda run: (-len(run.group), _age(run))):
        family = next((each for each in found if _belongs(run, each[0])), None)
        if family is None:
            found.append([run])
        elif not any(_holds(other, run) for other in family):
            family.append(run)
    for family in found:
        family[:] = [
            run
            for place, run in enumerate(family)
            if place == 0 or not any(_holds(other, run) for other in family if other is not run)
        ]
        if len(family) > 1 and _holds(family[1], family[0]):
            family.pop(0)
    return sorted(found, key=lambda family: min(map(runs.index, family)))


def _age(run: Run) -> float:
    return -np.datetime64(run.attrs["created"].removesuffix("+00:00")).astype("int64")


def _belongs(run: Run, head: Run) -> bool:
    theirs, own = head.attrs.get("unit_digests", {}), run.attrs.get("unit_digests", {})
    return (
        "kindred" in run.attrs
        and run.attrs["kindred"] == head.attrs.get("kindred")
        and run.attrs["model"] == head.attrs["model"]
        and own.items() <= theirs.items()
    )


def _holds(run: Run, other: Run) -> bool:
    """Whether a run has all that another one of its family has measured."""
    if not set(_layers(other)) <= set(_layers(run)):
        return False
    return _complete(other) <= _complete(run)


def _layers(run: Run) -> list[int]:
    return run.attrs["parameters"].get("layers", [])


def _complete(run: Run) -> set[tuple[Any, ...]]:
    axes = run.group.unit_axes
    labels = [run.group.labels(axis) for axis in axes]
    return {
        tuple(of[index] for of, index in zip(labels, place, strict=True))
        for place in np.argwhere(run.group.flags()[0]).tolist()
    }


def open_family(family: Sequence[R], opened: Callable[[R], xr.Dataset]) -> xr.Dataset:
    """The results of a family, with all of its layers and units.

    Args:
        family: of `families`.
        opened: opens a run.
    """
    whole, *others = map(opened, family)
    if not others:
        return whole
    texts = [name for name, array in whole.data_vars.items() if array.dtype.kind == "O"]
    combined = _nothing_for_empty(whole, texts)
    for other in others:
        combined = combined.combine_first(_nothing_for_empty(other, texts))
    order = {dim: whole[dim].values for dim in whole.dims if whole[dim].dtype.kind == "O"}
    combined = combined.sel(order)
    filled = {name: combined[name].fillna("") for name in texts}
    counts = {
        name: array.astype(whole[name].attrs["kind"])
        for name, array in combined.data_vars.items()
        if whole[name].attrs.get("kind") in ("int", "bool") and not array.isnull().any()
    }
    completed = combined["completed"].fillna(0).astype(bool)
    for other in others:
        there = {dim: other[dim] for dim in other["completed"].dims}
        completed.loc[there] |= other["completed"]
    layers = sorted({layer for run in family for layer in _layers(run)})
    parameters = {**whole.attrs["parameters"], **({"layers": layers} if layers else {})}
    return combined.assign({**filled, **counts, "completed": completed})[
        list(whole.data_vars)
    ].assign_attrs({**whole.attrs, "parameters": parameters})


def _nothing_for_empty(results: xr.Dataset, texts: Sequence[Any]) -> xr.Dataset:
    """Texts with None for what was not measured, so that another run's can stand there."""
    return results.assign({name: results[name].where(results[name] != "", None) for name in texts})
