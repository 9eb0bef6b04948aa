"""Results as labelled arrays: what a store holds, and which of its runs are one result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_nns.declarations.plans import noun_of
from persona_nns.errors import UsageError
from persona_nns.results.block import Block
from persona_nns.results.groups import is_allocated, open_root, subgroups
from persona_nns.results.kindred import families, open_family
from persona_nns.results.locations import location_of
from persona_nns.results.store import RunGroup, find_group

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True)
class RunInfo:
    """One run in a store: its group, and what it says of itself."""

    experiment: str
    run: str
    attrs: Mapping[str, Any]
    group: RunGroup

    @cached_property
    def n_completed(self) -> int:
        """The number of its units that are complete."""
        return int(self.group.flags().sum())

    @property
    def n_units(self) -> int:
        """The number of its units."""
        return len(self.group)

    @property
    def noun(self) -> str:
        """What one of its units is called in messages."""
        return noun_of(self.group.unit_axes)

    @property
    def kin(self) -> str:
        """What runs of different models have in common when they can be read as one result."""
        parameters = {
            name: value
            for name, value in self.attrs["parameters"].items()
            if name not in ("layers", "layer_sets")
        }
        shared = [self.attrs["grid_digest"], self.attrs["protocol_version"], parameters]
        return json.dumps(shared, sort_keys=True)

    @property
    def computing(self) -> str:
        """Its precision, and what is not as usual: weights in fewer bits, attention not eager."""
        held = self.attrs.get("quantisation", {}).get("kind", "")
        how = self.attrs.get("attn_implementation", "eager")
        return " ".join(filter(None, [self.attrs["precision"], held, how * (how != "eager")]))

    @property
    def configuration(self) -> str:
        """Its parameters, as short as they can be told."""
        return ", ".join(f"{k}={_brief(v)}" for k, v in self.attrs["parameters"].items())

    def describe(self) -> str:
        """One line that tells this run from its neighbours."""
        named = f"{self.attrs['name']}: " if self.attrs.get("name") else ""
        begun = str(self.attrs["created"])[:16].replace("T", " ")
        return (
            f"{named}{self.run} (model {self.attrs['model']}, grid {self.attrs['grid']}, "
            f"{', '.join(filter(None, (self.computing, self.configuration)))}, version "
            f"{self.attrs['protocol_version']}, begun {begun}, "
            f"{self.n_completed}/{self.n_units} complete)"
        )

    def is_called(self, name: str) -> bool:
        """Whether this is its group's name, or the one that it was given."""
        return name in (self.run, self.attrs.get("name"))


