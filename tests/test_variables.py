"""Variables whose labels depend on the model or on the options of a run."""

from collections.abc import Callable
from pathlib import Path

import pytest
from nnsight import TransformersModel

import persona_nns as pn
from persona_nns.errors import UsageError
from persona_nns.prompts.grids import Grid

OWN = '''
"""Sizes that depend on the model, for the tests."""
import torch
from persona_nns import Variable
from persona_nns.declarations import label_layer_set

protocol_version = 1
defaults = {"layer_sets": "0.5;all"}
variables = {
    "size": Variable(
        "cell layer_set head alpha",
        "number of layers, head and alpha",
        coords={
            "layer_set": lambda record, parameters: [
                label_layer_set(layers) for layers in parameters["layer_sets"]
            ],
            "head": lambda record, parameters: range(record.n_heads),
            "alpha": lambda record, parameters: [0.5, parameters["alpha"]],
        },
    ),
}

def measure(model, cells, *, layer_sets: list[list[int]], alpha: float = 2.0):
    sizes = torch.tensor([len(layers) for layers in layer_sets]).float()
    heads = torch.arange(model.config.num_attention_heads)
    value = sizes[:, None, None] + 10 * heads[:, None] + torch.tensor([0.5, alpha]) / 100
    return {"size": value.expand(len(cells), -1, -1, -1)}
'''


def test_labels_are_those_of_the_model_and_the_options(
    tmp_path: Path, random_model: Callable[[str], TransformersModel], small_grid: Grid
) -> None:
    file = tmp_path / "sizes.py"
    file.write_text(OWN)
    model = random_model("qwen2")
    ds = pn.run(file, model, small_grid, store=tmp_path / "s.zarr", layer_sets="3;1,2")
    assert ds["size"].dims == ("model", "cell", "layer_set", "head", "alpha")
    assert ds.layer_set.values.tolist() == ["3", "1,2"]
    assert ds["head"].values.tolist() == list(range(model.config.num_attention_heads))
    assert ds.alpha.values.tolist() == [0.5, 2.0]
    assert float(ds["size"].sel(layer_set="1,2", head=1, alpha=2.0)[0, 0]) == pytest.approx(12.02)
    ds = pn.run(file, model, small_grid, store=tmp_path / "s.zarr")
    assert ds.layer_set.values.tolist() == ["2", "0,1,2,3,4"]
    with pytest.raises(UsageError, match="has no layers to choose"):
        pn.run(file, model, small_grid, store=tmp_path / "s.zarr", layers="1")
