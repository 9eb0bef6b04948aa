"""The tables of the findings, out of their store: ``python docs/findings/tables.py STORE FOLDER``.

A table is a CSV file in which numbers stand as they are printed. `measure.sh` fills the store.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from budget_tables import (
    cartridges,
    cartridges_by_persona,
    heads,
    heads_by_persona,
    parts,
    parts_by_persona,
)
from space_tables import role_ranking, role_space

import persona_nns as pn
from persona_nns.declarations import choose_bands
from persona_nns.figures.estimates import closures_of_medians, estimate_table
from persona_nns.figures.intervals import share_interval
from persona_nns.published.compare import summarise
from persona_nns.published.store import published_store

LANGUAGES = ("fr", "de", "es", "zh")
REAL = "smollm2-135m-instruct"
MODELS = (REAL, "organism-qwen2", "organism-gemma2")
ANSWERS = Path(__file__).parent / "answers" / "evaluation" / "cheerful.jsonl"
DEPTHS = (0.25, 0.40, 0.55, 0.70, 0.85)
Row = dict[str, Any]


def write_tables(store: str, folder: Path) -> None:
    """Write every table, as a CSV file named like its function."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in TABLES:
        frame = pd.DataFrame(table(store))
        frame.to_csv(folder / f"{table.__name__}.csv", index=False, lineterminator="\n")


def additivity(store: str) -> Iterator[Row]:
    """The additive sum at one site: KL, cosine, and what it misses before and after the norm."""
    for grid in ("short", "long"):
        for results in open_each(store, "localized_positions", grid):
            n_layers = int(results.n_layers.item())
            for depth in DEPTHS:
                layer = round(depth * n_layers)
                at = results.sel(layer=layer)
                yield {
                    **head(results, grid=grid),
                    "layer": f"{layer} of {n_layers}",
                    **{f"KL {p}": quartiles(at.kl.sel(position=p)) for p in ("p_last", "g1", "g2")},
                    **{
                        name: quartiles(at[variable].sel(position="p_last"))
                        for name, variable in (
                            ("cosine", "cos_additive"),
                            ("missed", "gap_ratio"),
                            ("missed after the norm", "gap_ratio_post_norm"),
                            ("KL, size put right", "kl_rms_matched"),
                            ("KL, size put wrong", "kl_rms_only"),
                        )
                    },
                }


def frames(store: str) -> Iterator[Row]:
    """The additive sum where persona and task are put to the model in other ways."""
    grids = ("short", "short.system", "short.later", *(f"short-{each}" for each in LANGUAGES))
    for grid in grids:
        for results in open_each(store, "localized_positions", grid, (REAL,)):
            for depth in DEPTHS:
                at = results.sel(layer=round(depth * int(results.n_layers.item())))
                yield {
                    "grid and frame": grid,
                    "layer": int(at.layer),
                    **{f"KL {p}": quartiles(at.kl.sel(position=p)) for p in ("p_last", "g1", "g2")},
                    "cosine": quartiles(at.cos_additive.sel(position="p_last")),
                }


def paper_tables_1_and_2(store: str) -> Iterator[Row]:
    """Median KL of the additive sum: the published models, and a fourth column."""
    for table, grid in ((1, "short"), (2, "long")):
        published = list(open_published("localized_positions", grid))
        asked = [at_depths(results, grid) for results in published]
        own = next(open_each(store, "localized_positions", grid, (REAL,)))
        asked.append(at_depths(own, grid))
        for place in range(len(asked[0])):
            for position in ("p_last", "g1", "g2"):
                row: Row = {"table": table, "grid": grid, "position": position}
                for results, layers in zip((*published, own), asked, strict=True):
                    kl = summarise(results, "kl")
                    at = kl.query(f"layer == {layers[place]} and position == '{position}'")
                    where = f"layer {layers[place]} of {int(results.n_layers.item())}"
                    said = bounded(at, "q25", "q75")
                    row[model_of(results)] = f"{said}, {where}"
                yield row


