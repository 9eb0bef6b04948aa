"""Results beside other results of the same experiment, by default the published ones.

Runs are matched by experiment and grid (the digest of its texts, whatever its name). A model that
is in both stores stands beside itself, cell by cell; any other model stands beside every published
one, each layer beside the layer at the nearest depth (layer / n_layers).
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from persona_nns.errors import UsageError
from persona_nns.figures.estimates import closures_of_medians
from persona_nns.figures.style import groups
from persona_nns.results.attributes import read_attribute
from persona_nns.results.measured import is_count, is_truth, measured_values
from persona_nns.results.reading import RunInfo, list_runs, open_results

#: Site labels that differ between models, and are paired by depth.
LAYER_DIMS = ("layer", "layer_set")
#: The closure that the paper's text speaks of, which has no value of a cell.
OF_MEDIANS = "closure_of_medians"
_NOT_SITES = ("model", "cell", "statistic")
_BOOKKEEPING = ("seconds", "completed", "n_eval")
_SITE_PARAMETERS = ("layers", "positions", "layer_sets")


@dataclass(frozen=True)
class Tolerance:
    """Two numbers agree if ``|measured − published| ≤ absolute + relative · |published|``."""

    relative: float
    absolute: float

    def within(self, measured: Any, published: Any) -> Any:
        """Whether they agree, elementwise."""
        return abs(measured - published) <= self.absolute + self.relative * abs(published)


#: What a faithful replication on other hardware may differ by. On the bundled models and the short
#: grid, float32 with and without reuse agrees to 1e-4 relative, and 3,069 of 3,072 numbers in
#: bfloat16 agree with float32 within the second line (all 480 KL).
TOLERANCES = {"float32": Tolerance(0.02, 0.002), "bfloat16": Tolerance(0.2, 0.02)}
EXACT = Tolerance(0, 0)


@dataclass(frozen=True)
class Matched:
    """Results of one experiment on one grid from two stores, a Dataset for each model.

    Attributes:
        experiment: its name.
        grid: name of the grid in the published store.
        published: what is compared with.
        measured: what is compared.
    """

    experiment: str
    grid: str
    published: tuple[xr.Dataset, ...]
    measured: tuple[xr.Dataset, ...]

    def pairs(self) -> Iterator[tuple[xr.Dataset, xr.Dataset]]:
        """(published, measured): the same model, or a model that was not published."""
        known = {label(results) for results in self.published}
        for published in self.published:
            for measured in self.measured:
                if label(measured) == label(published) or label(measured) not in known:
                    yield published, measured


def label(results: xr.Dataset) -> str:
    """The one model of a run's results."""
    return str(results.model.item())


def match_results(
    store: str | Path,
    experiment: str,
    published: str | Path,
    *,
    grid: str | None = None,
    run: Sequence[str] | None = None,
) -> list[Matched]:
    """What two stores hold of an experiment on the same grids.

    Args:
        store: with what was measured.
        experiment: its name.
        published: the store to compare with.
        grid: only on this grid, by its name in `published`.
        run: only these runs of `store`, by the names of their groups.

    Raises:
        UsageError: nothing to compare, or several runs of one model on one grid.
    """
    references = [info for info in list_runs(published, experiment) if info.n_completed]
    if not references:
        known = ", ".join(sorted({info.experiment for info in list_runs(published)}))
        raise UsageError(
            f"{str(published)!r} holds no results of {experiment!r} to compare with; "
            f"it holds {known or 'nothing'}."
        )
    own = list_runs(store, experiment)
    if missing := set(run or ()) - {info.run for info in own}:
        listing = ", ".join(info.run for info in own) or "none"
        raise UsageError(f"There is no run {', '.join(sorted(missing))}; there are: {listing}.")
    own = [info for info in own if info.n_completed and (run is None or info.run in run)]
    matched: list[Matched] = []
    for digest in dict.fromkeys(info.attrs["grid_digest"] for info in references):
        of_grid = [info for info in references if info.attrs["grid_digest"] == digest]
        measured = [info for info in own if info.attrs["grid_digest"] == digest]
        name = of_grid[0].attrs["grid"]
        if measured and grid in (None, name):
            matched.append(
                Matched(experiment, name, _open(published, of_grid), _open(store, measured))
            )
    if not matched:
        grids = ", ".join(sorted({info.attrs["grid"] for info in references}))
        listing = "; ".join(info.describe() for info in own) or "none"
        raise UsageError(
            f"{str(store)!r} holds no completed cells of {experiment!r} on a grid to compare with "
            f"({grid or grids}); its runs: {listing}."
        )
    for results in matched:
        _warn_about_parameters(results)
    return sorted(matched, key=lambda results: results.published[0].sizes["cell"])


