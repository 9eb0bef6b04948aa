"""Which run of a store is meant by what somebody writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from persona_nns.errors import UsageError
from persona_nns.results.reading import LATEST, RunInfo, list_runs, open_results

if TYPE_CHECKING:
    import xarray as xr


def choose_run(store: str | Path, asked: str) -> RunInfo:
    """The run that is meant: ``experiment/run``, a run's name alone, or the one it was given.

    ``latest`` is the run that was begun last, ``experiment/latest`` the last of an experiment.

    Args:
        store: path or URL of the store.
        asked: what somebody wrote.

    Raises:
        UsageError: there is no such run, or there are several.
    """
    runs = list_runs(store)
    experiment, _, name = asked.rpartition("/")
    found = [info for info in runs if info.is_called(asked)]
    found = found or [
        info for info in runs if info.experiment == experiment and info.is_called(name)
    ]
    if not found and name == LATEST:
        of = [info for info in runs if experiment in ("", info.experiment)]
        found = sorted(of, key=lambda info: str(info.attrs["created"]))[-1:]
    if len(found) == 1:
        return found[0]
    if not found:
        known = _listed([info for info in runs if info.experiment == asked] or runs)
        raise UsageError(f"There is no run {asked!r} in {str(store)!r}; there are: {known}.")
    raise UsageError(f"Several runs are called {asked!r}: {_listed(found)}; give the whole name.")


def _listed(runs: list[RunInfo]) -> str:
    return ", ".join(f"{info.experiment}/{info.run}" for info in runs) or "none"


def open_chosen(store: str | Path, asked: str) -> xr.Dataset:
    """The results that are meant: of a run (`choose_run`), or of an experiment, joined over models.

    Args:
        store: path or URL of the store.
        asked: what somebody wrote.

    Raises:
        UsageError: there is no such run, or an experiment's runs are several results.
    """
    if any(info.experiment == asked for info in list_runs(store)):
        return open_results(store, asked)
    info = choose_run(store, asked)
    return open_results(store, info.experiment, run=info.run)
