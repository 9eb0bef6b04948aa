"""The tables of the findings on roles: where they lie, and which is how far from the assistant."""

from collections.abc import Iterator
from typing import Any

import xarray as xr

import persona_nns as pn

DEPTHS = (0.10, 0.25, 0.40, 0.55, 0.70, 0.85, 1.0)
RANKED_AT = 0.5  # where the literature reads the axis: about the middle
Row = dict[str, Any]


def role_space(store: str) -> Iterator[Row]:
    """By layer: how much roles vary, beside chance, and how the axis lies in their space."""
    space = open_space(store)
    for layer in (round(depth * int(space.n_layers.item())) for depth in DEPTHS):
        at = space.sel(layer=layer)
        first, second = at.isel(component=0), at.isel(component=1)
        yield {
            "layer": layer,
            "variance over chance": f"{float(at.variance / at.variance_null):.2f}",
            "share of the first component": per_cent(first.explained),
            "by chance": per_cent(first.explained_null),
            "cosine with the axis": cosine(first),
            "second component": per_cent(second.explained),
            "its chance": per_cent(second.explained_null),
            "its cosine": cosine(second),
        }


def role_ranking(store: str) -> Iterator[Row]:
    """In the middle: how far each role is on the way to the assistant."""
    space = open_space(store)
    at = space.sel(layer=round(RANKED_AT * int(space.n_layers.item())))
    for role in at.projection.sortby(at.projection, ascending=False).role.values:
        of_role = at.sel(role=role)
        yield {
            "role": role,
            "answers": int(of_role.n_kept),
            "projection on the axis": f"{float(of_role.projection):.2f} "
            f"{bounds(of_role.projection_interval)}",
        }


def open_space(store: str) -> xr.Dataset:
    """The one run, of the one model."""
    return pn.open_results(store, "persona_space").isel(model=0, space=0, missing_dims="ignore")


def per_cent(share: xr.DataArray) -> str:
    """A share, in per cent."""
    return f"{100 * float(share):.1f} %"


def cosine(component: xr.Dataset) -> str:
    """Of a component with the axis, with its interval."""
    return f"{float(component.cos_axis):.2f} {bounds(component.cos_axis_interval)}"


def bounds(interval: xr.DataArray) -> str:
    """An interval."""
    low, high = (float(interval.sel(bound=bound)) for bound in ("low", "high"))
    return f"[{low:.2f}, {high:.2f}]"
