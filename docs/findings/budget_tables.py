"""The tables of the findings on budgets: how few heads, keys and values, or slots are enough."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import xarray as xr

import persona_nns as pn
from persona_nns.declarations import budget_sizes
from persona_nns.results import needed_for

SHARES = (0.5, 0.9)
HEADS = ("1", "8", "32", "128", "all")
PARTS = ("1", "4", "16", "all")
N_TOP = 3
Row = dict[str, Any]


def heads(store: str) -> Iterator[Row]:
    """What the best heads of each ranking close, and how many are needed."""
    results = open_one(store, "head_budget")
    for ranking in results.ranking.values:
        at = results.sel(ranking=ranking)
        yield {
            "ranking": ranking,
            **closures(at, HEADS),
            **{f"for {share}": counted(heads_for(at, share)) for share in SHARES},
            "agreement with the effect": quartiles(at.agreement),
        }


def heads_by_persona(store: str) -> Iterator[Row]:
    """How many heads each persona needs, over its tasks."""
    results = open_one(store, "head_budget")
    for persona, cells in results.groupby("persona"):
        row: Row = {"persona": persona, "KL of the host": in_range(cells.kl_none)}
        for ranking in ("effect", "attribution", "transfer"):
            at = cells.sel(ranking=ranking)
            row |= {f"{ranking}, {share}": counted(heads_for(at, share)) for share in SHARES}
        yield row


def parts(store: str) -> Iterator[Row]:
    """What the best keys and values of each ranking close, and how many bytes are needed."""
    results = open_one(store, "kv_budget")
    for unit in results.unit.values:
        for ranking in results.ranking.values:
            at = results.sel(unit=unit, ranking=ranking)
            yield {
                "unit": unit,
                "ranking": ranking,
                **closures(at, PARTS),
                **{f"kB for {share}": counted(kilobytes_for(at, share)) for share in SHARES},
                "fewer are better": f"{surpassed(at.closure)} of {at.sizes['cell']}",
                "agreement with the effect": quartiles(at.agreement),
            }


def parts_by_persona(store: str) -> Iterator[Row]:
    """How much of its cache each persona needs for half of what the whole closes, and which."""
    results = open_one(store, "kv_budget")
    for persona, cells in results.groupby("persona"):
        whole = cells.isel(unit=0, ranking=0).sel(budget="all")
        row: Row = {
            "persona": persona,
            "closure of all": in_range(whole.closure),
            "kB of all": counted(whole.cache_bytes / 1000),
        }
        for unit in results.unit.values:
            at = cells.sel(unit=unit, ranking="effect")
            row |= {
                f"{unit}, kB for {share}": counted(kilobytes_for(at, share)) for share in SHARES
            }
        alone = cells.closure.sel(unit="token", ranking="effect", budget="1")
        row["one token closes"] = in_range(alone)
        top = cells.top_tokens.sel(ranking="effect").isel(place=slice(N_TOP))
        row["tokens with the largest effect, by task"] = "; ".join(
            " ".join(f"‘{text.strip() or '␣'}’" for text in of_cell)
            for of_cell in top.values.tolist()
        )
        yield row


def cartridges(store: str) -> Iterator[Row]:
    """What trained slots close on tasks that they were not trained on, beside what else does."""
    budgets = open_one(store, "kv_budget", "long")
    for kind, at in cartridges_of_each_kind(store):
        held_out = at.sel(split="held_out")
        size = float(at.cache_bytes.median())
        yield {
            **kind,
            "kB": f"{size / 1000:.0f}",
            "tasks trained on": quartiles(at.closure.sel(split="train")),
            "held out": quartiles(held_out.closure),
            "personas ≥ 0.5 held out": enough(held_out.closure),
            "untrained": quartiles(held_out.closure_untrained),
            "another persona's": quartiles(held_out.closure_control),
            "its own keys and values": quartiles(best_within(budgets, size)),
            "whole persona": quartiles(of_tasks(held_out, "closure_full_graft")),
            "residual": quartiles(of_tasks(held_out, "closure_oracle")),
        }


def cartridges_by_persona(store: str) -> Iterator[Row]:
    """Each persona's cartridges on their held-out tasks: median and range."""
    kinds = list(cartridges_of_each_kind(store))
    for persona in kinds[0][1].persona.values:
        row: Row = {"persona": persona}
        for kind, at in kinds:
            name = f"{kind['behind the slots']}, {kind['slots']} slots"
            held_out = at.sel(persona=persona, split="held_out")
            row[name] = in_range(held_out.closure)
            row[f"{name}, another persona's"] = in_range(held_out.closure_control)
        held_out = kinds[0][1].sel(persona=persona, split="held_out")
        row["whole persona"] = in_range(of_tasks(held_out, "closure_full_graft"))
        row["its kB"] = f"{float(held_out.cache_bytes_full_graft.median()) / 1000:.0f}"
        yield row


