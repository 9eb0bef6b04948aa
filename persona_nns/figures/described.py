"""What an experiment's results hold, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


def describe(results: xr.Dataset) -> pd.DataFrame:
    """A row a variable: its dimensions, its unit, and what it is.

    Args:
        results: of any experiment.
    """
    import pandas as pd

    rows = {
        str(name): {
            "dimensions": ", ".join(map(str, array.dims)),
            "unit": array.attrs["units"] if array.attrs.get("units", "1") != "1" else "",
            "what it is": array.attrs.get("description", ""),
        }
        for name, array in results.data_vars.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("variable")
