"""The golden models against what the public scripts of "As X, Do Y" measured on them.

The expected files hold per-cell KL, and for cosines and ratios summaries over the cells.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from nnsight import TransformersModel
from torch import Tensor

from persona_nns.prompts.grids import Grid, load_grid

GOLDEN = Path(__file__).parent / "golden"
# Names of the published scripts → names of this project.
GEOMETRY = {
    "cos_xy_sum": "cos_additive",
    "cos_x_y": "cos_persona_task",
    "inter_over_xy": "interaction_ratio",
}
N_CELLS = {"short": 12, "long": 48}
BATCH = 16


def expected_file(model: str, grid: str) -> dict[str, Any]:
    file = GOLDEN / model / "expected" / f"localized_positions_{grid}.json"
    return json.loads(file.read_text(encoding="utf-8"))


def measure(
    experiment: ModuleType,
    model: TransformersModel,
    grid: Grid,
    layers: list[int],
    probes: list[str],
) -> dict[str, np.ndarray]:
    cells = list(grid.cells)
    parts = [
        experiment.measure(model, cells[first : first + BATCH], layers=layers, positions=probes)
        for first in range(0, len(cells), BATCH)
    ]
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}


def assert_conforms(result: dict[str, np.ndarray], expected: dict[str, Any], grid: Grid) -> None:
    """Every number of an expected file: KL per cell, geometry as summaries over the cells."""
    labels = [cell.label for cell in grid.cells]
    layers, probes = expected["layers_to_test"], expected["probes"]
    for p, probe in enumerate(probes):
        for k, layer in enumerate(layers):
            per_cell = expected["causal"][probe][str(layer)]["per_cell"]
            assert {key.replace("__", "/") for key in per_cell} == set(labels)
            np.testing.assert_allclose(
                result["kl"][:, k, p],
                [per_cell[label.replace("/", "__")] for label in labels],
                rtol=1e-3,
                atol=1e-5,
                err_msg=f"kl at {probe}, layer {layer}",
            )
        for layer, summaries in expected["decomposition"][probe].items():
            assert set(summaries) == set(GEOMETRY)
            for theirs, ours in GEOMETRY.items():
                values = result[ours][:, int(layer), p]
                summary = summaries[theirs]
                np.testing.assert_allclose(
                    [
                        np.median(values),
                        *np.percentile(values, [25, 75]),
                        values.min(),
                        values.max(),
                    ],
                    [summary["median"], *summary["iqr"], summary["min"], summary["max"]],
                    rtol=0,
                    atol=1e-4,
                    err_msg=f"{ours} at {probe}, layer {layer}",
                )


@pytest.mark.parametrize("grid_name", ["short", "long"])
@pytest.mark.parametrize("model_name", ["qwen2", "gemma2"])
def test_every_number_of_the_published_scripts_is_reproduced(
    golden_model: Callable[[str], TransformersModel],
    localized_positions: ModuleType,
    model_name: str,
    grid_name: str,
) -> None:
    grid, expected = load_grid(grid_name), expected_file(model_name, grid_name)
    layers, probes = expected["layers_to_test"], expected["probes"]
    assert layers == [0, 1, 2, 3, 4, 5]
    assert probes == [*(["p_user_last"] if grid_name == "short" else []), "p_last", "g1", "g2"]
    assert len(grid.cells) == N_CELLS[grid_name]
    result = measure(localized_positions, golden_model(model_name), grid, layers, probes)
    assert result["kl"].shape == (N_CELLS[grid_name], 6, len(probes))
    assert (result["n_eval"] == 10).all()
    assert_conforms(result, expected, grid)


@pytest.fixture
def short(golden_model: Callable[[str], TransformersModel]) -> dict[str, Any]:
    expected = expected_file("qwen2", "short")
    return {
        "model": golden_model("qwen2"),
        "grid": load_grid("short"),
        "layers": expected["layers_to_test"],
        "probes": expected["probes"],
    }


def test_an_intervention_that_does_nothing_is_rejected(
    localized_positions: ModuleType, monkeypatch: pytest.MonkeyPatch, short: dict[str, Any]
) -> None:
    def leave(hidden: Tensor, index: Tensor, value: Tensor) -> Tensor:  # noqa: ARG001
        return hidden.clone()

    monkeypatch.setattr(localized_positions, "substitute", leave)
    result = measure(localized_positions, **short)
    np.testing.assert_allclose(result["kl"], 0.0, atol=1e-6)
    with pytest.raises(AssertionError, match="kl at p_user_last, layer 1"):
        assert_conforms(result, expected_file("qwen2", "short"), short["grid"])


def test_an_intervention_one_layer_off_is_rejected(
    localized_positions: ModuleType, monkeypatch: pytest.MonkeyPatch, short: dict[str, Any]
) -> None:
    right = localized_positions.additive

    def late(*residuals: Tensor) -> Tensor:
        """The prediction of layer L-1, which is then written at layer L."""
        return right(*residuals).roll(1, dims=0)

    monkeypatch.setattr(localized_positions, "additive", late)
    result = measure(localized_positions, **short)
    assert (result["kl"][:, 1:] > 1e-5).all()
    with pytest.raises(AssertionError, match="kl at p_user_last"):
        assert_conforms(result, expected_file("qwen2", "short"), short["grid"])


def test_results_reported_one_layer_off_are_rejected(
    localized_positions: ModuleType, short: dict[str, Any]
) -> None:
    expected = expected_file("qwen2", "short")
    result = measure(localized_positions, **short)
    assert_conforms(result, expected, short["grid"])
    for name, problem in (("kl", "kl at"), ("cos_additive", "cos_additive at")):
        shifted = {**result, name: np.roll(result[name], 1, axis=1)}
        with pytest.raises(AssertionError, match=problem):
            assert_conforms(shifted, expected, short["grid"])
