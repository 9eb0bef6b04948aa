"""How large a budget has to be, read from curves over the dimension ``budget``."""

import xarray as xr


def needed_for(closure: xr.DataArray, share: float, sizes: xr.DataArray) -> xr.DataArray:
    """The smallest budget from which on closure stays at or above a share.

    Curves are not monotone: a budget counts only if all larger ones reach the share too.

    Args:
        closure: over ``budget``, ascending, and other dimensions.
        share: the closure that is asked for, 0.5 say.
        sizes: what each budget is, in whatever unit the answer is to have, over ``budget``.

    Returns:
        Without ``budget``; NaN where the largest budget does not reach the share, or any closure is
        not known.
    """
    backwards = (closure >= share).isel(budget=slice(None, None, -1))
    stays = backwards.cumprod("budget").isel(budget=slice(None, None, -1)).astype(bool)
    needed = sizes.where(stays).min("budget")
    return needed.where(closure.notnull().all("budget"))
