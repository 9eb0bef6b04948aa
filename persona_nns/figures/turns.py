"""Figures of conversations, turn by turn."""

import xarray as xr
from matplotlib.figure import Figure

_MOST_LAYERS = 3


def drift_curves(results: xr.Dataset) -> Figure:
    raise NotImplementedError


def memory_by_turn(results: xr.Dataset) -> Figure:
    raise NotImplementedError
