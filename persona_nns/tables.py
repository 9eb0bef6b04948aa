"""Results, runs and models as tables for the terminal."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import xarray as xr
from rich import box
from rich.table import Table

from persona_nns.store import RunInfo

# Beside the results: what the store notes about their making.
_BOOKKEEPING = ("seconds", "completed")


def result_table(results: xr.Dataset, name: str) -> Table:
    """Median and quartiles of a variable over cells: a row a layer, a column a position.

    Args:
        results: of one experiment.
        name: the variable.
    """
    array = results[name]
    units = array.attrs.get("units", "1")
    long_name = array.attrs.get("long_name", name)
    n_cells = int(results["completed"].any("model").sum())
    table = Table(
        title=f"{name}: {long_name}" + (f" in {units}" if units != "1" else ""),
        caption=f"median [25 %, 75 %] over {n_cells} cells",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    leading = [dim for dim in ("model", "layer") if dim in array.dims]
    across = [str(dim) for dim in array.dims if dim not in ("model", "cell", "layer")]
    for dim in leading:
        table.add_column(dim, justify="left" if dim == "model" else "right")
    if "layer" in leading:
        table.add_column("depth", justify="right")
    stacked = array.stack(column=across) if across else array.expand_dims(column=[""])
    for label in stacked.column.values.tolist():
        heading = " · ".join(map(str, label)) if isinstance(label, tuple) else str(label)
        table.add_column(heading or "median", justify="right")
    last = None
    for model in array.model.values.tolist():
        layers = array.layer.values.tolist() if "layer" in array.dims else [None]
        for layer in layers:
            row = stacked.sel(model=model)
            row = row if layer is None else row.sel(layer=layer)
            if bool(row.isnull().all()):
                continue
            cells = [model if model != last else ""]
            if layer is not None:
                cells += [str(layer), f"{float(results.depth.sel(model=model, layer=layer)):.2f}"]
            columns = row.transpose("column", "cell").values
            table.add_row(*cells, *map(_quartiles, columns), end_section=layer == layers[-1])
            last = model
    return table


def measured(results: xr.Dataset) -> list[str]:
    """The variables that hold real numbers, the experiment's first one first."""
    return [
        str(name)
        for name, array in results.data_vars.items()
        if array.dtype.kind == "f" and name not in _BOOKKEEPING
    ]


def _quartiles(values: np.ndarray[tuple[int], np.dtype[np.floating]]) -> str:
    present = values[~np.isnan(values)]
    if not present.size:
        return "–"
    low, median, high = np.percentile(present, [25, 50, 75])
    return f"{number(median)} [dim]\\[{_short(low)},{_short(high)}][/dim]"


def number(value: float) -> str:
    """Three decimals; what rounds to zero has no sign."""
    return f"{value:.3f}".replace("-0.000", "0.000")


def _short(value: float) -> str:
    """Three significant places without the leading zero, as the paper's tables have it."""
    text = number(value) if abs(value) < 10 else f"{value:.1f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def runs_table(runs: Iterable[RunInfo], title: str) -> Table:
    """What a store holds, a row a run, under the names of the experiments."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("run", "precision", "cells", "created (UTC)"):
        table.add_column(heading, no_wrap=True)
    last = None
    for info in runs:
        if info.experiment != last:
            table.add_row(f"[bold]{info.experiment}[/bold]")
        table.add_row(
            f"  {info.run}",
            info.attrs["precision"],
            f"{info.n_completed}/{info.n_cells}",
            info.attrs["created"][:16].replace("T", " "),
        )
        last = info.experiment
    return table


def models_table(models: Mapping[str, Path]) -> Table:
    """The bundled models, a row each, read from their configuration files."""
    table = Table(title="Bundled models", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("name", "architecture", "layers", "d_model", "weights"):
        table.add_column(heading)
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
