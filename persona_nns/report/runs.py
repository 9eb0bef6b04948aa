"""One run of a store for a page: what the index says of it, and what is shown when it is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from persona_nns.report.arrays import (
    describe_numbers,
    describe_texts,
    numeric_variables,
    text_variables,
)
from persona_nns.report.blobs import Blobs
from persona_nns.report.prompts import describe_prompts
from persona_nns.results.measured import clean_marker_note, nowhere_measured
from persona_nns.results.public import for_everybody
from persona_nns.results.reading import RunInfo, open_results

if TYPE_CHECKING:
    import xarray as xr

# What is told of a run's making, in this order; of its other attributes some are long, and the
# texts of a grid stand elsewhere.
_PROVENANCE = (
    "summary",
    "name",
    "model",
    "model_source",
    "model_version",
    "server_revision",
    "model_provenance",
    "adapter",
    "quantisation",
    "architecture",
    "precision",
    "attn_implementation",
    "n_layers",
    "d_model",
    "grid",
    "grid_digest",
    "default_baselines",
    "frame",
    "system_role",
    "protocol_version",
    "parameters",
    "plan_options",
    "file",
    "unverifiable",
    "template_digest",
    "identity",
    "created",
)
_MOST_SESSIONS = 20
# Variables that say something only of a persona that has markers.
_OF_MARKERS = ("any_marker", "distinct_markers", "clean_any_marker")


def describe_run(store: str | Path, info: RunInfo, blobs: Blobs) -> dict[str, Any]:
    """What the index says of a run; all else goes into ``blobs``.

    Args:
        store: path or URL of the store.
        info: the run.
        blobs: takes what is shown when the run is chosen.
    """
    results = open_results(store, info.experiment, run=info.run)
    numbers = [
        describe_numbers(results, name, blobs, _layers_of(info, name))
        for name in numeric_variables(results)
    ]
    texts = [describe_texts(results, name, blobs) for name in text_variables(results)]
    prompts = describe_prompts(store, info, blobs)
    left_out = [of["name"] for of in numbers if "blobs" in of and of["blobs"] is None]
    body = {
        "dims": {str(dim): _labels(results, str(dim)) for dim in results.dims if dim != "model"},
        "units": [str(dim) for dim in results["completed"].dims if dim != "model"],
        "along": {
            name: np.asarray(results[name].values).tolist()
            for name in ("persona", "task")
            if name in results.coords and results[name].dims == ("cell",)
        },
        "missing": _missing(results),
        "numbers": numbers,
        "texts": texts,
        "prompts": prompts,
        "markers": info.attrs.get("markers", {}),
        "provenance": _provenance(info),
        "sessions": _sessions(info),
    }
    return {
        "experiment": info.experiment,
        "run": info.run,
        "called": str(info.attrs.get("name", "")),
        "model": str(info.attrs["model"]),
        "grid": str(info.attrs.get("grid", "")),
        "computing": info.computing,
        "created": str(info.attrs["created"]),
        "noun": info.noun,
        "completed": info.n_completed,
        "of": info.n_units,
        "warnings": [*_warnings(info, results, prompts), *_left_out(left_out)],
        "left_out": left_out,
        "body": blobs.add_json(body),
    }


def _layers_of(info: RunInfo, name: str) -> list[int] | None:
    """The layers that were asked for, of a variable that has no others."""
    if name in info.attrs.get("every_layer", (name,)):
        return None
    return info.attrs["parameters"].get("layers")


def _missing(results: xr.Dataset) -> list[int]:
    """Places of the cells that are not complete."""
    completed = results["completed"]
    if completed.dims != ("model", "cell"):
        return []
    return np.flatnonzero(~completed.values[0]).tolist()


def _labels(results: xr.Dataset, dim: str) -> list[Any]:
    """The labels of a dimension; of one without, numbers."""
    if dim in results.coords:
        return [each if np.isscalar(each) else str(each) for each in results[dim].values.tolist()]
    return list(range(results.sizes[dim]))


def _provenance(info: RunInfo) -> list[list[Any]]:
    """How a run was made, without what names this machine: a report is given to others."""
    attrs = for_everybody(info.attrs)
    session = attrs.get("session", {})
    versions = session.get("versions", {}) if isinstance(session, Mapping) else {}
    made = {
        "packages": versions,
        **{
            name: session[name]
            for name in ("python", "platform", "git_commit")
            if isinstance(session, Mapping) and session.get(name)
        },
    }
    told = {name: attrs[name] for name in _PROVENANCE if name in attrs} | made
    return [[name, value] for name, value in told.items() if value not in ("", None, {}, [])]


def _sessions(info: RunInfo) -> dict[str, Any]:
    """Who computed the run: the last sessions, and how many there were."""
    sessions = info.group.sessions()
    known = ("started", "ended", "device", "batch_size", "n_written", "platform")
    last = [*sessions.items()][-_MOST_SESSIONS:]
    return {
        "many": len(sessions),
        "last": [{"name": n, **{k: of[k] for k in known if k in of}} for n, of in last],
    }


def _warnings(info: RunInfo, results: xr.Dataset, prompts: Mapping[str, Any] | None) -> list[str]:
    """What a reader has to know before reading the numbers, a sentence each."""
    said: list[str] = []
    if info.n_completed == 0:
        said.append(f"Nothing was measured: 0 of {info.n_units} {info.noun}s are complete.")
    elif info.n_completed < info.n_units:
        said.append(
            f"Not complete: {info.n_completed} of {info.n_units} {info.noun}s. All numbers are of "
            "these."
        )
    if nothing := nowhere_measured(results):
        said.append(f"NaN in every {info.noun} that is complete: {', '.join(nothing)}.")
    markers = info.attrs.get("markers", {})
    if prompts is not None and any(name in results for name in _OF_MARKERS):
        personas = dict.fromkeys(np.asarray(results["persona"].values).ravel().tolist())
        if without := [name for name in personas if not markers.get(name)]:
            said.append(f"Personas without markers, whose words say nothing: {', '.join(without)}.")
    if note := clean_marker_note(results):
        said.append(note)
    return said


def _left_out(names: list[str]) -> list[str]:
    if not names:
        return []
    return [
        f"Too large for a page, shown as summaries over all units: {', '.join(names)}. A report of "
        "this experiment alone (--experiment) has more room."
    ]
