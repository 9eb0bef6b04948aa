"""Results as tables for the terminal, and how all our tables look."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markup import render
from rich.table import Column, Table
from rich.text import Text

from persona_nns.errors import UsageError
from persona_nns.figures.intervals import interval, share_interval
from persona_nns.results.attributes import read_attribute
from persona_nns.results.measured import clean_marker_note, is_truth, measured_values

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

# Values of a row; where there are more, those of numbered labels are summarised over.
_MOST_VALUES = 12
# Columns of a table that 80 characters have room for; of more, each is a row.
_MOST_COLUMNS = 3
# Characters that a column of broken names has at least.
_NARROWEST = 8
# Beside the results: what the store notes about their making.
_BOOKKEEPING = ("seconds", "completed")
# Variables that say little of a persona without markers in its clean texts.
_OF_MARKERS = ("any_marker", "distinct_markers", "clean_any_marker")
# Dimensions whose labels are rows of a table; of two of them, the first.
_DOWN = ("layer", "layer_band", "control", "layer_set", "site", "condition")


class WholeWords(Table):
    """A table that breaks its lines between words, and names at their hyphens, never inside."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay the columns out for this terminal, and render them."""
        longest = [max(map(len, _words(column)), default=1) for column in self.columns]
        room = options.max_width - 3 * len(longest) - 1
        for index in sorted(range(len(longest)), key=lambda k: -longest[k]):
            too_much = sum(longest) - room
            if too_much <= 0:
                break
            column = self.columns[index]
            fitting = max(longest[index] - too_much, _NARROWEST)
            column._cells = [_broken(cell, fitting) for cell in column.cells]
            longest[index] = max(map(len, _words(column)), default=1)
        spare = room - sum(longest)
        if spare < 0:  # words have to be broken, so that none is cut off
            for column in self.columns:
                column.width, column.overflow = None, "fold"
        else:
            needs = [_longest_line(column, room) for column in self.columns]
            # Those that need least first: as many as there is room for stay on one line.
            for index in sorted(range(len(needs)), key=lambda k: needs[k] - longest[k]):
                more = min(max(needs[index] - longest[index], 0), spare)
                self.columns[index].width = longest[index] + more
                spare -= more
        yield from super().__rich_console__(console, options)


def _plain(cell: RenderableType) -> str:
    return cell.plain if isinstance(cell, Text) else render(str(cell)).plain


def _words(column: Column) -> list[str]:
    """All that a column must not break: what stands between its spaces."""
    cells = [cell for cell in (column.header, *column.cells) if isinstance(cell, str | Text)]
    return [word for cell in cells for word in _plain(cell).split()]


def _longest_line(column: Column, most: int) -> int:
    """The width in which no line of a column is broken; of other things than texts, the most."""
    cells = [cell for cell in (column.header, *column.cells) if cell]
    if not all(isinstance(cell, str | Text) for cell in cells):
        return most
    return max((len(line) for cell in cells for line in _plain(cell).splitlines()), default=1)


def _broken(cell: RenderableType, width: int) -> RenderableType:
    """A name that is too long in lines that end at its hyphens, an interval with a space inside."""
    if not isinstance(cell, str | Text) or " " in _plain(cell).strip(" ]"):
        return cell.replace(",", ", ") if isinstance(cell, str) else cell
    lines = [""]
    for part in re.findall(r"[^-_/.+]*[-_/.+]?", _plain(cell)):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return Text("\n".join(lines), style=cell.style if isinstance(cell, Text) else "")


def new_table(
    title: str | Text,
    *,
    texts: Sequence[str] = (),
    numbers: Sequence[str] = (),
    caption: str | Text | None = None,
) -> Table:
    """A table without rows; what has not to be read as markup is given as `Text`.

    Args:
        title: above the table.
        texts: headings of columns that are set at the left.
        numbers: headings of columns that are set at the right.
        caption: below the table.
    """
    return WholeWords(
        *texts,
        *(Column(heading, justify="right") for heading in numbers),
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )


