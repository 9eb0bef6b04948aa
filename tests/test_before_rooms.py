"""What was stored before the package had rooms opens, goes on and verifies with it.

`golden/before_rooms` was written by commit 0b0dcbd: a store of two runs on the golden qwen2 model,
and the run names and identities of every bundled experiment on it.
"""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import persona_nns as pn
from persona_nns.runs import plan_run, verify_store

ROOT = Path(__file__).parents[1]
BEFORE = ROOT / "tests" / "golden" / "before_rooms"
MODEL = "tests/golden/qwen2"  # as the store names it, from the root of the repository
#: Experiments whose numbers are others since: their `protocol_version` was raised.
RAISED = {"kv_graft"}
EXPECTED: dict[str, dict[str, Any]] = json.loads((BEFORE / "identities.json").read_text())


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with zipfile.ZipFile(BEFORE / "store.zip") as archive:
        archive.extractall(tmp_path / "before.zarr")
    monkeypatch.chdir(ROOT)
    return tmp_path / "before.zarr"


def test_its_numbers_are_read(store: Path) -> None:
    results = pn.open_results(store, "localized_positions")
    assert results.cell.values[results.completed.values[0]].tolist() == [
        "marx/policy",
        "yoda/haiku",
    ]
    kl = results.kl.sel(cell="yoda/haiku", position="p_last", layer=[2, 4]).values.ravel()
    np.testing.assert_allclose(kl, [1.125489, 1.594696], rtol=1e-6)
    assert (
        float(pn.open_results(store, "kv_graft").kl.sel(graft="all", layer_band="all").max()) < 1e-6
    )


def test_it_goes_on_in_the_same_runs(store: Path) -> None:
    pn.run(
        "localized_positions",
        MODEL,
        "short",
        cells="yoda/haiku,yoda/policy",
        layers="2,4",
        store=store,
    )
    runs = {info.run: info.n_completed for info in pn.list_runs(store)}
    assert runs == {"qwen2.short.a0b681f418": 3, "qwen2.review.b6d28cd658": 1}


def test_its_numbers_are_those_computed_anew(store: Path) -> None:
    grafts, localized = verify_store(store)
    assert (localized.state, localized.n_recomputed) == ("right", 2)
    assert grafts.state == "not checked"  # its version is another one now
    assert "version" in grafts.not_checked


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the options of `EXPECTED` name, and a golden model beside them."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / MODEL, tmp_path / "qwen2")
    Path("identities.txt").write_text("good\nbad\n")
    rows = [
        {"pair": 0, "question_id": k, "label": label, "system": f"Be {how}.",
         "question": "How is it?", "response": said}
        for k, said in enumerate(("A fine day.", "It rains and rains."))
        for label, how in (("pos", "glad"), ("neg", "plain"))
    ]  # fmt: skip
    Path("cheerful.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = json.loads(Path("qwen2/config.json").read_text())
    shape = (config["num_hidden_layers"] + 1, config["hidden_size"])
    np.save("v.npy", np.arange(np.prod(shape), dtype=np.float32).reshape(shape))
    return tmp_path


def test_every_experiment_has_the_identity_that_it_had(inputs: Path) -> None:
    model = pn.load_model(inputs / "qwen2")
    for name, before in EXPECTED.items():
        planned = plan_run(name, model, store=inputs / "none.zarr", **before["options"])
        attrs = planned.request.block.attrs
        is_same = (planned.group[1], attrs["identity"]) == (before["run"], before["identity"])
        assert is_same == (name not in RAISED), name
