"""What is said in each cell, beside each other, with the persona's markers made visible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from persona_nns.errors import UsageError
from persona_nns.figures.tables import new_table
from persona_nns.prompts.markers import find_markers, marker_spans
from persona_nns.results.attributes import read_attribute

if TYPE_CHECKING:
    import xarray as xr

_MARKER = "bold black on yellow"


def marked_texts(results: xr.Dataset) -> Iterator[Table]:
    """A table for each cell of each model: its texts, and the markers that are found in them.

    A text that another layer has too, because it does not depend on the layer, stands there once.

    Args:
        results: of an experiment on a grid, with texts.

    Raises:
        UsageError: it has none.
    """
    names = [
        str(name)
        for name, array in results.data_vars.items()
        if array.dtype.kind == "O" and "cell" in array.dims
    ]
    if not names:
        raise UsageError(f"The results of {results.attrs['experiment']!r} hold no texts of cells.")
    markers = read_attribute(results, "markers", {})
    for model in results.model.values.tolist():
        of_model = results[names].sel(model=model)
        for place, cell in enumerate(results.cell.values.tolist()):
            persona = str(results.persona.values[place])
            rows = list(_rows(of_model.isel(cell=place), names))
            if rows:
                yield _table(f"{model} · {cell}", rows, markers.get(persona, ()))


def _rows(cell: xr.Dataset, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What each text of a cell is, and the text."""
    seen: set[Any] = set()
    for name in names:
        array = cell[name]
        several = [str(dim) for dim in array.dims if array.sizes[dim] > 1]
        stacked = array.stack(at=array.dims) if array.dims else array.expand_dims("at")
        for one in stacked.transpose("at"):
            said = str(one.item())
            labels = {dim: one[dim].item() for dim in several}
            same = (name, said, *(str(label) for dim, label in labels.items() if dim != "layer"))
            if not said or same in seen:
                continue
            seen.add(same)
            shown = (f"{dim} {at}" if dim == "layer" else str(at) for dim, at in labels.items())
            yield " · ".join([*([name] if len(names) > 1 or not labels else []), *shown]), said


def _table(title: str, rows: Sequence[tuple[str, str]], markers: Sequence[str]) -> Table:
    table = new_table(Text(title, style="bold"), texts=["what", "markers", "text"])
    for what, said in rows:
        text = Text(said)
        for span in marker_spans(said, markers):
            text.stylize(_MARKER, span.start, span.stop)
        found = list(dict.fromkeys(find_markers(said, markers)))
        table.add_row(Text(what), Text(", ".join(found) or "–"), text, end_section=True)
    return table