def cartridges_of_each_kind(store: str) -> Iterator[tuple[Row, xr.Dataset]]:
    """Cartridges of a form, a size and a training, and what they are called."""
    runs = [
        pn.open_results(store, "persona_cartridge", run=info.run).isel(model=0)
        for info in pn.list_runs(store, "persona_cartridge")
    ]
    for results in sorted(runs, key=lambda results: results.slots.values.tolist()):
        for form in results.form.values.tolist():
            for slots in results.slots.values.tolist():
                kind = {"behind the slots": form, "slots": slots, "steps": results.sizes["step"]}
                yield kind, results.sel(form=form, slots=slots)


def best_within(budgets: xr.Dataset, size: float) -> xr.DataArray:
    """The most that parts of the persona's cache of at most so many bytes close, [cell]."""
    return budgets.closure.where(budgets.cache_bytes <= size).max(("unit", "ranking", "budget"))


def enough(closure: xr.DataArray) -> str:
    """How many personas close half of the gap in the median of their tasks."""
    medians = closure.median("task")
    return f"{int((medians >= SHARES[0]).sum())} of {medians.size}"


def of_tasks(held_out: xr.Dataset, name: str) -> xr.DataArray:
    """Something that does not depend on cartridges, on the held-out tasks."""
    return held_out[name].where(held_out.closure.notnull())


def surpassed(closure: xr.DataArray) -> int:
    """In how many cells some of the parts close more than all, by more than a hundredth."""
    return int((closure.max("budget") > closure.sel(budget="all") + 0.01).sum())


def closures(at: xr.Dataset, budgets: Sequence[str]) -> Row:
    """What some budgets close."""
    named = {"all": "all"} | {budget: f"best {budget}" for budget in budgets if budget != "all"}
    return {named[budget]: quartiles(at.closure.sel(budget=budget)) for budget in budgets}


def heads_for(at: xr.Dataset, share: float) -> xr.DataArray:
    """Heads that are needed for a closure, [cell]."""
    labels = [str(label) for label in at.budget.values]
    n_heads = round(float(at["values"].max()) / float(at["values"].sel(budget="1").max()))
    sizes = xr.DataArray(budget_sizes(labels, n_heads), coords={"budget": at.budget.values})
    return needed_for(at.closure, share, sizes)


def kilobytes_for(at: xr.Dataset, share: float) -> xr.DataArray:
    """Kilobytes of keys and values that are needed for a closure, [cell]."""
    return needed_for(at.closure, share, at.cache_bytes / 1000)


def open_one(store: str, experiment: str, grid: str = "review") -> xr.Dataset:
    """The results of an experiment's one run on a grid, of the one model."""
    runs = [i.run for i in pn.list_runs(store, experiment) if i.attrs["grid"] == grid]
    return pn.open_results(store, experiment, run=runs).isel(model=0)


def counted(needed: xr.DataArray) -> str:
    """Median and range of what is needed; how many cells never get there."""
    known = needed.values[~np.isnan(needed.values)]
    if not known.size:
        return "never"
    low, middle, high = (f"{f(known):.0f}" for f in (np.min, np.median, np.max))
    never = needed.size - known.size
    return f"{middle} [{low}, {high}]" + (f", never in {never}" if never else "")


def quartiles(values: xr.DataArray) -> str:
    """Median and quartiles of what is known."""
    return between(values, (25, 50, 75), 3)


def in_range(values: xr.DataArray) -> str:
    """Median and range of what is known."""
    return between(values, (0, 50, 100), 2)


def between(values: xr.DataArray, percentiles: Sequence[float], decimals: int) -> str:
    """The middle one of three percentiles, with the others in brackets."""
    known = values.values[~np.isnan(values.values)]
    if not known.size:
        return ""
    low, middle, high = (
        f"{round(float(each), decimals) + 0.0:.{decimals}f}"
        for each in np.percentile(known, percentiles)
    )
    return f"{middle} [{low}, {high}]"