def paper_table_3(store: str) -> Iterator[Row]:
    """Markers under four conditions: Gemma-2-2B as published, and SmolLM2."""
    sides = [*open_published("behavioral_markers", "review"), *smollm2(store, "behavioral_markers")]
    for condition in sides[0].condition.values:
        row: Row = {"condition": condition}
        for results in sides:
            at = results.isel(model=0, layer=0).sel(condition=condition)
            distinct = float(at.distinct_markers.astype(float).mean())
            row[model_of(results)] = f"{rate(at.any_marker)}; distinct {distinct:.2f}"
        yield row


def paper_table_4(store: str) -> Iterator[Row]:
    """Host injection: median KL and closure of the medians, by source and set of layers."""
    sides = [*open_published("host_injection", "review"), *smollm2(store, "host_injection")]
    for place, _ in enumerate(sides[0].layer_set.values):
        for source in ("none", "cached", "oracle"):
            row: Row = {"set": place + 1, "source": source}
            for results in sides:
                name, layers = model_of(results), str(results.layer_set.values[place])
                kl = results.kl.isel(model=0).sel(layer_set=layers, source=source)
                asked = f"layer_set == '{layers}' and source == '{source}'"
                row[f"layers, {name}"] = layers
                if bool(kl.notnull().any()):  # of some sources one set only was published
                    row[f"KL, {name}"] = quartiles(kl)
                    closed = closures_of_medians(results).query(asked)
                    row[f"closure of medians, {name}"] = bounded(closed)
            yield row


def injection(store: str) -> Iterator[Row]:
    """Closure of host injection at one layer, and whether the host then says persona words."""
    for results in open_each(store, "host_injection"):
        first = results.isel(model=0, layer_set=0)
        clean = rate(first.clean_any_marker)
        for source in ("none", "cached", "oracle"):
            at = first.sel(source=source)
            yield {
                **head(results, layer=str(first.layer_set.values), source=source),
                "KL": median(results.isel(layer_set=[0]), "kl", source=source),
                "closure": median(results.isel(layer_set=[0]), "closure", source=source),
                **{f"marker, {s}": rate(at.any_marker.sel(site=s)) for s in results.site.values},
                "marker, role prompt": clean,
            }


def controls(store: str) -> Iterator[Row]:
    """What the oracle closes when host and injection are matched to the clean run."""
    each = list(open_each(store, "injection_controls"))
    for control in each[0].control.values:
        row: Row = {"matched": control}
        for results in each:
            closure = results.closure.isel(model=0, layer_set=0).sel(source="oracle")
            row[model_of(results)] = in_range(closure.sel(control=control))
        yield row


def grafts(store: str) -> Iterator[Row]:
    """What spans of the clean prompt's cache close in the host."""
    each = list(open_each(store, "kv_graft"))
    for graft in each[0].graft.values:
        row: Row = {"graft": graft}
        for results in each:
            at = results.isel(model=0).sel(graft=graft, layer_band="all")
            row[model_of(results)] = in_range(at.closure)
            row[f"above 0.9, {model_of(results)}"] = int((at.closure > 0.9).sum())
            row[f"kB, {model_of(results)}"] = f"{float(at.cache_bytes.median()) / 1000:.0f}"
        yield row


def grafts_by_persona(store: str) -> Iterator[Row]:
    """What the persona's span alone closes, persona by persona: the tasks' median and range."""
    for results in smollm2(store, "kv_graft"):
        whole = results.isel(model=0).sel(layer_band="all")
        for persona, cells in whole.groupby("persona"):
            yield {
                "persona": persona,
                "KL of the host": in_range(cells.kl.sel(graft="none")),
                **{
                    f"closure, {graft}": in_range(cells.closure.sel(graft=graft))
                    for graft in ("persona", "task+tail", "persona+task")
                },
            }


def bands(store: str) -> Iterator[Row]:
    """In which layers the persona's cache works: its closure in the first and the last ones."""
    for results in open_each(store, "kv_graft"):
        n_layers = int(results.n_layers.item())
        closure = results.closure.isel(model=0).sel(graft="persona").median("cell")
        for layer in tenths(n_layers):
            yield {
                **head(results, layer=layer, depth=f"{layer / n_layers:.2f}"),
                "this layer alone": in_band(closure, layer, layer + 1),
                "layers below it": in_band(closure, 0, layer),
                "it and those above": in_band(closure, layer, n_layers),
                "all layers": in_band(closure, 0, n_layers),
            }


