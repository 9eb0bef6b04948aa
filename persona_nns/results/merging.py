"""One store's runs put into another, a unit at a time.

A run that the target lacks is allocated as it is in the source; of one that both have (the same
identity and model), units that are complete in the source alone are added. A unit's ``completed``
comes last, as in every run, so that a merge that is cut off leaves a target that is right as far
as it goes, and the same merge goes on. The source is only read: it may be growing meanwhile.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persona_nns.declarations.plans import Label, noun_of
from persona_nns.errors import PersonaError, UsageError
from persona_nns.results.allocation import attach_copy
from persona_nns.results.claims import say_over, sessions_over
from persona_nns.results.groups import open_group, open_root, subgroups
from persona_nns.results.locations import location_of
from persona_nns.results.public import for_everybody
from persona_nns.results.reading import RunInfo, list_runs
from persona_nns.results.rounding import same_but_for_rounding
from persona_nns.results.shown_prompts import read_shown, write_shown
from persona_nns.results.store import RunGroup, find_group

_BYTES_AT_A_TIME = 2**26
_UNITS_AT_A_TIME = 256


@dataclass(frozen=True)
class Merged:
    """What became of one run of the source.

    Attributes:
        experiment: its experiment.
        run: its group in the target.
        is_new: the target had nothing of it.
        n_added: units that were added.
        n_complete: units that are complete in the target now.
        n_units: units that it has.
    """

    experiment: str
    run: str
    is_new: bool
    n_added: int
    n_complete: int
    n_units: int


@dataclass(frozen=True)
class PlacedUnit:
    """A unit as a store knows it: where it is."""

    place: Mapping[str, Label]

    @property
    def label(self) -> str:
        """Its labels, one after the other."""
        return "/".join(map(str, self.place.values()))


def merge_stores(
    target: str | Path,
    source: str | Path,
    runs: Sequence[RunInfo] | None = None,
    *,
    public: bool = False,
) -> list[Merged]:
    """Put runs of one store into another; what the target has stays as it is.

    Sessions and jobs that are noted beside a run come with it, and it is as old as the older one.

    Args:
        target: path or URL of the store that is added to; made where there is none.
        source: path or URL of the store that is read.
        runs: of the source; by default all.
        public: leave out what only says where on somebody's machine something was, and jobs.

    Returns:
        What became of each run, in the order of the source.

    Raises:
        UsageError: there is no source, it is the target, or the target cannot be written.
        PersonaError: a run is in both with other numbers, on another revision or precision, or
            with other arrays; nothing has been written then.
    """
    chosen = list_runs(source) if runs is None else list(runs)
    into = location_of(target)
    if into.address == location_of(source).address:
        raise UsageError(f"The store {str(source)!r} cannot be merged into itself.")
    into.check_writable()
    theirs = [] if open_root(target) is None else list_runs(target)
    found = [_counterpart(info, theirs) for info in chosen]
    for info, own in zip(chosen, found, strict=True):
        if own is not None:
            _check_same(info, own, target, source)
    return [
        _merge_run(target, source, *pair, public=public) for pair in zip(chosen, found, strict=True)
    ]


def _counterpart(info: RunInfo, theirs: Sequence[RunInfo]) -> RunInfo | None:
    """The same run in the target, whatever its group is called.

    Raises:
        PersonaError: its group's name is that of another run.
    """
    wanted = _known_by(info)
    for own in theirs:
        if _known_by(own) == wanted:
            return own
    for own in theirs:
        if (own.experiment, own.run) == (info.experiment, info.run):
            raise PersonaError(
                f"The run {info.experiment}/{info.run} is another one in the target (another "
                "identity); nothing was merged."
            )
    return None


def _known_by(info: RunInfo) -> tuple[str, str, str]:
    return info.experiment, info.attrs["identity"], info.attrs["model"]


def _check_same(info: RunInfo, own: RunInfo, target: str | Path, source: str | Path) -> None:
    """See that a run of both stores is one run, and holds one number wherever both hold one.

    Raises:
        PersonaError: it is not, or does not.
    """
    shown = f"{info.experiment}/{info.run}"
    # Of a hosted model the identity does not say on which weights, and in which precision.
    for name in ("precision", "attn_implementation", "server_revision"):
        if (ours := own.attrs.get(name)) != (other := info.attrs.get(name)):
            raise PersonaError(
                f"The run {shown} has the {name} {ours!r} in the target and {other!r} in the "
                "source; nothing was merged."
            )
    for below in _groups(info):
        theirs = _group(source, info, below)
        ours = _group(target, own, below)
        if theirs is None or ours is None:
            continue
        _check_arrays(theirs, ours, shown)
        done, arrays = ours.completed(both := _complete(theirs)), theirs.arrays()
        for name, units in _written([unit for unit in both if unit.label in done], theirs):
            exact = arrays[name].dtype.kind != "f"
            for batch in _batches(units, theirs):
                held = ours.read_units(batch, name), theirs.read_units(batch, name)
                for unit, one, other in zip(batch, *held, strict=True):
                    if not same_but_for_rounding(one, other, exact=exact):
                        raise PersonaError(
                            f"The run {shown} has other numbers in the source: "
                            f"{_difference(name, unit, ours, one, other)}; nothing was merged."
                        )


def _check_arrays(theirs: RunGroup, ours: RunGroup, shown: str) -> None:
    """See that units of one group fit into the other."""
    names = set(theirs.attrs["variables"])
    placed = {axis for unit in _all_units(theirs) for axis in unit.place}
    fits = names == set(ours.attrs["variables"]) and all(
        theirs.axes(name) == ours.axes(name) for name in names
    )
    axes = {axis for name in names for axis in theirs.axes(name)} if fits else set[str]()
    for axis in sorted(axes & theirs.arrays().keys()):
        there, here = theirs.labels(axis), ours.labels(axis)
        fits = fits and (set(there) <= set(here) if axis in placed else there == here)
    if not fits:
        raise PersonaError(
            f"The run {shown} has other variables or labels in the two stores; nothing was merged."
        )


def _difference(
    name: str, unit: PlacedUnit, group: RunGroup, one: NDArray[Any], other: NDArray[Any]
) -> str:
    """Where two arrays differ first, in words."""
    noun = noun_of(group.unit_axes)
    differ = (one != other) & ~((one != one) & (other != other))
    index = tuple(np.argwhere(differ)[0].tolist())
    ours, theirs = one[index], other[index]
    return f"{name!r} of the {noun} {unit.label!r} is {theirs!s} there and {ours!s} in the target"


def _merge_run(
    target: str | Path, source: str | Path, info: RunInfo, own: RunInfo | None, *, public: bool
) -> Merged:
    run = info.run if own is None else own.run
    group, attrs, n_added = None, {}, 0
    for below in _groups(info):  # its own group is the last
        theirs = _group(source, info, below)
        assert theirs is not None
        attrs = for_everybody(theirs.attrs) if public else theirs.attrs
        group = attach_copy(target, f"{info.experiment}/{run}{below}", theirs, attrs)
        _carry_notes(theirs, group, public=public)
        done = group.completed(units := _complete(theirs))
        missing = [unit for unit in units if unit.label not in done]
        _add(missing, theirs, group)
        n_added = len(missing)
    assert group is not None
    _carry_prompts(target, source, info, run)
    if own is not None:
        _settle_age(group, attrs)
    return Merged(info.experiment, run, own is None, n_added, int(group.flags().sum()), len(group))


def _carry_prompts(target: str | Path, source: str | Path, info: RunInfo, run: str) -> None:
    """Carry over what a reader sees of the prompts without a tokenizer."""
    shown = read_shown(source, info.experiment, info.run)
    if shown and not read_shown(target, info.experiment, run):
        group = open_group(target, f"{info.experiment}/{run}", "a")
        assert group is not None
        write_shown(group, shown)


def _groups(info: RunInfo) -> list[str]:
    """The groups of a run that units are written to, below its own (``""``), which comes last."""
    return [f"/{name}" for name in info.group.below()] + [""]


def _group(store: str | Path, info: RunInfo, below: str) -> RunGroup | None:
    return find_group(store, info.experiment, f"{info.run}{below}")


def _all_units(group: RunGroup) -> list[PlacedUnit]:
    """All units of a group."""
    if "units" in group.attrs:  # some have a place beyond the dimensions of ``completed``
        return [PlacedUnit(place) for place in group.attrs["units"]]
    axes = group.unit_axes
    labels = itertools.product(*map(group.labels, axes))
    return [PlacedUnit(dict(zip(axes, of, strict=True))) for of in labels]


def _complete(group: RunGroup) -> list[PlacedUnit]:
    units = _all_units(group)
    done = group.completed(units)
    return [unit for unit in units if unit.label in done]


def _written(
    units: Sequence[PlacedUnit], group: RunGroup
) -> Iterator[tuple[str, list[PlacedUnit]]]:
    """The variables of a group, each with those of the units that write it."""
    placed = {axis for unit in _all_units(group) for axis in unit.place}
    for name in group.attrs["variables"]:
        own = placed & set(group.axes(name))
        if writing := [unit for unit in units if own <= set(unit.place)]:
            yield name, writing


def _batches(units: Sequence[PlacedUnit], group: RunGroup) -> Iterator[Sequence[PlacedUnit]]:
    """Units, as many at a time as memory may hold; all with places on the same dimensions."""
    many = min(_UNITS_AT_A_TIME, max(1, _BYTES_AT_A_TIME // max(1, group.unit_bytes())))
    many = max(many // group.per_chunk, 1) * group.per_chunk  # whole blocks
    for _, alike in itertools.groupby(units, lambda unit: list(unit.place)):
        of = list(alike)
        for start in range(0, len(of), many):
            yield of[start : start + many]


def _add(units: Sequence[PlacedUnit], theirs: RunGroup, ours: RunGroup) -> None:
    """Write units of one group into another: each one's ``completed`` after all the rest of it."""
    for batch in _batches(units, theirs):
        values: list[dict[str, NDArray[Any]]] = [{} for _ in batch]
        names = [name for name, writing in _written(batch, theirs) if writing]
        for name in [*names, "seconds"]:
            for row, value in zip(values, theirs.read_units(batch, name), strict=True):
                row[name] = value
        ours.write_units(list(zip(batch, values, strict=True)), 0.0)


