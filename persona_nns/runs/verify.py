"""Check what a store holds: every array, and a sample of units (say, cells) computed anew."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr

from persona_nns.declarations.catalog import load_experiment
from persona_nns.errors import PersonaError, UsageError
from persona_nns.results.measured import is_count, is_truth
from persona_nns.results.reading import PUBLISHED_VERSION, RunInfo, list_runs, open_results
from persona_nns.runs.anew import Experiments, Models, NotCheckedError, compute_anew, grid_of

_PROVENANCE = (
    *("experiment", "identity", "protocol_version", "model", "model_source", "model_version"),
    *("precision", "grid", "grid_digest", "template", "parameters", "plan_options", "created"),
    "variables",
)
_PROVENANCE_OF_GRIDS = ("personas", "tasks", "markers")
# Numbers that were published, not computed: there is nothing to compute anew.
_PROVENANCE_OF_PUBLISHED = ("source", "source_digest", "model", "grid_digest", "personas", "tasks")


@dataclass(frozen=True)
class Verdict:
    """What was found out about a run.

    Attributes:
        info: the run.
        problems: a sentence each; none where nothing is wrong.
        n_recomputed: units computed anew.
        not_checked: why no unit could be computed anew; empty where some were, or where there
            was nothing to compute.
    """

    info: RunInfo
    problems: tuple[str, ...]
    n_recomputed: int
    not_checked: str = ""

    @property
    def state(self) -> Literal["right", "wrong", "not checked"]:
        """The answer."""
        if self.problems:
            return "wrong"
        return "not checked" if self.not_checked else "right"


def verify_store(
    store: str | Path,
    *,
    sample: int = 2,
    experiments: Sequence[str | Path] = (),
    models: Sequence[str] = (),
    backend: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
) -> Iterator[Verdict]:
    """Check every run of a store: those of one model one after the other, so that it stays loaded.

    Args:
        store: path or URL of the store.
        sample: complete units of each run to compute anew; 0 checks what is stored alone.
        experiments: files of experiments that are not bundled.
        models: folders where models are now that were elsewhere, or stood for a hosted model.
        backend: ``ndif`` or a URL, where runs that were made on a server are computed anew; by
            default they are not, and nothing of their models is loaded.
        trust_remote_code: run code that comes with a model.
        seed: chooses the sample.

    Raises:
        UsageError: there is no store there, or no such experiment, model or server.
    """
    known = Experiments({e.name: e for e in map(load_experiment, experiments)})
    if models or backend is not None:
        _check_places(models, backend)
    loaded = Models(backend, models, trust_remote_code)
    runs = list_runs(store)
    turn: dict[tuple[str, ...], int] = {}
    for info in runs:
        turn.setdefault(Models.key(info.attrs), len(turn))
    for info in sorted(runs, key=lambda info: turn[Models.key(info.attrs)]):
        n_recomputed, not_checked = 0, ""
        problems = list(_check_provenance(info))
        try:
            if problems:
                raise PersonaError("What it holds was not checked for want of that.")
            results = open_results(store, info.experiment, run=info.run)
            problems += _check_arrays(results, info)
            computed = info.attrs["protocol_version"] != PUBLISHED_VERSION
            if sample and computed and not problems and info.n_completed:
                n_recomputed, found = compute_anew(
                    info, results, sample, seed, experiments=known, models=loaded
                )
                problems += found
        except NotCheckedError as error:
            not_checked = str(error)
        except PersonaError as error:
            problems.append(str(error))
        yield Verdict(info, tuple(problems), n_recomputed, not_checked)


def _check_places(models: Sequence[str], backend: str | None) -> None:
    """See that models and a server can be asked for.

    Raises:
        UsageError: one of them cannot.
    """
    from persona_nns.models.checkpoints import model_label
    from persona_nns.models.servers import Server, read_backend

    for name in models:
        model_label(name)
    if backend is not None and not isinstance(read_backend(backend), Server):
        raise UsageError(
            f"Runs that were made on a server are computed anew on one, not on {backend!r}; "
            "use --backend ndif or the server's URL."
        )


def _check_provenance(info: RunInfo) -> Iterator[str]:
    needed = _PROVENANCE + (_PROVENANCE_OF_GRIDS if info.noun == "cell" else ())
    published = info.attrs.get("protocol_version") == PUBLISHED_VERSION
    if published:
        needed = _PROVENANCE_OF_PUBLISHED
    missing = [name for name in needed if name not in info.attrs]
    if missing:
        yield f"Its provenance lacks {', '.join(missing)}."
    elif not published:
        yield from _check_digests(info)


def _check_digests(info: RunInfo) -> Iterator[str]:
    """That texts are those whose digests stand beside them."""
    grid, template = grid_of(info), info.attrs["template"]
    if grid is not None and grid.digest != info.attrs["grid_digest"]:
        yield "Its personas, tasks and markers are not those of its grid_digest."
    digest = hashlib.sha256(template.encode()).hexdigest()
    if info.attrs.get("template_digest", digest) != digest:
        yield "Its template is not that of its template_digest."


def _check_arrays(results: xr.Dataset, info: RunInfo) -> Iterator[str]:
    """Shapes, labels, and that complete units hold what they should."""
    if info.noun == "cell":
        yield from _check_cells(results, info)
    for name, coordinate in results.coords.items():
        # An array that is called as one of its dimensions is no label, though xarray has it there.
        if coordinate.dims == (name,) and len(set(coordinate.values.tolist())) != coordinate.size:
            yield f"A label of {name!r} stands there twice."
    if results.model.values.tolist() != [info.attrs["model"]]:
        yield f"Its model is labelled {results.model.item()!r}."
    parameters = info.attrs["parameters"]
    for name in ("layer", "position"):
        asked = parameters.get(f"{name}s")
        if name in results.coords and not set(asked or ()) <= set(results[name].values.tolist()):
            yield f"It lacks some of the {name}s that it was asked for."
    for name, array in results.data_vars.items():
        if array.dtype.kind != "f" or is_count(array) or is_truth(array):
            continue
        values = array.sel(layer=parameters["layers"]) if _at_asked(array, parameters) else array
        if np.isinf(values).any():
            yield f"{name!r} is infinite in a complete {info.noun}."
        # Of other units it may be right: a pair of one persona and itself has no difference.
        if info.noun == "cell" and values.size and "cell" in values.dims:
            nothing = values.isnull().all([dim for dim in values.dims[1:] if dim != "cell"])
            # An array that no cell has is one that the run did not ask for.
            if not bool(nothing.all()) and bool((nothing & results.completed).any()):
                yield f"{name!r} is NaN throughout a complete cell."


def _check_cells(results: xr.Dataset, info: RunInfo) -> Iterator[str]:
    """That cells are those of the grid that the run knows."""
    expected = [
        f"{p}/{t}" for p, t in zip(results.persona.values, results.task.values, strict=True)
    ]
    if results.cell.values.tolist() != expected:
        yield "The labels of its cells are not persona/task."
    personas, tasks = set(info.attrs["personas"]), set(info.attrs["tasks"])
    unknown = set(results.persona.values) - personas | set(results.task.values) - tasks
    if unknown:
        yield f"Its grid does not know {', '.join(sorted(unknown))}."


def _at_asked(array: xr.DataArray, parameters: Mapping[str, Any]) -> bool:
    return "layer" in array.dims and bool(parameters.get("layers"))