def knockout(store: str) -> Iterator[Row]:
    """Attention to the persona's tokens cut off, in all layers."""
    for results in open_each(store, "attention_knockout"):
        of_model = results.isel(model=0)
        for blocked in results.blocked.values:
            at = of_model.sel(blocked=blocked, layer_band="all")
            yield {
                **head(results, blocked=blocked),
                "KL(clean ‖ cut)": quartiles(at.kl),
                "KL(host ‖ cut)": quartiles(at.kl_host),
                "KL(host ‖ clean)": quartiles(of_model.kl_host_clean),
                "way to the host": quartiles(1 - at.kl_host / of_model.kl_host_clean),
                "texts with a marker": rate(at.any_marker),
            }


def knockout_by_layer(store: str) -> Iterator[Row]:
    """The knockout of all later queries, from a layer on and up to it."""
    for results in open_each(store, "attention_knockout"):
        n_layers = int(results.n_layers.item())
        kl = results.kl.isel(model=0).sel(blocked="later").median("cell")
        for layer in tenths(n_layers):
            yield {
                **head(results, layer=layer, depth=f"{layer / n_layers:.2f}"),
                "cut in layers below it": in_band(kl, 0, layer),
                "cut in it and above": in_band(kl, layer, n_layers),
                "cut in all": in_band(kl, 0, n_layers),
            }


def accuracy(store: str) -> Iterator[Row]:
    """Multiple-choice questions asked as personas."""
    # `persona_patching --solved-by-baseline` has asked some of them too.
    largest = max(pn.list_runs(store, "persona_accuracy"), key=lambda info: info.n_units)
    of_model = pn.open_results(store, "persona_accuracy", run=largest.run).isel(model=0)
    for persona in of_model.persona.values:
        at = of_model.sel(persona=persona)
        chosen = at.logits.argmax("letter")
        yield {
            "persona": persona,
            "questions": at.correct.size,
            "right": rate(at.correct),
            "answers A": f"{100 * float((chosen == 0).mean()):.1f} %",
            "logit difference": quartiles(at.ld),
            "more than as average": quartiles(at.ld - of_model.ld.sel(persona="average")),
        }


def patching(store: str) -> Iterator[Row]:
    """Components of one persona's run put into the other's: recovery of the logit difference."""
    for results in smollm2(store, "persona_patching"):
        recovery = results.recovery.isel(model=0).sel(position_set="all")
        pairs = recovery.stack(pair=("clean_persona", "corrupt_persona", "question"))
        known = pairs.isel(component=0, layer=0).notnull().sum()
        for layer in results.layer.values:
            yield {
                "layer": int(layer),
                "questions and directions": int(known),
                **{
                    str(component): quartiles(pairs.sel(component=component, layer=layer))
                    for component in results.component.values
                },
            }


def steering(store: str) -> Iterator[Row]:
    """What a vector of cheerfulness does to the log-probability of held-out answers."""
    rows = ANSWERS.read_text(encoding="utf-8").splitlines()
    label = xr.DataArray([json.loads(row)["label"] for row in rows], dims="row")
    for results in smollm2(store, "trait_steering"):
        logp = results.logp.isel(model=0, trait=0, position_set=0)
        moved = logp - logp.sel(alpha=0)
        for layer in results.layer.values:
            for alpha in results.alpha.values[results.alpha.values != 0]:
                at = moved.sel(layer=layer, alpha=alpha)
                yield {
                    "layer": int(layer),
                    "α": f"{alpha:g}",
                    "cheerful answers": quartiles(at[label == "pos"]),
                    "even answers": quartiles(at[label == "neg"]),
                }