def _open(store: str | Path, runs: Sequence[RunInfo]) -> tuple[xr.Dataset, ...]:
    """Each run by itself: joining would fill sites that one model lacks.

    Raises:
        UsageError: several runs of one model.
    """
    models = [info.attrs["model"] for info in runs]
    for model in models:
        if models.count(model) > 1:
            choices = "; ".join(info.describe() for info in runs if info.attrs["model"] == model)
            raise UsageError(
                f"Several runs of the model {model!r} match; choose one with --run: {choices}."
            )
    return tuple(open_results(store, info.experiment, run=info.run) for info in runs)


def _warn_about_parameters(matched: Matched) -> None:
    """Say where two runs were not asked for the same: they still can be looked at together."""
    for published, measured in matched.pairs():
        theirs, ours = (read_attribute(each, "parameters") for each in (published, measured))
        for name in sorted(set(theirs) & set(ours) - set(_SITE_PARAMETERS)):
            if theirs[name] != ours[name]:
                warnings.warn(
                    f"{matched.experiment} on {label(measured)} ({matched.grid}): {name} is "
                    f"{ours[name]}, but {theirs[name]} in what it is compared with.",
                    stacklevel=3,
                )


@dataclass(frozen=True)
class Comparison:
    """What a comparison says, as tables (pandas), a row a site.

    Attributes:
        side_by_side: summaries of published and measured; see `side_by_side`.
        agreement: of models that are in both; see `agreement`. Empty where there is none.
    """

    side_by_side: pd.DataFrame
    agreement: pd.DataFrame


def compare_results(matched: Sequence[Matched], tolerance: Tolerance | None = None) -> Comparison:
    """Compare on every grid.

    Args:
        matched: from `match_results`.
        tolerance: of numbers; by default that of the lower precision of the two.
    """
    beside = pd.concat([side_by_side(results) for results in matched], ignore_index=True)
    if "source" in beside and "closure" in set(beside["variable"]):
        closures = [
            _beside(results, OF_MEDIANS, *pair) for results in matched for pair in results.pairs()
        ]
        beside = pd.concat([beside, *closures], ignore_index=True)
    agreed = pd.concat([agreement(results, tolerance) for results in matched], ignore_index=True)
    return Comparison(beside, agreed)


def compared_variables(published: xr.Dataset, measured: xr.Dataset) -> list[str]:
    """The numbers that both have."""
    return [
        str(name)
        for name, array in published.data_vars.items()
        if name in measured and array.dtype.kind in "fib" and name not in _BOOKKEEPING
    ]


