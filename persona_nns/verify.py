"""Check what a store holds: every array, and a sample of cells computed anew."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import xarray as xr

from persona_nns.errors import PersonaError
from persona_nns.grids import Grid
from persona_nns.store import RunInfo, list_runs, open_results

# Results of other batches, devices and versions of torch differ by rounding.
_RTOL, _ATOL = 1e-3, 1e-4
_PROVENANCE = (
    *("experiment", "identity", "protocol_version", "model", "model_source", "model_version"),
    *("precision", "grid", "grid_digest", "personas", "tasks", "markers", "template"),
    *("parameters", "created", "variables"),
)
_DETERMINING = ("protocol_version", "model_version", "precision", "grid_digest", "template")


@dataclass(frozen=True)
class Verdict:
    """What was found out about a run.

    Attributes:
        info: the run.
        problems: a sentence each; none where all is right.
        n_recomputed: cells computed anew.
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
        sample: complete cells of each run to compute anew; 0 checks what is stored alone.
        experiments: files of experiments that are not bundled.
        seed: chooses the sample.

    Raises:
        UsageError: there is no store there.
    """
    files = {Path(file).stem: file for file in experiments}
    for info in list_runs(store):
        problems = list(_check_provenance(info.attrs))
        n_recomputed = 0
        try:
            if problems:
                raise PersonaError("What it holds was not checked for want of that.")
            results = open_results(store, info.experiment, run=info.run)
            problems += _check_arrays(results, info)
            if sample and not problems and info.n_completed:
                done = results.cell[results.completed.values[0]].values.tolist()
                chosen = random.Random(seed).sample(done, min(sample, len(done)))  # noqa: S311
                n_recomputed = len(chosen)
                file = files.get(info.experiment, info.experiment)
                with TemporaryDirectory() as folder:
                    anew = _measure(info, file, chosen, folder)
                problems += _compare(results.sel(cell=chosen), anew)
        except PersonaError as error:
            problems.append(str(error))
        yield Verdict(info, tuple(problems), n_recomputed)


def _check_provenance(attrs: Mapping[str, Any]) -> Iterator[str]:
    missing = [name for name in _PROVENANCE if name not in attrs]
    if missing:
        yield f"Its provenance lacks {', '.join(missing)}."


def _check_arrays(results: xr.Dataset, info: RunInfo) -> Iterator[str]:
    """Shapes, labels, and that complete cells hold what they should."""
    expected = [
        f"{p}/{t}" for p, t in zip(results.persona.values, results.task.values, strict=True)
    ]
    if results.cell.values.tolist() != expected:
        yield "The labels of its cells are not persona/task."
    personas, tasks = set(info.attrs["personas"]), set(info.attrs["tasks"])
    unknown = set(results.persona.values) - personas | set(results.task.values) - tasks
    if unknown:
        yield f"Its grid does not know {', '.join(sorted(unknown))}."
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
    done = results.isel(cell=np.flatnonzero(results.completed.values[0]))
    for name, array in done.data_vars.items():
        if array.dtype.kind != "f":
            continue
        values = array.sel(layer=parameters["layers"]) if _at_asked(array, parameters) else array
        if np.isinf(values).any():
            yield f"{name!r} is infinite in a complete cell."
        others = [dim for dim in values.dims if dim != "cell"]
        if values.size and values.isnull().all(dim=others).any():
            yield f"{name!r} is NaN throughout a complete cell."


def _at_asked(array: xr.DataArray, parameters: Mapping[str, Any]) -> bool:
    return "layer" in array.dims and bool(parameters.get("layers"))


def _measure(info: RunInfo, experiment: str, cells: Sequence[str], folder: str) -> xr.Dataset:
    """Compute cells of a run anew, into a store of their own, from what its provenance says.

    Raises:
        PersonaError: the model or the experiment is not here, or is not the one of the run.
    """
    from persona_nns.models import load_model
    from persona_nns.runs import plan_run

    attrs = info.attrs
    markers = {name: tuple(words) for name, words in attrs["markers"].items()}
    grid = Grid(attrs["grid"], attrs["personas"], attrs["tasks"], markers)
    model = load_model(
        attrs["model_source"], dtype=attrs["precision"], label=attrs["model"], allow_float16=True
    )
    model.tokenizer.chat_template = attrs["template"]
    store = Path(folder) / "anew.zarr"
    plan = plan_run(experiment, model, grid, store=store, cells=cells, **attrs["parameters"])
    now = plan.request.block.attrs
    if now["identity"] != attrs["identity"]:
        changed = [name for name in _DETERMINING if now[name] != attrs[name]]
        what = " and ".join(changed) or "something that determines its numbers"
        raise PersonaError(f"It cannot be computed anew, because {what} is not what it was.")
    plan.carry_out(progress=False)
    return open_results(store, info.experiment)


def _compare(stored: xr.Dataset, anew: xr.Dataset) -> Iterator[str]:
    """Where results differ by more than rounding."""
    for name in stored.data_vars:
        if name in ("seconds", "completed"):
            continue
        kept, values = stored[name].values[0], anew[name].sel(cell=stored.cell).values[0]
        same = (
            np.isclose(kept, values, rtol=_RTOL, atol=_ATOL, equal_nan=True)
            if kept.dtype.kind == "f"
            else kept == values
        )
        right = same.reshape(len(kept), -1).all(axis=1)
        if not right.all():
            wrong = ", ".join(stored.cell.values[~right].tolist())
            yield f"{name!r} of {wrong} is not what is computed anew."
