"""The norm variables of localized_positions, recomputed with plain hooks and plain modules."""

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from nnsight import TransformersModel
from plain_hooks import blocks_of, greedy, logits_with, prompt_ids, residuals, summed_kl
from random_models import architectures
from torch import Tensor
from transformers import PreTrainedModel

from persona_nns.prompts.grids import Grid

END, N_EVAL, LAYERS = 2, 4, [1, 4]
POSITIONS = ["p_last", "g1"]
architecture = architectures("qwen2", "gemma3", "gpt2", "olmo2")


def rms(vector: Tensor) -> Tensor:
    return vector.pow(2).mean().sqrt()


def test_norm_variables_equal_plain_hooks(
    architecture: str,
    random_model: Callable[[str], TransformersModel],
    plain_model: Callable[[str], PreTrainedModel],
    localized_positions: ModuleType,
    tokenizer: Any,
    small_grid: Grid,
) -> None:
    model, plain = random_model(architecture), plain_model(architecture)
    cells = list(small_grid.cells)[:3]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = localized_positions.measure(
            model, cells, layers=LAYERS, positions=POSITIONS, n_eval=N_EVAL
        )
    said = [str(warning.message) for warning in caught]
    assert any("no input norm" in text for text in said) == (architecture == "olmo2")
    names = {"gpt2": "ln_1"}
    block_norms = [
        getattr(block, names.get(architecture, "input_layernorm"), None)
        for block in blocks_of(plain)
    ]
    for row, cell in enumerate(cells):
        x, y = cell.persona_text, cell.task_text
        x0, y0 = cell.baseline_persona_text, cell.baseline_task_text
        ids = [prompt_ids(tokenizer, *text) for text in ((x0, y0), (x, y0), (x0, y), (x, y))]
        reference = greedy(plain, ids[3], N_EVAL + 1, END)
        hidden = [residuals(plain, [*prompt, *reference[:1]]) for prompt in ids]
        full = [*ids[3], *reference]
        clean = logits_with(plain, full, {})
        for p in range(len(POSITIONS)):
            sites = [len(prompt) - 1 + p for prompt in ids]
            scored = slice(sites[3], sites[3] + N_EVAL)
            for layer in range(6):
                bb, xb, by, xy = (h[layer, site] for h, site in zip(hidden, sites, strict=True))
                h_add = xb + by - bb
                size = (xy - bb).norm()
                expected = float((h_add - xy).norm() / size) if size > 1e-6 else 0.0
                measured = {name: result[name][row, layer, p] for name in ("gap_ratio",)}
                assert float(measured["gap_ratio"]) == pytest.approx(expected, rel=1e-3, abs=1e-4)
                after = float(result["gap_ratio_post_norm"][row, layer, p])
                norm = block_norms[layer] if layer < 5 else None
                if norm is None:
                    assert after != after
                else:
                    size = (norm(xy) - norm(bb)).norm()
                    expected = float((norm(h_add) - norm(xy)).norm() / size) if size > 1e-6 else 0
                    assert after == pytest.approx(expected, rel=1e-3, abs=1e-4)
                if layer not in LAYERS:
                    continue
                for name, value in (
                    ("kl", h_add),
                    ("kl_rms_matched", h_add * rms(xy) / rms(h_add)),
                    ("kl_rms_only", xy * rms(h_add) / rms(xy)),
                ):
                    moved = logits_with(plain, full, {(layer, sites[3]): value})
                    expected = summed_kl(clean[scored], moved[scored])
                    ours = float(result[name][row, LAYERS.index(layer), p])
                    assert ours == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert float(result["kl_rms_only"].max()) > 1e-4
    torch.testing.assert_close(result["gap_ratio"], result["interaction_ratio"])