def result_table(results: xr.Dataset, name: str, *, bootstrap: bool = False) -> Table:
    """A variable over cells: a row a layer (or layer set, or site), a column a position.

    Numbers are summarised by median and quartiles, truth values by their share and its Wilson
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
    # A summary over cells is five numbers, whose median and quartiles are its own.
    is_summary = "statistic" in array.dims
    array = array.rename(statistic="cell") if is_summary else measured_values(results, name)
    is_share = is_truth(results[name])
    summarise = _share if is_share else _median_interval if bootstrap else _quartiles
    statistic = "share" if is_share else "median"
    spread = "95 % Wilson interval" if is_share else "25 %, 75 %"
    if bootstrap and not is_share:
        spread = "95 % bootstrap interval"
    down = [dim for dim in _DOWN if dim in array.dims][:1]
    over, across = _summarised(results, array, down)
    n_units = int(results["completed"].any("model").sum())
    note = clean_marker_note(results) if name in _OF_MARKERS else ""
    cells = "1 cell" if n_units == 1 else f"{n_units} cells"
    counted = cells if over == ["cell"] else f"every {', '.join(over)}"
    said = f"{statistic} [{spread}] over {counted}" if over else ""
    if not (over or is_share):
        summarise, statistic = _only, "value"
    table = new_table(
        Text(title if units == "1" else f"{title} in {units}"),
        caption=Text(". ".join(filter(None, (said, note)))),
    )
    if np.prod([array.sizes[dim] for dim in across]) > _MOST_COLUMNS:
        down, across, statistic = [*across, *down], [], "value"
    numbers = array.transpose("model", *down, *across, *over).to_series().dropna().astype(float)
    cells = {
        labels: summarise(values.to_numpy())
        for labels, values in numbers.groupby(level=["model", *down, *across], sort=False)
    }
    table.add_column("model", overflow="fold")
    for dim in [*down, "depth"] if down == ["layer"] else down:
        table.add_column(dim.replace("_", " "), justify="right")
    columns = _labels(array, across)
    for labels in columns:
        heading = Text(" · ".join(map(str, labels))) if labels else statistic
        table.add_column(heading, justify="right", overflow="fold")
    _add_rows(table, array, down, columns, cells)
    return table


def _add_rows(
    table: Table,
    array: xr.DataArray,
    down: list[str],
    columns: list[tuple[Any, ...]],
    cells: Mapping[Any, str],
) -> None:
    """A row for each label of `down` that has a number in a column."""
    for model in array.model.values.tolist():
        sites = [
            site
            for site in _labels(array, down)
            if not down or any((model, *site, *labels) in cells for labels in columns)
        ]
        for site in sites:
            own = [str(label) for label in site]
            if down == ["layer"]:
                own.append(f"{site[0] / int(array.n_layers.sel(model=model)):.2f}")
            row = (cells.get((model, *site, *labels), "–") for labels in columns)
            head = model if site == sites[0] else ""
            table.add_row(*map(Text, (head, *own)), *row, end_section=site == sites[-1])


def _labels(array: xr.DataArray, dims: list[str]) -> list[tuple[Any, ...]]:
    return list(product(*(array[dim].values.tolist() for dim in dims)))


def _summarised(
    results: xr.Dataset, array: xr.DataArray, down: list[str]
) -> tuple[list[str], list[str]]:
    """The dimensions that a table summarises over, and those that make its columns."""
    placed = {axis for place in read_attribute(results, "units", []) for axis in place}
    dims = [str(dim) for dim in array.dims if dim not in ("model", *down)]
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
    table = new_table(Text(str(array.name)))
    for heading in (*array.dims, array.name):
        table.add_column(Text(str(heading)))
    for *labels, text in array.to_series().rename("").reset_index().itertuples(index=False):
        if text:
            table.add_row(*(Text(str(label)) for label in labels), Text(text))
    return table


def measured(results: xr.Dataset) -> list[str]:
    """The variables that hold numbers, the experiment's first one first."""
    return [
        str(name)
        for name, array in results.data_vars.items()
        if array.dtype.kind in "fib" and name not in _BOOKKEEPING
    ]


def _share(values: NDArray[np.float64]) -> str:
    low, high = share_interval(values.sum(), len(values))
    return f"{100 * values.mean():.1f} % [dim]\\[{100 * low:.0f},{100 * high:.0f}][/dim]"


def _median_interval(values: NDArray[np.float64]) -> str:
    return _number_in(float(np.median(values)), *interval(values))


def _only(values: NDArray[np.float64]) -> str:
    return number(float(values[0]))


def _quartiles(values: NDArray[np.float64]) -> str:
    low, median, high = np.percentile(values, [25, 50, 75])
    return _number_in(median, low, high)


def _number_in(value: float, low: float, high: float) -> str:
    return f"{number(value)} [dim]\\[{short_number(low)},{short_number(high)}][/dim]"


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