def summarise(results: xr.Dataset, name: str) -> pd.DataFrame:
    """A variable over cells, a row a site.

    Returns:
        Columns: the site's dimensions, then ``value`` (median of numbers, share of truth values,
        mean of counts), ``q25`` and ``q75`` (of numbers only) and ``n`` cells. Sites without a
        number are left out.
    """
    if name == OF_MEDIANS:
        kl = summarise(results, "kl")
        closures = kl.drop(columns="value").merge(closures_of_medians(results))
        return closures.assign(q25=np.nan, q75=np.nan).reindex(columns=kl.columns)
    array, present = results[name], measured_values(results, name).astype(float)
    sites = [str(dim) for dim in array.dims if dim not in _NOT_SITES]
    known = "statistic" in array.dims
    if not (is_count(array) or is_truth(array)):
        quartiles = ["q25", "median", "q75"]
        statistics = present if known else _statistics(present, quartiles)
        low, middle, high = (statistics.sel(statistic=name) for name in quartiles)
    else:
        middle = present.mean("cell")
        low = high = xr.full_like(middle, np.nan)
    n = results.completed.sum() if known else present.notnull().sum("cell")
    columns = {"value": middle, "q25": low, "q75": high, "n": n}
    table = xr.Dataset({key: value.reset_coords(drop=True) for key, value in columns.items()})
    # The sets of a source stand together, as in the paper's table 4.
    order = sorted(sites, key=lambda dim: dim == "layer_set")
    frame = table.to_dataframe(dim_order=["model", *order]).reset_index()
    there = frame["value"].notna()
    return frame.loc[there, [*sites, *columns]].astype({"n": int})


def depth_distance(one: Any, n_layers: int, other: Any, n_other: int) -> float:
    """How far two layers, or sets of layers, lie apart in depth.

    Args:
        one: a layer, or a label such as ``10,12,14``.
        n_layers: of the first model.
        other: of the second model.
        n_other: its number of layers.

    Returns:
        Mean distance of every layer to the nearest of the other set, from both sides.
    """
    apart = abs(_depths(one, n_layers)[:, None] - _depths(other, n_other)[None, :])
    return float(apart.min(1).mean() + apart.min(0).mean()) / 2


def side_by_side(matched: Matched) -> pd.DataFrame:
    """Published and measured summaries of every variable, a row a site and a measured model.

    Returns:
        Columns: experiment, grid, variable, units, model, the site's dimensions, depth,
        ``published`` with ``_q25``, ``_q75`` and ``_n``, then ``measured_model``, the label of its
        layer (``measured_layer`` or ``measured_layer_set``) and depth, and ``measured…`` likewise.
    """
    frames = [
        _beside(matched, name, published, measured)
        for published, measured in matched.pairs()
        for name in compared_variables(published, measured)
    ]
    return pd.concat(frames, ignore_index=True)


def _beside(
    matched: Matched, name: str, published: xr.Dataset, measured: xr.Dataset
) -> pd.DataFrame:
    theirs, ours = summarise(published, name), summarise(measured, name)
    n_theirs, n_ours = int(published.n_layers.item()), int(measured.n_layers.item())
    left = _headed(theirs.rename(columns=_of("published")), matched, published, name)
    left["measured_model"] = label(measured)
    for dim in set(LAYER_DIMS) & set(ours.columns):
        candidates = ours[dim].unique().tolist()
        if not candidates:
            break
        nearest = {
            here: min(candidates, key=lambda there: depth_distance(here, n_theirs, there, n_ours))
            for here in theirs[dim].unique().tolist()
        }
        depths = [_depths(here, n_theirs).mean() for here in left[dim]]
        left.insert(list(left).index("published"), "depth", depths)
        left[f"measured_{dim}"] = [nearest[here] for here in left[dim]]
        left["measured_depth"] = [_depths(h, n_ours).mean() for h in left[f"measured_{dim}"]]
        ours = ours.rename(columns={dim: f"measured_{dim}"})
    return left.merge(ours.rename(columns=_of("measured")).assign(variable=name))


def _headed(
    frame: pd.DataFrame, matched: Matched, published: xr.Dataset, name: str
) -> pd.DataFrame:
    """The rows of a variable, which begin with what they are about."""
    head = {
        "experiment": matched.experiment,
        "grid": matched.grid,
        "variable": name,
        "units": "1" if name == OF_MEDIANS else published[name].attrs.get("units", "1"),
        "model": label(published),
    }
    return pd.DataFrame(head, index=frame.index).join(frame)


def _of(side: str) -> dict[str, str]:
    return {"value": side, "q25": f"{side}_q25", "q75": f"{side}_q75", "n": f"{side}_n"}


