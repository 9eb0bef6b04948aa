"""A comparison as tables for the terminal, in the order of the paper's tables 1 to 4."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from persona_nns.figures.tables import short_number
from persona_nns.published.compare import LAYER_DIMS, Row, distinct, records, where

_PAPER = {
    ("localized_positions", "short"): "Table 1 and Figure 1",
    ("localized_positions", "long"): "Table 2 and Figure 1",
    ("behavioral_markers", "review"): "Table 3",
    ("host_injection", "review"): "Table 4",
}
_LABELS = {
    "kl": "KL (nat)",
    "cos_additive": "cos(ΔXY, ΔX+ΔY)",
    "any_marker": "any marker",
    "distinct_markers": "distinct\nmarkers",
    "closure_of_medians": "closure of\nmedians",
}
POSITIONS = ("p_last", "g1", "g2")  # of the paper's tables and figure
_WITH_QUARTILES = ("kl", "closure")
_CLOSURES = ("closure", "closure_of_medians")
_SITES = ("source", "condition", "position")


def comparison_tables(frame: pd.DataFrame) -> list[Table]:
    """Published and measured side by side, for each grid and pair of models.

    The terminal shows what the paper prints; all variables, positions and layers are in the CSV.

    Args:
        frame: `Comparison.side_by_side`.
    """
    every = records(frame)
    tables: list[Table] = []
    for experiment in distinct(every, "experiment"):
        of_experiment = where(every, experiment=experiment)
        for grid in distinct(of_experiment, "grid"):
            of_grid = where(of_experiment, grid=grid)
            for model in distinct(of_grid, "model"):
                paper = _PAPER.get((experiment, grid), experiment)
                for measured in distinct(where(of_grid, model=model), "measured_model"):
                    rows = where(of_grid, model=model, measured_model=measured)
                    beside = "" if measured == model else f" beside {measured}"
                    tables += _tables_of_pair(rows, f"{paper}: {grid} grid, {model}{beside}")
    return tables


def _tables_of_pair(rows: list[Row], title: str) -> list[Table]:
    names = distinct(rows, "variable")
    if "source" in rows[0]:
        closures = [name for name in _CLOSURES if name in names]
        kept = _without_repeats(rows)
        tables = [_table(kept, ["kl"], title)]
        return [*tables, _table(kept, closures, f"{title}, closure")] if closures else tables
    if "position" in rows[0] and "kl" in names:
        rows = [row for row in rows if row["position"] in POSITIONS] or rows
        sites = {(row["layer"], row["position"]) for row in where(rows, variable="kl")}
        rows = [row for row in rows if (row["layer"], row["position"]) in sites]
        return [_table(rows, ["kl"], title), *_cosines(where(rows, variable="cos_additive"), title)]
    return [_table(rows, names, title)]


def _cosines(rows: list[Row], title: str) -> Iterator[Table]:
    """Median cosines of the additive prediction, a row a layer."""
    if not rows:
        return
    moved = _is_moved(rows, "layer")
    table = _empty_table(f"{title}: median cos(ΔXY, ΔX+ΔY)")
    _add_layer_columns(table, "layer", moved=moved)
    positions = distinct(rows, "position")
    for position in positions:
        table.add_column(f"{position}\npubl.", justify="right")
        table.add_column("\nmeas.", justify="right")
    for here in distinct(rows, "layer"):
        at = where(rows, layer=here)
        cells = _layer_cells(at[0], "layer", moved=moved)
        for position in positions:
            mine = where(at, position=position)
            cells += [_summary(mine, side) for side in ("published", "measured")]
        table.add_row(*cells)
    yield table


def _without_repeats(rows: list[Row]) -> list[Row]:
    """Without what is the same at every layer set because nothing is injected, as in Table 4."""
    first = rows[0]["layer_set"]
    return [
        row
        for row in rows
        if row["source"] != "none" or (row["layer_set"] == first and row["variable"] == "kl")
    ]


def _table(rows: list[Row], names: Sequence[str], title: str) -> Table:
    """One pair of models on one grid: a row a site, two columns a variable."""
    rows = [row for row in rows if row["variable"] in names]
    sites = [name for name in _SITES if name in rows[0]]
    (layer,) = [name for name in LAYER_DIMS if name in rows[0]]
    moved = _is_moved(rows, layer)
    what = "; median [25 %, 75 %]" if {*names} & {*_WITH_QUARTILES} else ""
    n_published, n_measured = (max(r[f"{s}_n"] for r in rows) for s in ("published", "measured"))
    table = _empty_table(title)
    table.caption = f"published over {n_published} cells, measured over {n_measured}{what}"
    for site in sites:
        table.add_column(site, no_wrap=True)
    _add_layer_columns(table, layer, moved=moved)
    for name in names:
        heading = _LABELS.get(name, name)
        table.add_column(f"{heading}\npublished", justify="right")
        table.add_column("\n" * (heading.count("\n") + 1) + "measured", justify="right")
    for group in distinct(rows, sites[0]):
        of_group = where(rows, **{sites[0]: group})
        for here in distinct(of_group, layer):
            at = where(of_group, **{layer: here})
            cells = [Text(str(at[0][site])) for site in sites]
            cells += _layer_cells(at[0], layer, moved=moved)
            for name in names:
                of_name = where(at, variable=name)
                cells += [_summary(of_name, side) for side in ("published", "measured")]
            table.add_row(*cells)
        if len(distinct(of_group, layer)) > 1:
            table.add_section()
    return table


def _empty_table(title: str) -> Table:
    return Table(
        title=Text(title), title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD
    )


def _add_layer_columns(table: Table, layer: str, *, moved: bool) -> None:
    heading = layer.replace("_", " ")
    for side in ("published", "measured") if moved else ("depth",):
        table.add_column(f"{heading}\n{side}", justify="right", overflow="fold")


def _layer_cells(row: Row, layer: str, *, moved: bool) -> list[Text]:
    """The layer of the published model, and that of the measured one if it is another."""
    cells = [f"{row[layer]} ({row['depth']:.2f})"]
    if moved:
        cells.append(f"{row[f'measured_{layer}']} ({row['measured_depth']:.2f})")
    return [Text(cell) for cell in cells]


def _is_moved(rows: list[Row], layer: str) -> bool:
    """Whether the measured model was paired at layers of other names."""
    return any(row[layer] != row[f"measured_{layer}"] for row in rows)


def _summary(rows: list[Row], side: str) -> Text:
    """One number of a table; a dash where there is none."""
    if not rows:
        return Text("–")
    (row, *_), value = rows, float(rows[0][side])
    if row["variable"] == "any_marker":
        return Text(f"{round(value * row[f'{side}_n'])} ({100 * value:.1f}%)")
    if row["variable"] == "distinct_markers":
        return Text(f"{value:.2f}")
    text = Text(median_number(value))
    low, high = row[f"{side}_q25"], row[f"{side}_q75"]
    if row["variable"] in _WITH_QUARTILES and not np.isnan(low):
        text.append(f" [{short_number(low)},{short_number(high)}]", style="dim")
    return text


def median_number(value: float) -> str:
    """Three decimals; four where three would leave no digit, as the paper has it."""
    if value == 0:
        return "0.000"
    return f"{value:.3f}" if abs(value) >= 5e-4 else f"{value:.4f}"


def agreement_tables(frame: pd.DataFrame) -> list[Table]:
    """How far results of one model agree on a grid: a row a variable, over all its sites.

    Args:
        frame: `Comparison.agreement`.
    """
    every = records(frame)
    tables: list[Table] = []
    for grid in distinct(every, "grid"):
        for model in distinct(where(every, grid=grid), "model"):
            rows = where(every, grid=grid, model=model)
            table = _empty_table(f"Agreement: {grid} grid, {model}, value by value")
            table.caption = _tolerance(rows)
            table.add_column("variable", no_wrap=True)
            table.add_column("within", justify="right")
            table.add_column("rank correlation\nmedian (lowest)", justify="right")
            table.add_column("worst: published → measured", overflow="fold")
            for name in distinct(rows, "variable"):
                table.add_row(*_agreement_row(name, where(rows, variable=name)))
            tables.append(table)
    return tables


def _agreement_row(name: str, rows: list[Row]) -> list[Text]:
    worst = max(rows, key=lambda row: abs(row["measured"] - row["published"]))
    n, within = sum(row["n"] for row in rows), sum(row["within"] for row in rows)
    ranks = [row["rank_correlation"] for row in rows if not np.isnan(row["rank_correlation"])]
    values = " → ".join(median_number(worst[side]) for side in ("published", "measured"))
    differs = worst["measured"] != worst["published"]
    cells = [
        name,
        f"{within}/{n} ({100 * within / n:.1f} %)",
        f"{np.median(ranks):.3f} ({min(ranks):.3f})" if ranks else "–",
        f"{values} ({', '.join([worst['worst'], *_site(worst)])})" if differs else "none differs",
    ]
    return [Text(cell) for cell in cells]


def _tolerance(rows: list[Row]) -> str:
    """What counts as agreement."""
    numbers = [row for row in rows if row["absolute"] or row["relative"]]
    if not numbers:
        return "within: equal"
    allowed = numbers[0]
    text = (
        f"within: {allowed['absolute']:g} + {100 * allowed['relative']:g} % of the published value"
    )
    return text if len(numbers) == len(rows) else f"{text}; counts and truth values equal"


def _site(row: Row) -> Iterable[str]:
    for name in (*LAYER_DIMS, *_SITES):
        if name in row and not pd.isna(row[name]):
            yield f"layer {row[name]}" if name in LAYER_DIMS else row[name]
