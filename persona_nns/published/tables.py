"""A comparison as tables for the terminal, in the order of the paper's tables 1 to 4."""

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
from rich.table import Table
from rich.text import Text

from persona_nns.figures.style import groups
from persona_nns.figures.tables import new_table, short_number
from persona_nns.published.compare import LAYER_DIMS, OF_MEDIANS

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
    OF_MEDIANS: "closure of\nmedians",
}
POSITIONS = ("p_last", "g1", "g2")  # of the paper's tables and figure
_WITH_QUARTILES = ("kl", "closure")
_CLOSURES = ("closure", OF_MEDIANS)
_SIDES = ("published", "measured")
_SITES = ("source", "condition", "position")


def comparison_tables(frame: pd.DataFrame) -> list[Table]:
    """Published and measured side by side, for each grid and pair of models.

    The terminal shows what the paper prints; all variables, positions and layers are in the CSV.

    Args:
        frame: `Comparison.side_by_side`.
    """
    tables: list[Table] = []
    pairs = groups(frame, "experiment", "grid", "model", "measured_model")
    for (experiment, grid, model, measured), rows in pairs:
        paper = _PAPER.get((experiment, grid), experiment)
        beside = "" if measured == model else f" beside {measured}"
        tables += _tables_of_pair(rows, f"{paper}: {grid} grid, {model}{beside}")
    return tables


def _tables_of_pair(rows: pd.DataFrame, title: str) -> list[Table]:
    names = rows["variable"].unique().tolist()
    if "source" in rows:
        closures = [name for name in _CLOSURES if name in names]
        kept = _without_repeats(rows)
        tables = [_table(kept, ["kl"], title)]
        return [*tables, _table(kept, closures, f"{title}, closure")] if closures else tables
    if "position" in rows and "kl" in names:
        printed = rows.loc[rows["position"].isin(POSITIONS)]
        rows = rows if printed.empty else printed
        kl = rows.loc[rows["variable"] == "kl"]
        cosines = rows.loc[rows["variable"] == "cos_additive"]
        at_kl = cosines.merge(kl[["layer", "position"]])
        return [_table(kl, ["kl"], title), *_cosines(at_kl, title)]
    return [_table(rows, names, title)]


def _cosines(rows: pd.DataFrame, title: str) -> Iterator[Table]:
    """Median cosines of the additive prediction, a row a layer."""
    if rows.empty:
        return
    moved = _is_moved(rows, "layer")
    table = new_table(Text(f"{title}: median cos(ΔXY, ΔX+ΔY)"))
    _add_layer_columns(table, "layer", moved=moved)
    positions = rows["position"].unique()
    for position in positions:
        table.add_column(f"{position}\npubl.", justify="right")
        table.add_column("\nmeas.", justify="right")
    for _, at in groups(rows, "layer"):
        cells = _layer_cells(at.iloc[0], "layer", moved=moved)
        for position in positions:
            cells += _summaries(at.loc[at["position"] == position])
        table.add_row(*cells)
    yield table


def _without_repeats(rows: pd.DataFrame) -> pd.DataFrame:
    """Without what is the same at every layer set because nothing is injected, as in Table 4."""
    first = (rows["layer_set"] == rows["layer_set"].iloc[0]) & (rows["variable"] == "kl")
    return rows.loc[(rows["source"] != "none") | first]


def _table(rows: pd.DataFrame, names: Sequence[str], title: str) -> Table:
    """One pair of models on one grid: a row a site, two columns a variable."""
    rows = rows.loc[rows["variable"].isin(names)]
    sites = [name for name in _SITES if name in rows]
    (layer,) = [name for name in LAYER_DIMS if name in rows]
    moved = _is_moved(rows, layer)
    what = "; median [25 %, 75 %]" if {*names} & {*_WITH_QUARTILES} else ""
    n_published, n_measured = (rows[f"{side}_n"].max() for side in _SIDES)
    table = new_table(
        Text(title), caption=f"published over {n_published} cells, measured over {n_measured}{what}"
    )
    for site in sites:
        table.add_column(site, no_wrap=True)
    _add_layer_columns(table, layer, moved=moved)
    for name in names:
        heading = _LABELS.get(name, name)
        table.add_column(f"{heading}\npublished", justify="right")
        table.add_column("\n" * (heading.count("\n") + 1) + "measured", justify="right")
    for _, of_group in groups(rows, sites[0]):
        for _, at in groups(of_group, layer):
            cells = [Text(str(at[site].iloc[0])) for site in sites]
            cells += _layer_cells(at.iloc[0], layer, moved=moved)
            for name in names:
                cells += _summaries(at.loc[at["variable"] == name])
            table.add_row(*cells)
        if len(set(of_group[layer])) > 1:
            table.add_section()
    return table


