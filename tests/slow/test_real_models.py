"""Real models, where they are in the user's cache: nothing is downloaded here.

`persona-nns models --get NAME` puts one there.
"""

import io
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from nnsight import TransformersModel
from rich.console import Console
from safetensors.torch import load_file

from persona_nns.cli import demo
from persona_nns.models.checkpoints import (
    find_checkpoint,
    load_weights,
    read_config,
    version_of,
)
from persona_nns.models.fetched import FETCHED, is_available
from persona_nns.models.gguf import provenance_of
from persona_nns.models.load import load_model
from persona_nns.prompts.grids import load_grid

pytestmark = pytest.mark.slow
GOLDEN = Path(__file__).parents[1] / "golden" / "smollm2" / "expected"
GEOMETRY = {
    "cos_xy_sum": "cos_additive",
    "cos_x_y": "cos_persona_task",
    "inter_over_xy": "interaction_ratio",
}
PARAGRAPH = (
    "The sun was setting over the hills as the farmer walked back to his house. He had worked in "
    "the fields all day, and he was tired, but he was also happy, because the harvest had been "
    "good. His wife was waiting for him at the door with their two children. They sat down at the "
    "table and ate dinner together, and then they told each other stories about what had happened "
    "during the day. When it was dark outside, the children went to bed, and the farmer and his "
    "wife sat by the fire and talked about their plans for the winter."
)


@pytest.fixture(scope="module")
def real() -> Callable[[str], TransformersModel]:
    """The model of a name; the test is skipped where it is not in the cache."""

    @cache
    def load(name: str) -> TransformersModel:
        if not is_available(name):
            pytest.skip(f"{name} is not in the cache: persona-nns models --get {name}")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = load_model(name, dtype="float32")
        is_warned = any(f"{name!r} is a base model" in str(each.message) for each in said)
        assert is_warned == FETCHED[name].is_base
        return model

    return load


def loss(model: Any, text: str) -> float:
    """Nats a token of a text, behind the beginning-of-text token where the template has one."""
    begins = model.tokenizer.chat_template.startswith("<bos>")
    ids = model.tokenizer(text, add_special_tokens=begins, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model._module(ids).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))


@pytest.mark.parametrize("name", FETCHED)
def test_a_plain_paragraph_is_no_surprise(
    real: Callable[[str], TransformersModel], name: str
) -> None:
    assert loss(real(name), PARAGRAPH) < 2.7


def test_prompts_of_the_base_model_begin_with_bos(
    real: Callable[[str], TransformersModel],
) -> None:
    tokenizer: Any = real("gemma3-270m").tokenizer
    message = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert text == "<bos>Hello\n"
    assert tokenizer(text, add_special_tokens=False)["input_ids"][0] == tokenizer.bos_token_id


def test_the_cached_model_loads_as_fast_as_its_folder_and_is_bit_equal(
    real: Callable[[str], TransformersModel], tmp_path: Path
) -> None:
    real("smollm2-135m-instruct")
    folder = FETCHED["smollm2-135m-instruct"].folder
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).symlink_to(file)
    seconds: dict[str, list[float]] = {"smollm2-135m-instruct": [], str(copy): []}
    for _ in range(3):  # in turn, so that both see the same machine
        for name, taken in seconds.items():
            start = time.process_time()
            load_weights(name, "float32")
            source, shown = find_checkpoint(name)
            version_of(source, read_config(source, shown, trust_remote_code=False))
            taken.append(time.process_time() - start)
    cached, other = map(min, seconds.values())
    assert cached < 1.2 * other
    assert provenance_of(copy) == {}  # a folder of one's own is what its weights are
    kept = load_file(folder / "model.safetensors")
    read = load_weights("smollm2-135m-instruct", "float32").state_dict()
    assert all(torch.equal(weight, read[name]) for name, weight in kept.items())


def test_every_number_of_the_published_script_is_reproduced_on_smollm2(
    real: Callable[[str], TransformersModel], localized_positions: ModuleType
) -> None:
    model, grid = real("smollm2-135m-instruct"), load_grid("short")
    expected = json.loads((GOLDEN / "localized_positions_short.json").read_text(encoding="utf-8"))
    layers, probes = expected["layers_to_test"], expected["probes"]
    measured = localized_positions.measure(model, list(grid.cells), layers=layers, positions=probes)
    result = {name: values.numpy() for name, values in measured.items()}
    labels = [cell.label.replace("/", "__") for cell in grid.cells]
    for p, probe in enumerate(probes):
        for k, layer in enumerate(layers):
            per_cell = expected["causal"][probe][str(layer)]["per_cell"]
            theirs = [per_cell[label] for label in labels]
            np.testing.assert_allclose(result["kl"][:, k, p], theirs, rtol=1e-3, atol=2e-5)
        for layer, summaries in expected["decomposition"][probe].items():
            for theirs, ours in GEOMETRY.items():
                values, said = result[ours][:, int(layer), p], summaries[theirs]
                quartiles = np.percentile(values, [25, 75])
                np.testing.assert_allclose(
                    [np.median(values), *quartiles, values.min(), values.max()],
                    [said["median"], *said["iqr"], said["min"], said["max"]],
                    rtol=1e-3,  # of one cosine, 0.34, the script is 1e-4 from float64's
                    atol=1e-4,
                    err_msg=f"{ours} at {probe}, layer {layer}",
                )


def test_the_demo_is_told_on_smollm2(
    real: Callable[[str], TransformersModel], tmp_path: Path
) -> None:
    real(demo.REAL)
    console = Console(width=80, record=True, file=io.StringIO())
    story = demo.choose_story(quick=False, console=console)
    assert story is demo.ON_A_LANGUAGE_MODEL
    assert console.export_text() == ""
    cells = {"short": "yoda/haiku,marx/policy", "long": "chef/haiku", "review": "chef/plan"}
    few = tuple(
        (name, grid, {**asked, "cells": cells[grid]}) for name, grid, asked in story.requests
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a template's own text, personas without a marker
        demo.run_demo(replace(story, requests=few), str(tmp_path / "d.zarr"), tmp_path, console)
    printed = console.export_text()
    assert "nan" not in printed.lower()
    assert "smollm2" in printed
    assert max(map(len, printed.splitlines()[:-3])) <= 80
    drawn = {file.name.split("-")[0] for file in (tmp_path / demo.REAL).glob("*.png")}
    assert drawn == {name for name, *_ in few}
