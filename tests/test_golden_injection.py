"""The golden models against what the public scripts of sections 6 and 7 print for them."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from nnsight import TransformersModel

from persona_nns.prompts.grids import load_grid

EXPECTED = Path(__file__).parent / "golden"
CELLS = list(load_grid("review").cells)
LABELS = [cell.label.replace("/", "__") for cell in CELLS]
# Names of the published scripts for the conditions and sources of this project.
CONDITIONS = {
    "clean": "clean",
    "additive": "additive",
    "remove_persona": "remove_X",
    "bare": "bare",
}
KLS = {"none": "kl_host_clean", "cached": "kl_cached", "oracle": "kl_oracle"}
QUALITATIVE = {"none": "host", "cached": "cached", "oracle": "oracle"}

pytestmark = pytest.mark.parametrize("name", ["qwen2", "gemma2"])


def expected(name: str, file: str) -> dict[str, Any]:
    text = (EXPECTED / name / "expected" / f"{file}.json").read_text(encoding="utf-8")
    return json.loads(text)


def test_every_text_and_marker_count_is_reproduced(
    golden_model: Callable[[str], TransformersModel], behavioral_markers: ModuleType, name: str
) -> None:
    published = expected(name, "behavioral_markers")
    result = behavioral_markers.measure(
        golden_model(name),
        CELLS,
        layers=[published["inject_layer"]],
        n_tokens=published["n_gen_tokens"],
    )
    assert list(published["results"]) == LABELS
    for row, label in enumerate(LABELS):
        for k, condition in enumerate(behavioral_markers.CONDITIONS):
            theirs = published["results"][label][CONDITIONS[condition]]
            assert result["text"][row][0][k] == theirs["text"]
            assert int(result["distinct_markers"][row, 0, k]) == theirs["count"]
            assert bool(result["any_marker"][row, 0, k]) == theirs["any"]


def test_every_kl_of_host_injection_is_reproduced(
    golden_model: Callable[[str], TransformersModel], host_injection: ModuleType, name: str
) -> None:
    single, sets = expected(name, "host_injection"), expected(name, "multilayer_injection")
    layer_sets = [[int(layer) for layer in key.split("_")] for key in sets["results"]]
    assert layer_sets[0] == [3]
    assert len(layer_sets) == 5
    result = host_injection.measure(golden_model(name), CELLS, layer_sets=layer_sets)
    assert (result["n_eval"] == 10).all()
    for k, source in enumerate(host_injection.SOURCES):
        theirs = [single["results"][label][KLS[source]] for label in LABELS]
        np.testing.assert_allclose(result["kl"][:, 0, k], theirs, rtol=1e-3, atol=1e-5)
        kept = [
            1 - kl / single["results"][label][KLS["none"]]
            for label, kl in zip(LABELS, theirs, strict=True)
        ]
        np.testing.assert_allclose(result["closure"][:, 0, k], kept, rtol=0, atol=1e-3)
        assert result["text"][0][0][k] == single["qual"][QUALITATIVE[source]]
    assert result["clean_text"][0] == single["qual"]["long"]
    for s, key in enumerate(sets["results"]):
        theirs = [sets["results"][key]["kls"][label] for label in LABELS]
        np.testing.assert_allclose(result["kl"][:, s, 1], theirs, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(result["kl"][:, s, 0], result["kl"][:, 0, 0], rtol=0, atol=0)
