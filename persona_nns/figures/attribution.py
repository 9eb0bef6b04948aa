"""Attribution beside the exact sweep of patches: does one backward pass find the same places?"""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from persona_nns.figures import seaborn as sns
from persona_nns.figures.style import ZERO, medians, panels
from persona_nns.results.measured import measured_values

_MOST_POINTS = 5000
_PAIR = ("clean_persona", "corrupt_persona", "question")


def patch_effects(results: xr.Dataset, name: str = "logits_patched") -> xr.DataArray:
    """LD_patched − LD_corrupt in logits: what attribution estimates.

    Args:
        results: of persona_patching.
        name: ``logits_patched``, or ``head_logits_patched`` of single heads.

    Returns:
        Over the dimensions of the patches; NaN where nothing was measured.
    """
    logits = measured_values(results, name)
    right = logits.isel(letter=results.answer)
    others = (logits.sum("letter", skipna=False) - right) / (logits.sizes["letter"] - 1)
    corrupt = results.ld.rename(persona="corrupt_persona")
    return (right - others - corrupt).drop_vars("letter", errors="ignore")


def attribution_agreement(results: xr.Dataset) -> dict[str, xr.DataArray]:
    """Spearman's rank correlation of attribution with the exact effect, in each pair and question.

    Args:
        results: of persona_patching with ``attribution``.

    Returns:
        ``attribution``, over layers, by component and position set, and, where single heads were
        patched, ``head_attribution``, over layers and heads; NaN where nothing differs.
    """
    found: dict[str, xr.DataArray] = {}
    for name, patched in _compared(results).items():
        over = [dim for dim in ("layer", "head") if dim in results[name].dims]
        both = measured_values(results, name), patch_effects(results, patched)
        estimate, exact = (_ranks(each.stack(part=over).dropna("part", how="all")) for each in both)
        found[name] = xr.corr(estimate, exact, "part")
    return found


def attribution_of_patches(results: xr.Dataset) -> Figure | None:
    """Attribution against the exact effect of every patch, with their rank correlation.

    Args:
        results: of persona_patching.

    Returns:
        The figure: a row what is patched, a column a model and position set. None without
        ``attribution``.
    """
    if "attribution" not in results:
        return None
    agreement, compared = attribution_agreement(results), _compared(results)
    rows = [(name, component) for name in compared for component in _components(results, name)]
    models, sets = results.model.values.tolist(), results.position_set.values.tolist()
    columns = [(model, each) for model in models for each in sets]
    size = (1.0 + 3.0 * len(columns), 1.4 + 2.4 * len(rows))
    generator, colour = np.random.default_rng(0), sns.color_palette("colorblind")[0]
    with panels(size, rows, columns, font_scale=0.9) as drawn:
        for (name, component), (model, position_set), axis in drawn:
            at = {"model": model, "position_set": position_set}
            at |= {} if component is None else {"component": component}
            exact = patch_effects(results, compared[name]).sel(at)
            both = xr.broadcast(measured_values(results, name).sel(at), exact)
            estimate, exact = (np.ravel(each.values) for each in both)
            known = np.flatnonzero(np.isfinite(estimate) & np.isfinite(exact) & (exact != 0))
            if known.size > _MOST_POINTS:
                known = generator.choice(known, _MOST_POINTS, replace=False)
            axis.scatter(exact[known], estimate[known], s=5, alpha=0.4, color=colour, linewidths=0)
            axis.axline((0, 0), slope=1, **ZERO)
            correlation = float(medians(agreement[name].sel(at), _PAIR))
            what = "head" if component is None else component
            axis.set(
                title=f"{model} · {what}, {position_set}\nrank correlation {correlation:.2f}",
                xlabel="LD_patched − LD_corrupt (logit)",
                ylabel="attribution (logit)",
            )
        drawn.label_outer()
        drawn.title(
            f"{results.attrs['experiment']} · {results.attrs['grid']}: attribution and patching",
            "Points: patches that change something; line: equal. Spearman's correlation is over "
            "the layers (and heads) of a pair and question; median over both.",
        )
    return drawn.figure


def _ranks(values: xr.DataArray) -> xr.DataArray:
    """Places over ``part``, equal values sharing the mean of theirs; NaN where one is not known."""
    from scipy import stats  # takes as long to import as all the rest

    each: dict[str, Any] = {"axis": -1, "nan_policy": "propagate"}
    dims = [["part"]]
    return xr.apply_ufunc(
        stats.rankdata, values, kwargs=each, input_core_dims=dims, output_core_dims=dims
    )


def _compared(results: xr.Dataset) -> dict[str, str]:
    """What was estimated, and where the patches are that it estimates."""
    each = {"attribution": "logits_patched", "head_attribution": "head_logits_patched"}
    return {name: patched for name, patched in each.items() if {name, patched} <= set(results)}


def _components(results: xr.Dataset, name: str) -> list[str | None]:
    return results.component.values.tolist() if name == "attribution" else [None]
