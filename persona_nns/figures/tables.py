"""Results, runs and models as tables for the terminal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from rich import box
from rich.table import Table
from rich.text import Text

from persona_nns.errors import UsageError
from persona_nns.figures.intervals import interval
from persona_nns.results.measured import measured_values

# Values of a row; where there are more, those of numbered labels are summarised over.
_MOST_VALUES = 12
# Columns of a table that 80 characters have room for; of more, each is a row.
_MOST_COLUMNS = 3
# Beside the results: what the store notes about their making.
_BOOKKEEPING = ("seconds", "completed")
# Dimensions whose labels are rows of a table; of two of them, the first.
_DOWN = ("layer", "layer_band", "control", "layer_set", "site", "condition")


def result_table(results: xr.Dataset, name: str, *, bootstrap: bool = False) -> Table:
    """A variable over cells: a row a layer (or layer set, or site), a column a position.

    Numbers are summarised by median and quartiles, truth values by their share and its bootstrap
    interval; texts stand as they are, a row a cell. Of other units than cells, the summary is
    over all that they have a place on, and over dimensions with numbered labels where columns
    would be too many.

    Args:
        results: of one experiment.
        name: the variable.
        bootstrap: the bootstrap interval of the median in place of the quartiles.
    """
    array = results[name]
    if array.dtype.kind == "O":
        return _text_table(array)
    units = array.attrs.get("units", "1")
    title = f"{name}: {array.attrs.get('long_name', name)}"
    down = next((dim for dim in _DOWN if dim in array.dims), None)
    # A summary over cells is five numbers, whose median and quartiles are its own.
    is_summary = "statistic" in array.dims
    present = array if is_summary else measured_values(results, name)
    if is_summary:
        array = present = array.rename(statistic="cell")
    over, across = _summarised(results, array, down)
    n_units = int(results["completed"].any("model").sum())
    counted = f"{n_units} cells" if over == ["cell"] else f"every {', '.join(over)}"
    is_share = array.dtype.kind == "b"
    summarise = _share if is_share else _median_interval if bootstrap else _quartiles
    statistic = "share" if is_share else "median"
    spread = "95 % bootstrap interval" if is_share or bootstrap else "25 %, 75 %"
    what = f"{statistic} [{spread}]"
    table = Table(
        title=Text(title if units == "1" else f"{title} in {units}"),
        caption=Text(f"{what} over {counted}"),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("model", overflow="fold")
    # Underscores: a dimension of the results may have any other name.
    pooled = present.stack(_pooled=over) if over else present.expand_dims(_pooled=[0])
    if np.prod([array.sizes[dim] for dim in across]) > _MOST_COLUMNS:
        labels = across if down is None else [*across, down]
        return _add_long_rows(table, pooled, labels, summarise)
    if down is not None:
        table.add_column(down.replace("_", " "), justify="right")
    if down == "layer":
        table.add_column("depth", justify="right")
    stacked = pooled.stack(_column=across) if across else pooled.expand_dims(_column=[""])
    for label in stacked["_column"].values.tolist():
        heading = " · ".join(map(str, label)) if isinstance(label, tuple) else str(label)
        table.add_column(Text(heading or statistic), justify="right", overflow="fold")
    for model in array.model.values.tolist():
        rows = stacked.sel(model=model)
        labels: list[Any] = [None]
        if down is not None:
            rows = rows.dropna(down, how="all")
            labels = rows[down].values.tolist()
        for label in labels:
            row = rows if down is None else rows.sel({down: label})
            site = [] if down is None else [str(label)]
            if down == "layer":
                site.append(f"{label / int(rows.n_layers):.2f}")
            columns = row.transpose("_column", "_pooled").values.astype(float)
            head = Text(model if label == labels[0] else "")
            last = label == labels[-1]
            table.add_row(head, *site, *map(summarise, columns), end_section=last)
    return table


def _add_long_rows(
    table: Table,
    pooled: xr.DataArray,
    labels: list[str],
    summarise: Callable[..., str],
) -> Table:
    """A row for what would be a column of a row; none where nothing was measured."""
    for label in labels:
        table.add_column(label.replace("_", " "), justify="right")
    table.add_column("value", justify="right")
    for model in pooled.model.values.tolist():
        rows = pooled.sel(model=model).stack(_row=labels).dropna("_row", how="all")
        rows = rows.transpose("_row", "_pooled")
        for number_of, row in enumerate(rows):
            head = Text(model if number_of == 0 else "")
            own = (Text(str(row[label].item())) for label in labels)
            last = number_of == rows.sizes["_row"] - 1
            table.add_row(head, *own, summarise(row.values.astype(float)), end_section=last)
    return table


def _summarised(
    results: xr.Dataset, array: xr.DataArray, down: str | None
) -> tuple[list[str], list[str]]:
    """The dimensions that a table summarises over, and those that make its columns."""
    placed = {axis for place in results.attrs.get("units", []) for axis in place}
    dims = [str(dim) for dim in array.dims if dim not in ("model", down)]
    over = [dim for dim in dims if dim in results["completed"].dims]
    across = [dim for dim in dims if dim not in over]
    numbered = [dim for dim in across if array[dim].dtype.kind in "iu"]
    alone = [dim for dim in numbered if array.sizes[dim] == 1]  # a label that tells nothing
    over += alone
    across = [dim for dim in across if dim not in alone]
    for many in (numbered, [dim for dim in across if dim in placed]):
        many = [dim for dim in many if dim in across]
        if np.prod([array.sizes[dim] for dim in across]) > _MOST_VALUES:
            over += many
            across = [dim for dim in across if dim not in many]
    return over, across


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
    if not present.size:
        return "–"
    low, high = interval(present, statistic=np.mean)
    return f"{100 * present.mean():.1f} % [dim]\\[{100 * low:.0f},{100 * high:.0f}][/dim]"


def _median_interval(values: np.ndarray[tuple[int], np.dtype[np.floating]]) -> str:
    present = values[~np.isnan(values)]
    if not present.size:
        return "–"
    low, high = interval(present)
    spread = f"{short_number(low)},{short_number(high)}"
    return f"{number(float(np.median(present)))} [dim]\\[{spread}][/dim]"


def _quartiles(values: np.ndarray[tuple[int], np.dtype[np.floating]]) -> str:
    present = values[~np.isnan(values)]
    if not present.size:
        return "–"
    low, median, high = np.percentile(present, [25, 50, 75])
    return f"{number(median)} [dim]\\[{short_number(low)},{short_number(high)}][/dim]"


def number(value: float) -> str:
    """Three decimals; what rounds to zero has no sign."""
    return f"{value:.3f}".replace("-0.000", "0.000")


def short_number(value: float) -> str:
    """Three significant places without the leading zero, as the paper's tables have it."""
    text = number(value) if abs(value) < 10 else f"{value:.1f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def save_csv(frame: pd.DataFrame, file: Path) -> str:
    """Write a table; returns the path.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        frame.to_csv(file, index=False)
    except OSError as error:
        raise UsageError(f"The table {str(file)!r} cannot be written: {error}.") from error
    return str(file)
