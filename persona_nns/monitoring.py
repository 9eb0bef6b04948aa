"""Does a projection predict a score? Correlations over all answers, and within each condition."""

import xarray as xr


def correlation(results: xr.Dataset) -> xr.Dataset:
    """Pearson's r between projection and trait score, at each layer.

    Args:
        results: of `trait_monitoring`, of one trait.

    Returns:
        ``overall`` over (model, layer); ``within`` over (model, degree, layer), NaN where all
        scores of a degree are alike.
    """
    score = results["score"].mean("sample")
    return xr.Dataset(
        {
            "overall": _pearson(results["projection"], score, ("trait", "degree", "question")),
            "within": _pearson(results["projection"], score, ("trait", "question")),
        }
    )


def _pearson(x: xr.DataArray, y: xr.DataArray, dims: tuple[str, ...]) -> xr.DataArray:
    valid = x.notnull() & y.notnull()
    x, y = x.where(valid), y.where(valid)
    x, y = x - x.mean(dims), y - y.mean(dims)
    scale = ((x**2).sum(dims) * (y**2).sum(dims)) ** 0.5
    return ((x * y).sum(dims) / scale.where(scale > 1e-9)).rename("r")
