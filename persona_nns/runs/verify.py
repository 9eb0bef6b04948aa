"""Check what a store holds: every array, and a sample of units (say, cells) computed anew."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from persona_nns.declarations.plans import Unit
from persona_nns.errors import PersonaError
from persona_nns.prompts.grids import Grid
from persona_nns.results.measured import is_count, is_truth
from persona_nns.results.reading import PUBLISHED_VERSION, RunInfo, list_runs, open_results

if TYPE_CHECKING:
    from persona_nns.runs.run import PlannedRun

# Results of other batches, devices and versions of torch differ by rounding.
_RTOL, _ATOL = 1e-3, 1e-4
_PROVENANCE = (
    *("experiment", "identity", "protocol_version", "model", "model_source", "model_version"),
    *("precision", "grid", "grid_digest", "template", "parameters", "plan_options", "created"),
    "variables",
)
_PROVENANCE_OF_GRIDS = ("personas", "tasks", "markers")
# Numbers that were published, not computed: there is nothing to compute anew.
_PROVENANCE_OF_PUBLISHED = ("source", "source_digest", "model", "grid_digest", "personas", "tasks")
_DETERMINING = ("protocol_version", "model_version", "precision", "grid_digest", "template")


@dataclass(frozen=True)
class Verdict:
    """What was found out about a run.

    Attributes:
        info: the run.
        problems: a sentence each; none where all is right.
        n_recomputed: units computed anew.
    """

    info: RunInfo
    problems: tuple[str, ...]
    n_recomputed: int


def verify_store(
    store: str | Path, *, sample: int = 2, experiments: Sequence[str] = (), seed: int = 0
) -> Iterator[Verdict]:
    """Check every run of a store, one after the other.

    Args:
        store: path or URL of the store.
        sample: complete units of each run to compute anew; 0 checks what is stored alone.
        experiments: files of experiments that are not bundled.
        seed: chooses the sample.

    Raises:
        UsageError: there is no store there.
    """
    files = {Path(file).stem: file for file in experiments}
    for info in list_runs(store):
        problems = list(_check_provenance(info))
        n_recomputed = 0
        try:
            if problems:
                raise PersonaError("What it holds was not checked for want of that.")
            results = open_results(store, info.experiment, run=info.run)
            problems += _check_arrays(results, info)
            computed = info.attrs["protocol_version"] != PUBLISHED_VERSION
            harmless = not info.attrs.get("unverifiable")
            if sample and computed and harmless and not problems and info.n_completed:
                file = files.get(info.experiment, info.experiment)
                with TemporaryDirectory() as folder:
                    planned = _plan_anew(info, file, Path(folder) / "anew.zarr")
                    done = info.group.completed(planned.request.units)
                    units = [unit for unit in planned.request.units if unit.label in done]
                    chosen = random.Random(seed).sample(units, min(sample, len(units)))  # noqa: S311
                    n_recomputed = len(chosen)
                    problems += _compare(results, planned, chosen)
        except PersonaError as error:
            problems.append(str(error))
        yield Verdict(info, tuple(problems), n_recomputed)


def _check_provenance(info: RunInfo) -> Iterator[str]:
    needed = _PROVENANCE + (_PROVENANCE_OF_GRIDS if info.noun == "cell" else ())
    if info.attrs.get("protocol_version") == PUBLISHED_VERSION:
        needed = _PROVENANCE_OF_PUBLISHED
    missing = [name for name in needed if name not in info.attrs]
    if missing:
        yield f"Its provenance lacks {', '.join(missing)}."


def _check_arrays(results: xr.Dataset, info: RunInfo) -> Iterator[str]:
    """Shapes, labels, and that complete units hold what they should."""
    if info.noun == "cell":
        yield from _check_cells(results, info)
    for name, coordinate in results.coords.items():
        if name in results.dims and len(set(coordinate.values.tolist())) != coordinate.size:
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


def _plan_anew(info: RunInfo, experiment: str, store: Path) -> "PlannedRun":
    """Plan a run once more, into another store, from what its provenance says.

    Raises:
        PersonaError: the model or the experiment is not here, or is not the one of the run.
    """
    from persona_nns.models.load import load_model
    from persona_nns.runs.run import plan_run

    attrs = info.attrs
    grid = None
    if info.noun == "cell":
        markers = {name: tuple(words) for name, words in attrs["markers"].items()}
        grid = Grid(attrs["grid"], attrs["personas"], attrs["tasks"], markers)
    model = load_model(
        attrs["model_source"], dtype=attrs["precision"], label=attrs["model"], allow_float16=True
    )
    model.tokenizer.chat_template = attrs["template"]
    settings = {**attrs["parameters"], **attrs["plan_options"]}
    planned = plan_run(experiment, model, grid, store=store, **settings)
    now = planned.request.block.attrs
    if now["identity"] != attrs["identity"]:
        changed = [name for name in _DETERMINING if now[name] != attrs[name]]
        what = " and ".join(changed) or "something that determines its numbers"
        raise PersonaError(f"It cannot be computed anew, because {what} is not what it was.")
    return planned


def _compare(results: xr.Dataset, planned: "PlannedRun", units: Sequence[Unit]) -> Iterator[str]:
    """Compute units anew; yield where more than rounding differs."""
    wrong: dict[str, list[str]] = {}
    request = replace(planned.request, units=tuple(units))
    replace(planned, request=request).carry_out(progress=False)
    anew = open_results(planned.store, request.experiment.name)
    axes = {name: variable.axes for name, variable in request.block.variables.items()}
    for unit in units:
        for name in request.plan.names_written(unit, axes):
            here = {axis: label for axis, label in unit.place.items() if axis in axes[name]}
            kept, values = results[name].sel(here).values, anew[name].sel(here).values
            same = (
                np.allclose(kept, values, rtol=_RTOL, atol=_ATOL, equal_nan=True)
                if kept.dtype.kind == "f" and not is_count(results[name])
                else np.array_equal(kept, values, equal_nan=kept.dtype.kind == "f")
            )
            if not same:
                wrong.setdefault(name, []).append(unit.label)
    for name, labels in wrong.items():
        yield f"{name!r} of {', '.join(labels)} is not what is computed anew."
