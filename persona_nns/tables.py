"""Results, runs and models as tables for the terminal."""

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import xarray as xr
from rich import box
from rich.table import Table
from rich.text import Text

from persona_nns.places import place_of
from persona_nns.store import RunInfo
from persona_nns.variables import FILL

# Beside the results: what the store notes about their making.
_BOOKKEEPING = ("seconds", "completed")


def result_table(results: xr.Dataset, name: str) -> Table:
    """A variable over cells: a row a layer, a column a position (or what else it has).

    Numbers are summarised by median and quartiles, truth values by their share; texts stand
    as they are, a row a cell.

    Args:
        results: of one experiment.
        name: the variable.
    """
    array = results[name]
    if array.dtype.kind == "O":
        return _text_table(array)
    units = array.attrs.get("units", "1")
    title = f"{name}: {array.attrs.get('long_name', name)}"
    n_cells = int(results["completed"].any("model").sum())
    what = "share" if array.dtype.kind == "b" else "median [25 %, 75 %]"
    table = Table(
        title=Text(title if units == "1" else f"{title} in {units}"),
        caption=Text(f"{what} over {n_cells} cells"),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    leading = [dim for dim in ("model", "layer") if dim in array.dims]
    for dim in leading:
        table.add_column(dim, justify="left" if dim == "model" else "right")
    if "layer" in leading:
        table.add_column("depth", justify="right")
    across = [str(dim) for dim in array.dims if dim not in ("model", "cell", "layer")]
    present = array.where(results["completed"] & _measured(array))
    stacked = present.stack(column=across) if across else present.expand_dims(column=[""])
    for label in stacked.column.values.tolist():
        heading = " · ".join(map(str, label)) if isinstance(label, tuple) else str(label)
        table.add_column(Text(heading or what.partition(" ")[0]), justify="right")
    for model in array.model.values.tolist():
        rows = stacked.sel(model=model)
        if "layer" in leading:
            rows = rows.dropna("layer", how="all")
        layers = rows.layer.values.tolist() if "layer" in leading else [None]
        for layer in layers:
            row = rows if layer is None else rows.sel(layer=layer)
            site = [] if layer is None else [str(layer), f"{layer / int(rows.n_layers):.2f}"]
            columns = row.transpose("column", "cell").values.astype(float)
            summarise = _share if array.dtype.kind == "b" else _quartiles
            head = Text(model if layer == layers[0] else "")
            last = layer == layers[-1]
            table.add_row(head, *site, *map(summarise, columns), end_section=last)
    return table


def _measured(array: xr.DataArray) -> xr.DataArray:
    """Where something was measured: integers cannot be NaN, and hold −1 where nothing was."""
    return array != FILL["int"] if array.dtype.kind == "i" else array.notnull()


def _text_table(array: xr.DataArray) -> Table:
    table = Table(title=Text(str(array.name)), title_justify="left", box=box.SIMPLE_HEAD)
    dims = [str(dim) for dim in array.dims]
    for heading in (*dims, str(array.name)):
        table.add_column(Text(heading))
    for place in np.ndindex(*array.shape):
        if text := str(array.values[place]):
            labels = [str(array[dim].values[k]) for dim, k in zip(dims, place, strict=True)]
            table.add_row(*map(Text, labels), Text(text))
    return table


def measured(results: xr.Dataset) -> list[str]:
    """The variables that hold numbers, the experiment's first one first."""
    return [
        str(name)
        for name, array in results.data_vars.items()
        if array.dtype.kind in "fib" and name not in _BOOKKEEPING
    ]


def _share(values: np.ndarray[tuple[int], np.dtype[np.floating]]) -> str:
    present = values[~np.isnan(values)]
    return f"{100 * present.mean():.1f} %" if present.size else "–"


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


def runs_table(runs: Iterable[RunInfo], store: str) -> Table:
    """What a store holds, a row a run, under the names of the experiments."""
    table = Table(title=Text(store), title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("run", "precision", "cells", "size", "created (UTC)"):
        table.add_column(heading, no_wrap=True)
    table.add_column("age", no_wrap=True)
    table.add_column("parameters")
    place = place_of(store)
    last = None
    for info in runs:
        if info.experiment != last:
            table.add_row(Text(info.experiment, style="bold"))
        table.add_row(
            Text(f"  {info.run}"),
            info.attrs["precision"],
            f"{info.n_completed}/{info.n_cells}",
            _bytes(place.size(f"{info.experiment}/{info.run}")),
            info.attrs["created"][:16].replace("T", " "),
            _age(info.attrs["created"]),
            Text(info.configuration),
        )
        last = info.experiment
    return table


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
