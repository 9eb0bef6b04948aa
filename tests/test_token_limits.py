"""Texts too long for a model, and tokens that it does not have, are refused at the start."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_models import save_random_model
from transformers import PreTrainedConfig

import persona_nns as pn
from persona_nns.errors import PersonaError, UsageError
from persona_nns.models.checkpoints import version_of

LONG_ROPE: dict[str, Any] = {
    "phi3": {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 48,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [1.0, 1.6, 4.0, 16.0],
        },
    },
    "llama": {
        "max_position_embeddings": 48,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    },
}


@pytest.mark.parametrize("architecture", LONG_ROPE)
def test_a_text_beyond_the_switch_of_its_rope_is_refused(
    tmp_path: Path, small_grid: pn.Grid, architecture: str
) -> None:
    folder = save_random_model(tmp_path / "m", architecture, **LONG_ROPE[architecture])
    model = pn.load_model(folder)
    with pytest.raises(UsageError, match="frequencies of 'm' are others beyond 48: a number"):
        pn.run("localized_positions", model, small_grid, store=tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()


def test_below_the_switch_a_number_does_not_depend_on_its_batch(
    tmp_path: Path, small_grid: pn.Grid
) -> None:
    changes = {**LONG_ROPE["phi3"], "original_max_position_embeddings": 200}
    model = pn.load_model(save_random_model(tmp_path / "m", "phi3", **changes))
    one, all_ = (
        pn.run(
            "localized_positions", model, small_grid, layers="2", positions="p_last",
            n_eval=4, batch_size=size, store=tmp_path / f"{size}.zarr",
        )
        for size in (1, 6)
    )  # fmt: skip
    np.testing.assert_allclose(one.kl, all_.kl, rtol=1e-3, atol=1e-5)


def test_learned_positions_are_counted_with_what_is_said(
    tmp_path: Path, small_grid: pn.Grid
) -> None:
    model = pn.load_model(save_random_model(tmp_path / "m", "gpt2", n_positions=100))
    settings: dict[str, Any] = {"layers": "2", "positions": "g2", "store": tmp_path / "s.zarr"}
    with pytest.raises(UsageError, match=r"said after it have \d+ tokens, .* 100 positions"):
        pn.run("localized_positions", model, small_grid, n_eval=90, **settings)
    with pytest.raises(UsageError, match=r"said after it have \d+ tokens, .* 100 positions"):
        pn.run("behavioral_markers", model, small_grid, n_tokens=90, store=tmp_path / "s.zarr")
    assert bool(
        pn.run("localized_positions", model, small_grid, n_eval=5, **settings).completed.all()
    )


def test_a_token_that_a_model_does_not_have_is_refused(tmp_path: Path, small_grid: pn.Grid) -> None:
    model = pn.load_model(save_random_model(tmp_path / "m", "llama"))
    tokenizer: Any = model.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|persona|>"]})
    tokenizer.chat_template = "<|persona|>" + tokenizer.chat_template
    with pytest.raises(UsageError, match="the token 1024, but the model 'm' has 1024 tokens"):
        pn.run("localized_positions", model, small_grid, store=tmp_path / "s.zarr")


def test_a_revision_that_the_hub_does_not_tell_is_no_version() -> None:
    with pytest.raises(PersonaError, match="did not tell which revision of 'org/name'"):
        version_of("org/name", PreTrainedConfig())
