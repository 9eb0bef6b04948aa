"""A comparison as tables for the terminal, in the order of the paper's tables 1 to 4."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from persona_nns.compare import LAYER_DIMS, Row, distinct, records, where
from persona_nns.tables import short_number

_PAPER = {
    ("localized_positions", "short"): "Table 1 and Figure 1",
    ("localized_positions", "long"): "Table 2 and Figure 1",
    ("behavioral_markers", "review"): "Table 3",
    ("host_injection", "review"): "Table 4",
}
_LABELS = {
    "kl": "KL (nat)",
    "cos_additive": "cos(ΔXY, ΔX+ΔY)",
    "cos_persona_task": "cos(ΔX, ΔY)",
    "interaction_ratio": "‖Inter‖/‖ΔXY‖",
    "any_marker": "any marker",
    "distinct_markers": "distinct markers",
    "closure_of_medians": "closure of medians",
}
_GEOMETRY = ("cos_additive", "cos_persona_task", "interaction_ratio")
_CLOSURES = ("closure", "closure_of_medians")
_SITES = ("source", "condition", "position")


def comparison_tables(frame: pd.DataFrame) -> list[Table]:
    """Published and measured side by side: for each grid and published model.

    Args:
        frame: `Comparison.side_by_side`.
    """
    every = records(frame)
    tables: list[Table] = []
    for experiment in distinct(every, "experiment"):
        for grid in distinct(where(every, experiment=experiment), "grid"):
            of_grid = where(every, experiment=experiment, grid=grid)
            for model in distinct(of_grid, "model"):
                paper = _PAPER.get((experiment, grid), experiment)
                rows = where(of_grid, model=model)
                tables += _tables_of_model(rows, f"{paper}: {grid} grid, {model}")
    return tables


def _tables_of_model(rows: list[Row], title: str) -> list[Table]:
    names = distinct(rows, "variable")
    if "source" in rows[0]:
        rows, closures = _without_repeats(rows), [name for name in _CLOSURES if name in names]
        tables = [_table(rows, ["kl"], f"{title}, median [25 %, 75 %]")]
        return [*tables, _table(rows, closures, title)] if closures else tables
    if "position" not in rows[0]:
        return [_table(rows, names, title)]
    tables = [_table(where(rows, variable="kl"), ["kl"], f"{title}, median [25 %, 75 %]")]
    if geometry := [name for name in _GEOMETRY if name in names]:  # at the sites of the KL
        sites = {(row["layer"], row["position"]) for row in where(rows, variable="kl")}
        there = [row for row in rows if (row["layer"], row["position"]) in sites]
        tables.append(_table(there, geometry, f"{title}, medians", quartiles=False))
    return tables


def _without_repeats(rows: list[Row]) -> list[Row]:
    """Without what is the same at every layer set because nothing is injected, as in Table 4."""
    first = rows[0]["layer_set"]
    return [
        row
        for row in rows
        if row["source"] != "none" or (row["layer_set"] == first and row["variable"] == "kl")
    ]


def _table(rows: list[Row], names: Sequence[str], title: str, *, quartiles: bool = True) -> Table:
    sites = [name for name in _SITES if name in rows[0]]
    (layer,) = [name for name in LAYER_DIMS if name in rows[0]]
    measured = distinct(rows, "measured_model")
    moved = [model for model in measured if _is_moved(where(rows, measured_model=model), layer)]
    table = Table(
        title=Text(title),
        caption=Text(_caption(rows)),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for site in sites:
        table.add_column(site)
    heading = f"{layer.replace('_', ' ')} (depth)"
    table.add_column(heading, justify="right", overflow="fold")
    for model in moved:
        table.add_column(Text(f"{heading} of {model}"), justify="right", overflow="fold")
    for name in names:
        table.add_column(Text(f"{_LABELS.get(name, name)}\npublished"), justify="right")
        for model in measured:
            table.add_column(Text(_brief_model(model, rows)), justify="right")
    rows = [row for row in rows if row["variable"] in names]
    for group in distinct(rows, sites[0]):
        of_group = where(rows, **{sites[0]: group})
        for here in distinct(of_group, layer):
            at = where(of_group, **{layer: here})
            cells = [Text(str(at[0][site])) for site in sites]
            cells.append(Text(_layer_text(here, at[0]["depth"])))
            for model in moved:
                mine = where(at, measured_model=model)
                there = _layer_text(mine[0][f"measured_{layer}"], mine[0]["measured_depth"])
                cells.append(Text(there))
            for name in names:
                of_name = where(at, variable=name)
                cells.append(_summary(of_name, "published", quartiles=quartiles))
                for model in measured:
                    mine = where(of_name, measured_model=model)
                    cells.append(_summary(mine, "measured", quartiles=quartiles))
            table.add_row(*cells)
        if len(distinct(of_group, layer)) > 1:
            table.add_section()
    return table


def _is_moved(rows: list[Row], layer: str) -> bool:
    """Whether the measured model was paired at layers of other names."""
    return any(row[layer] != row[f"measured_{layer}"] for row in rows)


def _brief_model(measured: str, rows: list[Row]) -> str:
    return "measured" if measured == rows[0]["model"] else measured


def _layer_text(layer: object, depth: float) -> str:
    return f"{layer} ({depth:.2f})"


def _caption(rows: list[Row]) -> str:
    counts = [
        f"{model} over {max(row['measured_n'] for row in where(rows, measured_model=model))}"
        for model in distinct(rows, "measured_model")
    ]
    published = max(row["published_n"] for row in rows)
    return f"published over {published} cells; measured: {', '.join(counts)}"


def _summary(rows: list[Row], side: str, *, quartiles: bool) -> Text:
    """One number of a table; a dash where there is none."""
    if not rows:
        return Text("–")
    (row, *_), value = rows, float(rows[0][side])
    if row["variable"] == "any_marker":
        n = row[f"{side}_n"]
        return Text(f"{100 * value:.1f} % ({round(value * n)}/{n})")
    if row["variable"] == "distinct_markers":
        return Text(f"{value:.2f}")
    text = Text(median_number(value))
    low, high = row[f"{side}_q25"], row[f"{side}_q75"]
    if quartiles and not np.isnan(low):
        text.append(f" [{short_number(low)},{short_number(high)}]", style="dim")
    return text


def median_number(value: float) -> str:
    """Three decimals; four where three would leave no digit, as the paper has it."""
    if value == 0:
        return "0.000"
    return f"{value:.3f}" if abs(value) >= 5e-4 else f"{value:.4f}"


def agreement_table(frame: pd.DataFrame) -> Table:
    """How far results of one model agree: a row a grid, model and variable, over all its sites.

    Args:
        frame: `Comparison.agreement`.
    """
    table = Table(
        title="Agreement of the same model, value by value",
        caption=Text(
            "Tolerance: absolute + relative to the published value. Rank correlation: Spearman's "
            "over cells, median over sites (lowest). All sites are in the CSV."
        ),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("variable", "tolerance", "within", "worst", "published", "measured", "ranks"):
        table.add_column(heading, justify="left" if heading in ("variable", "worst") else "right")
    every = records(frame)
    for grid in distinct(every, "grid"):
        for model in distinct(where(every, grid=grid), "model"):
            of_model = where(every, grid=grid, model=model)
            table.add_section()
            table.add_row(Text(f"{model.rpartition('/')[2]}, {grid}", style="bold"))
            for name in distinct(of_model, "variable"):
                table.add_row(*_agreement_row(name, where(of_model, variable=name)))
    return table


def _agreement_row(name: str, rows: list[Row]) -> list[Text]:
    worst = max(rows, key=lambda row: abs(row["measured"] - row["published"]))
    n, within = sum(row["n"] for row in rows), sum(row["within"] for row in rows)
    ranks = [row["rank_correlation"] for row in rows if not np.isnan(row["rank_correlation"])]
    differs = worst["measured"] != worst["published"]
    cells = [
        f"  {name}",
        _tolerance(worst),
        f"{within}/{n} ({100 * within / n:.1f} %)",
        " · ".join([worst["worst"], *_site(worst)]) if differs else "none differs",
        median_number(worst["published"]) if differs else "",
        median_number(worst["measured"]) if differs else "",
        f"{np.median(ranks):.3f} ({min(ranks):.3f})" if ranks else "–",
    ]
    return [Text(cell) for cell in cells]


def _tolerance(row: Row) -> str:
    if not row["relative"] and not row["absolute"]:
        return "equal"
    return f"{row['absolute']:g} + {100 * row['relative']:g} %"


def _site(row: Row) -> Iterable[str]:
    for name in (*LAYER_DIMS, *_SITES):
        if name in row and not pd.isna(row[name]):
            yield f"layer {row[name]}" if name in LAYER_DIMS else row[name]