def _brief(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    if value and isinstance(value[0], list):
        return ";".join(map(_brief, value))
    return ",".join(map(str, value))


def list_runs(store: str | Path, experiment: str | None = None) -> list[RunInfo]:
    """The runs in a store, by experiment and age.

    Raises:
        UsageError: there is no store there.
    """
    root, location = open_root(store), location_of(store)
    if root is None:
        private = " (or it is private: `hf auth login`)" if location.is_on_hub else ""
        raise UsageError(f"There is no Zarr store at {str(store)!r}{private}.")
    runs: list[RunInfo] = []
    for name, _ in subgroups(root):
        if experiment not in (None, name):
            continue
        for run, group in subgroups(root, name):
            if is_allocated(group):
                runs.append(RunInfo(name, run, dict(group.attrs), RunGroup(group, location)))
    return sorted(runs, key=lambda info: (info.experiment, info.attrs["created"], info.run))


def bytes_in_memory(store: str | Path, experiment: str) -> int:
    """What an experiment's runs take when they are read, texts aside; 0 where there are none."""
    root = open_root(store)
    runs = [] if root is None else [group for _, group in subgroups(root, experiment)]
    return sum(array.nbytes for group in runs for _, array in group.arrays())


def find_run(store: str | Path, block: Block) -> str | None:
    """The group that holds results of this identity and model label, whatever its grid's name."""
    if open_root(store) is None:
        return None
    wanted = (block.attrs["identity"], block.model)
    for info in list_runs(store, block.experiment):
        if (info.attrs["identity"], info.attrs["model"]) == wanted:
            _check_declared(info, block)
            return info.run
    return None


def _check_declared(info: RunInfo, block: Block) -> None:
    """See that a run's arrays are those that its experiment declares now.

    Raises:
        UsageError: they are others; its complete units would lack what was added.
    """
    stored = {name: info.group.axes(name) for name in info.attrs["variables"]}
    declared = {name: variable.axes for name, variable in block.variables.items()}
    if stored == declared:
        return
    differing = sorted(
        name for name in {*stored, *declared} if stored.get(name) != declared.get(name)
    )
    raise UsageError(
        f"The run {info.run!r} was measured with other variables ({', '.join(differing)}) under "
        f"the same protocol_version {info.attrs['protocol_version']!r}; raise protocol_version in "
        f"the file of {block.experiment!r}."
    )


def open_results(
    store: str | Path,
    experiment: str,
    *,
    grid: Any = None,
    model: str | Sequence[str] | None = None,
    run: str | Sequence[str] | None = None,
    residuals: bool = False,
) -> xr.Dataset:
    """Open an experiment's results as one Dataset over models.

    Models are joined if their runs agree in grid, parameters and protocol version; their layers
    may differ (what a model lacks is NaN). Runs of one model are joined if they differ in nothing
    but their layers, or in how many cells their grid has. Arrays as wide as a model (``d_model``)
    are never joined: they are there where one run is opened; residuals that a run kept
    (``keep_residuals``), where they are asked for with ``residuals=True``.

    What was not measured is NaN and enters no mean: cells (or other units) that are not complete,
    layers that a model lacks. Integers and truth values are floats where that is so, and what they
    were declared as where all was measured; their attribute ``kind`` says which. Texts are empty.

    Attributes are what a NetCDF file takes: numbers and texts, and lists and mappings as JSON
    (`read_attribute` gives them back). Of several models, an attribute in which they differ is a
    list in their order.

    Args:
        store: path or URL of the store.
        experiment: name of the experiment.
        grid: only runs on this grid: its name, its file, or a `Grid`.
        model: only runs of this model, or of these, by their labels in the results.
        run: only this run, or these runs, by the name of their group or the one that they were
            given; ``latest`` is the one that was begun last, of each model.
        residuals: with the residuals that the run kept; of one run.

    Raises:
        UsageError: no such results, or several sets of them, which the message lists; residuals of
            several runs, or of one that kept none.
    """
    runs = list_runs(store, experiment)
    if not runs:
        raise UsageError(f"The store {str(store)!r} holds no results of {experiment!r}.")
    chosen = [info for info in runs if _is_on(info, grid)]
    models = [model] if isinstance(model, str) else list(model or ())
    for label in models:
        if not any(info.attrs["model"] == label for info in chosen):
            known = ", ".join(dict.fromkeys(info.attrs["model"] for info in chosen))
            raise UsageError(f"There is no run of the model {label!r}; there are: {known}.")
    if models:
        chosen = [info for info in chosen if info.attrs["model"] in models]
    asked = [run] if isinstance(run, str) else list(run or ())
    if asked == [LATEST]:
        chosen = list({info.attrs["model"]: info for info in chosen}.values())
    elif asked:
        for name in asked:
            if not any(info.is_called(name) for info in runs):
                known = ", ".join(info.run for info in runs)
                raise UsageError(f"There is no run {name}; there are: {known}, {LATEST}.")
        chosen = [info for info in chosen if any(map(info.is_called, asked))]
    if not chosen:
        choices = "; ".join(info.describe() for info in runs)
        raise UsageError(f"No run of {experiment!r} matches; there are: {choices}.")
    grouped = [[info] for info in chosen] if asked else families(chosen)
    chosen = [family[0] for family in grouped]
    if len({info.kin for info in chosen}) > 1:
        raise UsageError(
            f"Several sets of results of {experiment!r} match; choose with grid, model or run: "
            + "; ".join(info.describe() for info in chosen)
        )
    labels = [info.attrs["model"] for info in chosen]
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(
                f"Several runs of the model {label!r} match; choose one with run: "
                + "; ".join(info.describe() for info in chosen if info.attrs["model"] == label)
            )
    from persona_nns.results.joining import join_models

    opened = [
        open_family(family, lambda info: _opened(store, info, info.run, info.group))
        for family in grouped
    ]
    if residuals:
        opened = [opened[0].assign(_kept_residuals(store, chosen).data_vars)]
    return join_models(opened, experiment)


def _kept_residuals(store: str | Path, chosen: Sequence[RunInfo]) -> xr.Dataset:
    """What a run keeps that is as wide as its model, in the group below its own."""
    if len(chosen) > 1:
        names = ", ".join(info.run for info in chosen)
        raise UsageError(f"Residuals are opened of one run; choose one with run: {names}.")
    (info,) = chosen
    below = f"{info.run}/residuals"
    group = find_group(store, info.experiment, below)
    if group is None:
        raise UsageError(
            f"The run {info.run!r} kept no residuals; run it again with keep_residuals=True."
        )
    return _opened(store, info, below, group).drop_vars(["seconds", "completed"])


def _opened(store: str | Path, info: RunInfo, run: str, group: RunGroup) -> xr.Dataset:
    # Listing runs does without xarray, which takes as long to import as all the rest.
    from persona_nns.results.opening import open_run

    return open_run(location_of(store), f"{info.experiment}/{run}", group)


def _is_on(info: RunInfo, grid: Any) -> bool:
    if grid is None:
        return True
    from persona_nns.prompts.files import suffix_of
    from persona_nns.prompts.grid_files import GRID_FILES
    from persona_nns.prompts.grids import BUNDLED_GRIDS, load_grid

    is_file = not isinstance(grid, str) or suffix_of(grid) in GRID_FILES
    if not is_file and grid not in BUNDLED_GRIDS:
        return bool(info.attrs["grid"] == grid)
    return bool(info.attrs["grid_digest"] == load_grid(grid).digest)


#: What `open_results` takes for the run that was begun last.
LATEST = "latest"

#: The ``protocol_version`` of published numbers, which were not computed here.
PUBLISHED_VERSION = "published"
