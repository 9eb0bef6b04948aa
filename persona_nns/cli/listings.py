"""Runs and models as tables for the terminal."""

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from persona_nns.figures.tables import measured, new_table
from persona_nns.results.locations import location_of
from persona_nns.results.reading import RunInfo

if TYPE_CHECKING:
    import xarray as xr

    from persona_nns.models.fetched import FetchedModel
    from persona_nns.runs.remote.environment import Deployment
    from persona_nns.runs.remote.job_book import NotedJob


def runs_table(runs: Iterable[RunInfo], store: str) -> Table:
    """What a store holds, by experiment: a row a run, and below it when and how it was made."""
    table = new_table(Text(store))
    table.add_column("run", overflow="fold")
    for heading in ("complete", "size", "age"):
        table.add_column(heading, no_wrap=True)
    location = location_of(store)
    last = None
    for info in runs:
        if info.experiment != last:
            table.add_row(Text(info.experiment, style="bold"))
        table.add_row(
            Text(f"  {info.run}"),
            f"{info.n_completed}/{info.n_units}",
            _bytes(location.size(f"{info.experiment}/{info.run}")),
            _age(info.attrs["created"]),
        )
        created = f"{info.attrs['created'][:16].replace('T', ' ')} UTC"
        known = (created, info.computing, info.configuration)
        made = ", ".join(part for part in known if part)
        table.add_row(Padding(Text(made, style="dim"), (0, 0, 0, 4)))
        last = info.experiment
    return table


def jobs_tables(noted: Iterable["NotedJob"], said: Mapping[str, str]) -> Iterator[Table]:
    """Jobs, a table for each run and server: a row a job, and below it how it stands.

    Args:
        noted: the jobs, by run and server.
        said: what servers say of those that wait, by id.
    """
    for (experiment, run, host), group in groupby(noted, key=_place):
        headings = ["units", "age", "sent", "back", "took"]
        table = new_table(Text(f"{experiment}/{run} on {host}"), texts=["job"], numbers=headings)
        for job in (one.job for one in group):
            is_over = job.state == "written"
            table.add_row(
                Text(job.id),
                str(len(job.units)),
                _age(job.submitted),
                _bytes(job.request_bytes),
                _bytes(job.result_bytes) if is_over else "",
                f"{job.seconds:.1f} s" if is_over else "",
            )
            known = {"refused": "it was too large for the server"}
            standing = known.get(job.state, said.get(job.id))
            state = f"{job.state}: {standing}" if standing else job.state
            table.add_row(Padding(Text(state, style="dim"), (0, 0, 0, 2)))
        yield table


def _place(one: "NotedJob") -> tuple[str, str, str]:
    return one.experiment, one.run, one.job.host


def _bytes(size: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size = round(size / 1000)
    return f"{size} TB"


def _age(created: str) -> str:
    """How long ago something was, in its largest unit."""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def made_table(results: "xr.Dataset") -> Table:
    """What a result holds beside numbers: how many texts of each variable and model."""
    table = new_table("Without numbers", texts=["model", "variable"], numbers=["texts"])
    for name, array in results.data_vars.items():
        if array.dtype.kind == "O":
            for model, texts in array.groupby("model"):
                many = f"{int((texts != '').sum())} of {texts.size}"
                table.add_row(Text(str(model)), Text(f"{name}: {array.attrs['long_name']}"), many)
    return table


def with_values(results: "xr.Dataset") -> list[str]:
    """The variables of which some number was measured, the experiment's first one first."""
    return [name for name in measured(results) if bool(results[name].notnull().any())]


def hosted_table(deployments: Iterable["Deployment"], url: str) -> Table:
    """The models that a server hosts, a row each."""
    headings = ["name", "revision", "state", "level"]
    table = new_table(Text(f"Models on {url}"), texts=headings)
    for one in deployments:
        several = f" × {one.replicas}" if one.replicas > 1 else ""
        state = one.state.lower() + several if one.state else "not running"
        table.add_row(*map(Text, (one.repo_id, one.revision, state, one.level.lower() or "–")))
    return table


def models_table(models: Mapping[str, Path]) -> Table:
    """The bundled models, a row each, read from their configuration files."""
    headings = ["name", "architecture", "layers", "d_model", "weights"]
    table = new_table("Bundled models", texts=headings)
    for name, folder in models.items():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        table.add_row(
            name,
            config["architectures"][0],
            str(config["num_hidden_layers"]),
            str(config["hidden_size"]),
            f"{size / 1e6:.1f} MB",
        )
    return table


def fetched_table(models: Mapping[str, "FetchedModel"]) -> Table:
    """The models that are fetched from a package, a row each, and whether they are here."""
    headings = ["name", "licence", "here", "download", "on disk"]
    table = new_table("Fetched models", texts=headings)
    for name, model in models.items():
        table.add_row(
            name + (" (base)" if model.is_base else ""),
            model.licence.partition(",")[0],
            "yes" if model.folder.is_dir() else "no",
            _bytes(model.download),
            _bytes(model.size),
        )
    return table