def _carry_notes(theirs: RunGroup, ours: RunGroup, *, public: bool) -> None:
    """Carry over who computed, and what is noted of jobs on servers.

    A session that goes on goes on in its own store: here it claims nothing.
    """
    for of in ("sessions",) if public else ("sessions", "jobs"):
        known = ours.notes(of)
        for name, note in theirs.notes(of).items():
            is_over = bool(note.get("ended")) or note.get("state", "waiting") != "waiting"
            if name in known and not is_over:
                continue
            carried = for_everybody(note) if public else dict(note)
            if of == "sessions":
                carried |= {"claims": [], "ended": note.get("ended") or _last_sign(note)}
            ours.note(of, name, carried)
    known = sessions_over(ours) | sessions_over(theirs)
    if known - sessions_over(ours):
        say_over(ours, known)


def _last_sign(note: Mapping[str, Any]) -> str:
    """When a session that has not ended was seen last."""
    return str(note.get("seen") or note.get("started") or "elsewhere")


def _settle_age(group: RunGroup, theirs: Mapping[str, Any]) -> None:
    """A run is as old as the older of two, and is called as one of them is."""
    older = {name: theirs[name] for name in ("created", "session") if name in theirs}
    if str(theirs["created"]) < str(group.attrs["created"]):
        group.say(older)
    if theirs.get("name") and not group.attrs.get("name"):
        group.say({"name": theirs["name"]})


def other_groups(store: str | Path) -> list[str]:
    """Groups of a store that are no experiment's runs, such as key-value caches; not merged."""
    known = {info.experiment for info in list_runs(store)}
    root = open_group(store, "", "r")
    return [] if root is None else [name for name, _ in subgroups(root) if name not in known]
