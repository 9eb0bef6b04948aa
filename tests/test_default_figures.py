"""An experiment without figures of its own is drawn all the same, whatever its dimensions."""

import itertools
from typing import Any

import numpy as np
import pytest
import xarray as xr

from persona_nns.figures.default import default_figures
from persona_nns.figures.drawing import draw, file_stem

LABELS: dict[str, Any] = {
    "layer": [0, 1, 2],
    "position": ["p_last", "g1"],
    "head": [0, 1, 2, 3],
    "prompt": ["XY", "BY"],
    "alpha": [0.0, 0.5, 1.0],
}
KINDS = {"float": 1.5, "int": 2, "bool": True}


def results_of(dims: tuple[str, ...], kind: str, models: int = 2, n_done: int = 5) -> xr.Dataset:
    rng = np.random.default_rng(0)
    axes = ("model", "cell", *dims)
    labels: dict[str, Any] = {"model": ["m", "n"][:models], "cell": list("abcde"), **LABELS}
    shape = [len(labels[axis]) for axis in axes]
    values = rng.uniform(0, 5, size=shape)
    values = values > 2 if kind == "bool" else values.astype(kind)
    done = np.broadcast_to(np.arange(5) < n_done, shape[:2])
    coords = {axis: labels[axis] for axis in axes}
    array = xr.DataArray(values, coords, axes, attrs={"long_name": "what", "units": "1"})
    if kind != "float":
        array.attrs["kind"] = kind
    if n_done < 5:
        mask = xr.DataArray(done, {axis: labels[axis] for axis in axes[:2]}, axes[:2])
        array = array.astype(float).where(mask)
    ds = xr.Dataset({"x": array, "completed": (("model", "cell"), done)})
    return ds.assign_coords(n_layers=("model", [3] * models)).assign_attrs(
        experiment="mine", grid="g"
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [(), *itertools.combinations(LABELS, 2), tuple(LABELS)][::2])
def test_any_numeric_variable_is_drawn(dims: tuple[str, ...], kind: str) -> None:
    for n_done in (5, 2):
        figures = draw(results_of(dims, kind, n_done=n_done), "mine")
        (figure,) = figures.values()
        panels = [axis for axis in figure.axes if axis.get_ylabel() or axis.get_title()]
        assert panels
        assert all(axis.has_data() for axis in panels)
        counted = "g grid, 5 cells" if n_done == 5 else "2 of its 5 cells"
        assert counted in figure.get_suptitle()


def test_what_is_drawn_are_medians_over_the_cells_and_the_rest() -> None:
    results = results_of(("head", "alpha", "prompt"), "float")
    ((name, figure),) = default_figures(results).items()
    assert name == "x_by_head"  # the longest of the numbered ones
    line = figure.axes[0].get_lines()[0]
    expected = results.x.sel(model="m", alpha=0.0, prompt="XY").median("cell")
    np.testing.assert_allclose(np.asarray(line.get_ydata(), dtype=float), expected, rtol=1e-6)


def test_truth_values_are_drawn_as_rates_in_percent() -> None:
    results = results_of(("layer",), "bool", models=1)
    ((_, figure),) = default_figures(results).items()
    points = [line for line in figure.axes[0].get_lines() if len(np.ravel(line.get_ydata())) == 3]
    expected = 100 * results.x.mean("cell")[0]
    np.testing.assert_allclose(np.asarray(points[0].get_ydata(), dtype=float), expected)
    assert figure.axes[0].get_ylabel() == "what (%)"


def test_vectors_and_bookkeeping_are_not_drawn() -> None:
    results = results_of((), "float")
    results["vector"] = (("model", "cell", "d_model"), np.ones((2, 5, 7)))
    results["seconds"] = (("model", "cell"), np.ones((2, 5)))
    assert list(default_figures(results)) == ["x"]


def test_files_of_other_models_or_runs_are_named_otherwise() -> None:
    one = results_of((), "float", models=1)
    names = [
        file_stem(one.assign_attrs(run="m.g.1"), "e"),
        file_stem(one.assign_attrs(run="m.g.2"), "e"),
        file_stem(results_of((), "float").assign_attrs(run='["m.g.1", "n.g.1"]'), "e"),
        file_stem(results_of((), "float").assign_attrs(run='["m.g.1", "n.g.2"]'), "e"),
    ]
    assert names[:2] == ["e-m.g.1", "e-m.g.2"]
    assert len(set(names)) == 4
    assert all(name.startswith("e-m+n.g.") for name in names[2:])


def test_a_number_without_units_to_summarise_is_drawn_as_it_is() -> None:
    results = results_of((), "float", models=1)
    results["share"] = (("model", "prompt"), np.array([[0.25, 0.75]]))
    results = results.assign_coords(prompt=LABELS["prompt"])
    figure = default_figures(results[["share", "completed"]])["share_by_prompt"]
    drawn = np.ravel(figure.axes[0].get_lines()[0].get_ydata()).tolist()
    assert drawn == [0.25, 0.75]
    assert figure.axes[0].get_ylabel() == "share"