def _depths(layers: Any, n_layers: int) -> NDArray[np.float64]:
    """Depths of a layer, or of the layers of a set such as ``10,12,14``."""
    return np.array([int(layer) / n_layers for layer in str(layers).split(",")])


def agreement(matched: Matched, tolerance: Tolerance | None = None) -> pd.DataFrame:
    """How far results of one model agree, a row a variable and a site.

    Where the published numbers are summaries over cells, the statistics are compared instead of
    cells. Truth values and counts have to be equal.

    Args:
        matched: results; only models that are in both are compared, at the layers both have.
        tolerance: of numbers; by default that of the lower precision of the two.

    Returns:
        Columns: experiment, grid, variable, units, model, the site's dimensions, ``over`` (cell or
        statistic), ``n`` compared, ``within`` tolerance, ``share``, ``worst`` (the label with the
        largest difference), its ``published`` and ``measured``, ``rank_correlation`` (Spearman's,
        over cells), and the tolerance (``relative``, ``absolute``).
    """
    rows: list[dict[str, Any]] = []
    for published, measured in matched.pairs():
        if label(published) != label(measured):
            continue
        precisions = {str(results.precision.item()) for results in (published, measured)}
        by_precision = TOLERANCES["float32" if precisions == {"float32"} else "bfloat16"]
        for name in compared_variables(published, measured):
            exact = is_count(published[name]) or is_truth(published[name])
            allowed = EXACT if exact else tolerance or by_precision
            both = _aligned(published, measured, name)
            rows += _sites_agreement(_headed(both, matched, published, name), allowed)
    return pd.DataFrame(rows)


def _aligned(published: xr.Dataset, measured: xr.Dataset, name: str) -> pd.DataFrame:
    """One variable of both at the sites and cells (or statistics) that both have."""
    theirs, ours = (
        measured_values(results, name).astype(float) for results in (published, measured)
    )
    if "statistic" in theirs.dims and "statistic" not in ours.dims:
        ours = _statistics(ours, theirs.statistic.values.tolist())
    elif "statistic" in ours.dims and "statistic" not in theirs.dims:
        theirs = _statistics(theirs, ours.statistic.values.tolist())
    sides = {"published": theirs, "measured": ours}
    both = xr.merge(
        [side.reset_coords(drop=True).rename(name) for name, side in sides.items()], join="inner"
    )
    sites = [str(dim) for dim in theirs.dims if dim not in _NOT_SITES]
    over = "statistic" if "statistic" in theirs.dims else "cell"
    frame = both.squeeze("model", drop=True).to_dataframe(dim_order=[*sites, over])
    return frame.dropna().reset_index()


def _statistics(array: xr.DataArray, names: Sequence[str]) -> xr.DataArray:
    """The published summaries of a variable that is known by cell."""
    quantiles = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # sites of NaN only
        summary = array.quantile([quantiles[name] for name in names], "cell")
    return summary.rename(quantile="statistic").assign_coords(statistic=list(names))


def _sites_agreement(both: pd.DataFrame, tolerance: Tolerance) -> Iterator[dict[str, Any]]:
    over = "statistic" if "statistic" in both else "cell"
    sites = [name for name in both if name not in (over, "published", "measured")]
    for labels, rows in groups(both, *sites):
        theirs, ours = rows["published"], rows["measured"]
        within = tolerance.within(ours, theirs)
        worst = rows.loc[(ours - theirs).abs().idxmax()]
        yield {
            **dict(zip(sites, labels, strict=True)),
            "over": over,
            "n": len(rows),
            "within": int(within.sum()),
            "share": float(within.mean()),
            "worst": worst[over],
            "published": worst["published"],
            "measured": worst["measured"],
            "rank_correlation": _spearman(theirs, ours) if over == "cell" else np.nan,
            "relative": tolerance.relative,
            "absolute": tolerance.absolute,
        }


def _spearman(one: Any, other: Any) -> float:
    """Correlation of ranks (ties share theirs); NaN where one side does not vary."""
    if one.nunique() < 2 or other.nunique() < 2:
        return float("nan")
    return float(one.rank().corr(other.rank()))
