"""Whether the numbers are those of the CPU, of float32, and of one device."""

import os
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import everywhere
import numpy as np
import torch
from nnsight import TransformersModel

import persona_nns as pn
from persona_nns.models import count_layers

#: In float32, TF32 off: what other kernels make of a number. Texts, choices and counts are equal.
TOLERANCE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3}
#: Of what is trained for some steps on either device.
TRAINED: dict[str, Any] = {"rtol": 5e-2, "atol": 5e-2}
#: Of medians over cells, in nats: bfloat16 has eight bits.
BFLOAT16: dict[str, Any] = {"rtol": 0.15, "atol": 0.1}

_TRAINING: dict[str, dict[str, Any]] = {
    "persona_cartridge": {
        "grid": "short",
        "personas": "yoda,marx",
        "train_tasks": "policy,haiku",
        "slots": "2",
        "steps": 4,
        "layer_sets": "2",
    },
    "trait_distillation": {
        "trait": "terse",
        "vector": "v.npy",
        "layer": 2,
        "alpha": 2.0,
        "students": "r2",
        "curve": "r2",
        "trajectories": "2",
        "n_samples": 1,
        "steps": 2,
        "rows": 2,
        "accumulation": 1,
        "max_new_tokens": 6,
        "judge": "none",
    },
}
_QUICK = ("localized_positions", "persona_accuracy", "trait_vectors", "trait_steering-generated")


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every experiment, small: how it is shown, its name and options."""
    on_grid = [name for name in everywhere.ON_A_GRID if name not in everywhere.HERE_ONLY]
    return {
        **{name: (name, everywhere.on_grid(name)) for name in on_grid},
        **{str(case): (case.experiment, case.options) for case in everywhere.CASES},
        **{name: (name, options) for name, options in _TRAINING.items()},
    }


def compare_with_cpu(name: str, device: torch.device, seconds: float, *, quick: bool) -> Any:
    """Every experiment on an organism, there and on the CPU: the largest differences.

    Raises:
        AssertionError: they differ by more than the tolerance.
    """
    here, there = (pn.load_model(name, device=str(of), dtype="float32") for of in ("cpu", device))
    stop, told, wrong = time.monotonic() + 0.8 * seconds, {}, {}
    before = Path.cwd()
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.chdir(folder)
        try:
            everywhere.write_inputs(here)
            for shown, (experiment, options) in cases().items():
                if time.monotonic() > stop:
                    told[shown] = "left out: no time is left"
                elif shown in everywhere.WITHIN_WINDOW and _slides(here):
                    told[shown] = "left out: prompts are longer than the sliding window"
                elif quick and shown not in _QUICK:
                    told[shown] = "left out: --quick"
                else:
                    try:
                        told[shown] = _differ(experiment, here, there, shown, options)
                    except (AssertionError, RuntimeError, pn.PersonaError) as error:
                        told[shown] = wrong[shown] = f"{type(error).__name__}: {error}"
        finally:
            os.chdir(before)
    if wrong:
        raise AssertionError("\n".join(f"{shown}: {what}" for shown, what in wrong.items()))
    return {"tolerance": TOLERANCE, "tolerance_trained": TRAINED, "largest_difference": told}


def _slides(model: TransformersModel) -> bool:
    config = model.config.get_text_config()
    return "sliding_attention" in (getattr(config, "layer_types", None) or ())


def _differ(
    experiment: str,
    here: TransformersModel,
    there: TransformersModel,
    shown: str,
    options: dict[str, Any],
) -> float:
    own = TRAINED if experiment in _TRAINING else TOLERANCE
    results = []
    for model, where in ((here, "here"), (there, "there")):
        apart: dict[str, Any] = {"output": f"{shown}-{where}"} if experiment in _TRAINING else {}
        store = f"{shown}-{where}.zarr"
        results.append(pn.run(experiment, model, store=store, progress=False, **options, **apart))
    return everywhere.compare(results[0], results[1], **own)


def compare_bfloat16(name: str, device: torch.device, *, quick: bool) -> Any:
    """Medians of the causal KL in bfloat16 and in float32.

    Raises:
        AssertionError: they differ by more than the tolerance.
    """
    cells = everywhere.CELLS if quick else None
    medians = []
    for dtype in ("float32", "bfloat16"):
        model = pn.load_model(name, device=str(device), dtype=dtype)
        with TemporaryDirectory() as folder:
            found = _localize(model, Path(folder), cells)
        medians.append(found.kl.median("cell").values)
    differ = np.abs(medians[1] - medians[0])
    np.testing.assert_allclose(medians[1], medians[0], **BFLOAT16, equal_nan=True)
    return {
        "tolerance": BFLOAT16,
        "medians_float32": medians[0][np.isfinite(medians[0])].tolist(),
        "medians_bfloat16": medians[1][np.isfinite(medians[1])].tolist(),
        "largest_difference": float(np.nanmax(differ)),
    }


def compare_spread(name: str, device: torch.device) -> Any:
    """A model spread over all cards beside the same on one; on a CPU, a map that names it twice.

    Raises:
        AssertionError: they differ by more than the tolerance.
    """
    n_layers = count_layers(name)
    device_map: Any = "balanced"
    if device.type != "cuda" or torch.cuda.device_count() == 1:
        whole = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
        layers = [f"model.layers.{k}" for k in range(n_layers)]
        device_map = dict.fromkeys([*whole, *layers], str(device))
    spread = pn.load_model(name, dtype="float32", device_map=device_map)
    one = pn.load_model(name, dtype="float32", device=str(device))
    results = []
    for model in (one, spread):
        with TemporaryDirectory() as folder:
            results.append(_localize(model, Path(folder), everywhere.CELLS))
    return {
        "tolerance": TOLERANCE,
        "devices": sorted(map(str, spread.devices)),
        "largest_difference": everywhere.compare(*results, **TOLERANCE),
    }


def _localize(model: TransformersModel, folder: Path, cells: str | None) -> Any:
    chosen: dict[str, Any] = {"layers": "0.25,0.55,0.85", "positions": "p_last,g1"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pn.run(
            *("localized_positions", model, "short"),
            **{"store": folder / "s.zarr", "cells": cells, "progress": False, **chosen},
        )
        return found.load()