def open_each(
    store: str, experiment: str, grid: str | None = None, models: tuple[str, ...] = MODELS
) -> Iterator[xr.Dataset]:
    """The results of each model by itself, in the order of `models`."""
    for model in models:
        runs = [
            info.run
            for info in pn.list_runs(store, experiment)
            if info.attrs["model"] == model and grid in (None, info.attrs["grid"])
        ]
        yield pn.open_results(store, experiment, run=runs)


def smollm2(store: str, experiment: str) -> Iterator[xr.Dataset]:
    """The results of the language model."""
    return open_each(store, experiment, models=(REAL,))


def open_published(experiment: str, grid: str) -> Iterator[xr.Dataset]:
    """The published results on a grid, a model at a time."""
    for info in pn.list_runs(published_store(), experiment):
        if info.attrs["grid"] == grid:
            yield pn.open_results(published_store(), experiment, run=info.run)


def at_depths(results: xr.Dataset, grid: str) -> list[int]:
    """The layers of a paper's table: those that were published, or those of the same depths."""
    if "statistic" in results.dims:
        return sorted(summarise(results, "kl")["layer"].unique().tolist())
    depths = DEPTHS if grid == "short" else DEPTHS[1:4]
    return [round(depth * int(results.n_layers.item())) for depth in depths]


def head(results: xr.Dataset, **labels: Any) -> Row:
    """What a row is about."""
    return {"model": model_of(results), **labels}


def model_of(results: xr.Dataset) -> str:
    """The one model of some results."""
    return str(results.model.item())


def tenths(n_layers: int) -> list[int]:
    """The layers at a tenth, two tenths, … of the depth."""
    return sorted({round(share * n_layers) for share in np.linspace(0.1, 0.9, 9)})


def in_band(values: xr.DataArray, start: int, stop: int) -> str:
    """The number at a band of layers, whose end is not in it."""
    (label,) = choose_bands(f"{start}:{stop}", int(values.n_layers))[-1:]
    return number(float(values.sel(layer_band=label)))


def number(value: float, decimals: int = 3) -> str:
    """Three decimals, and no negative zero."""
    return f"{round(value, decimals) + 0.0:.{decimals}f}"


def quartiles(values: xr.DataArray) -> str:
    """Median and quartiles over cells."""
    low, middle, high = np.nanpercentile(values.values.astype(float), [25, 50, 75])
    return f"{number(middle)} [{number(low)}, {number(high)}]"


def in_range(values: xr.DataArray) -> str:
    """Median and range over cells."""
    found = values.values.astype(float)
    low, middle, high = (f(found) for f in (np.nanmin, np.nanmedian, np.nanmax))
    return f"{number(middle, 2)} [{number(low, 2)}, {number(high, 2)}]"


def median(results: xr.Dataset, variable: str, *, source: str) -> str:
    """Median with its bootstrap interval over cells."""
    table = estimate_table(results, variable, "median")
    return bounded(table.query(f"source == '{source}'"))


def bounded(table: pd.DataFrame, low: str = "low", high: str = "high") -> str:
    """The value of the one row of a table, between its bounds."""
    (row,) = table[["value", low, high]].to_numpy(dtype=float).tolist()
    middle, below, above = map(number, row)
    return f"{middle} [{below}, {above}]"


def rate(found: xr.DataArray) -> str:
    """Share of what is known, in per cent, with Wilson's 95 % interval."""
    known = found.values.astype(float)
    known = known[~np.isnan(known)]
    low, high = share_interval(known.sum(), known.size)
    return f"{100 * known.mean():.1f} % [{100 * low:.0f}, {100 * high:.0f}]"


TABLES = (
    additivity,
    frames,
    paper_tables_1_and_2,
    paper_table_3,
    paper_table_4,
    injection,
    controls,
    grafts,
    grafts_by_persona,
    bands,
    knockout,
    knockout_by_layer,
    heads,
    heads_by_persona,
    parts,
    parts_by_persona,
    cartridges,
    cartridges_by_persona,
    accuracy,
    patching,
    steering,
    role_space,
    role_ranking,
)

if __name__ == "__main__":
    write_tables(sys.argv[1], Path(sys.argv[2]))