def _add_layer_columns(table: Table, layer: str, *, moved: bool) -> None:
    heading = layer.replace("_", " ")
    for side in ("published", "measured") if moved else ("depth",):
        table.add_column(f"{heading}\n{side}", justify="right", overflow="fold")


def _layer_cells(row: Any, layer: str, *, moved: bool) -> list[Text]:
    """The layer of the published model, and that of the measured one if it is another."""
    cells = [f"{row[layer]} ({row['depth']:.2f})"]
    if moved:
        cells.append(f"{row[f'measured_{layer}']} ({row['measured_depth']:.2f})")
    return [Text(cell) for cell in cells]


def _is_moved(rows: pd.DataFrame, layer: str) -> bool:
    """Whether the measured model was paired at layers of other names."""
    return bool((rows[layer] != rows[f"measured_{layer}"]).any())


def _summaries(rows: pd.DataFrame) -> list[Text]:
    """The published and the measured number of a site; dashes where there is none."""
    return [Text("–") if rows.empty else _summary(rows.iloc[0], side) for side in _SIDES]


def _summary(row: Any, side: str) -> Text:
    value = row[side]
    if row["variable"] == "any_marker":
        return Text(f"{round(value * row[f'{side}_n'])} ({100 * value:.1f}%)")
    if row["variable"] == "distinct_markers":
        return Text(f"{value:.2f}")
    text = Text(median_number(value))
    low, high = row[f"{side}_q25"], row[f"{side}_q75"]
    if row["variable"] in _WITH_QUARTILES and not pd.isna(low):
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
    if frame.empty:
        return []
    tables: list[Table] = []
    for (grid, model), rows in groups(frame, "grid", "model"):
        title = Text(f"Agreement: {grid} grid, {model}, value by value")
        table = new_table(title, caption=_tolerance(rows))
        table.add_column("variable", no_wrap=True)
        table.add_column("within", justify="right")
        table.add_column("rank correlation\nmedian (lowest)", justify="right")
        table.add_column("worst: published → measured", overflow="fold")
        for (name,), of_variable in groups(rows, "variable"):
            table.add_row(*map(Text, _agreement_row(name, of_variable)))
        tables.append(table)
    return tables


def _agreement_row(name: str, rows: pd.DataFrame) -> list[str]:
    worst = rows.loc[(rows["measured"] - rows["published"]).abs().idxmax()]
    n, within = rows["n"].sum(), rows["within"].sum()
    ranks = rows["rank_correlation"].dropna()
    values = " → ".join(median_number(worst[side]) for side in _SIDES)
    differs = worst["measured"] != worst["published"]
    return [
        name,
        f"{within}/{n} ({100 * within / n:.1f} %)",
        "–" if ranks.empty else f"{ranks.median():.3f} ({ranks.min():.3f})",
        f"{values} ({', '.join([worst['worst'], *_site(worst)])})" if differs else "none differs",
    ]


def _tolerance(rows: pd.DataFrame) -> str:
    """What counts as agreement."""
    numbers = rows.loc[(rows["absolute"] > 0) | (rows["relative"] > 0)]
    if numbers.empty:
        return "within: equal"
    allowed = numbers.iloc[0]
    text = (
        f"within: {allowed['absolute']:g} + {100 * allowed['relative']:g} % of the published value"
    )
    return text if len(numbers) == len(rows) else f"{text}; counts and truth values equal"


def _site(row: Any) -> Iterator[str]:
    for name in (*LAYER_DIMS, *_SITES):
        if name in row and not pd.isna(row[name]):
            yield f"layer {row[name]}" if name in LAYER_DIMS else row[name]
