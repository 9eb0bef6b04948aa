"""Every experiment gives its numbers where only copies cross between a trace and its model."""

from collections.abc import Callable
from pathlib import Path

import pytest
from everywhere import CASES, ON_A_GRID, Case, compare, on_grid, write_inputs
from nnsight import TransformersModel
from sandboxed import sandboxed

import persona_nns as pn

# What reads caches, decodes while it intervenes, or draws; `make test-slow` runs the others.
TELLING = (
    "attention_knockout",
    "behavioral_markers",
    "head_budget",
    "host_injection",
    "injection_controls",
    "kv_budget",
    "persona_patching",
    "trait_steering-generated",
    "persona_drift-generated",
    "persona_space-generated",
    "steering_memory-given",
)
ALL = [
    pytest.param(case, id=str(case), marks=() if str(case) in TELLING else pytest.mark.slow)
    for case in [*(Case(name) for name in ON_A_GRID), *CASES]
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ALL)
def test_the_numbers_are_those_without_a_sandbox(
    case: Case,
    golden_model: Callable[[str], TransformersModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = golden_model("qwen2")
    write_inputs(model)
    options = case.options or on_grid(case.experiment)
    here = pn.run(case.experiment, model, store="here.zarr", **options)
    with sandboxed(model):
        there = pn.run(case.experiment, model, store="there.zarr", **options)
    compare(here, there, atol=5e-5)
