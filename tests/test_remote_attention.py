"""A server with attention of its own (as NDIF 0.1 has sdpa) gives the local, eager numbers."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from nnsight import TransformersModel
from random_models import crossed

import persona_nns as pn
from persona_nns.models.loopback import LoopbackServer
from persona_nns.prompts.grids import load_grid
from persona_nns.runs.remote import dispatch
from persona_nns.runs.remote.connection import Patience

GRID = load_grid("short")
GRID = replace(GRID, markers=dict.fromkeys(GRID.personas, ("the", "of")))

OWN = '''
"""How many layers return their attention weights?"""
from nnsight import save
from persona_nns import Variable, left_pad, render_cell

variables = {"returned": Variable("cell", "layers that return weights", kind="int")}

def measure(model, cells):
    batch = left_pad([render_cell(model.tokenizer, cell)["XY"].ids for cell in cells])
    with model.trace(batch.tokens, position_ids=batch.position_ids, use_cache=False):
        returned = save(sum(block.attn.output[1] is not None for block in model.layers))
    return {"returned": [returned] * len(cells)}
'''


# Of Gemma 3, some layers have a sliding window; GPT-NeoX calls its cache otherwise.
@pytest.fixture(scope="module", params=crossed("gemma3", among=("gemma3", "mistral", "gpt_neox")))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def remote(architecture: str, random_folder: Callable[[str], Path]) -> Iterator[TransformersModel]:
    """Client of a server whose attention is sdpa, whatever a request asks for."""
    folder, name = random_folder(architecture), f"tiny/{architecture}"
    server = LoopbackServer(str(folder), name, options=("--attention", "sdpa"))
    yield pn.load_model(folder, backend=server.address.url, label=name)
    server.stop()


@pytest.fixture(autouse=True)
def haste(monkeypatch: pytest.MonkeyPatch) -> None:
    patience = Patience(unreachable=20, first=0.05, longest=0.2)
    monkeypatch.setattr(dispatch, "PATIENCE", patience)


def test_the_server_returns_no_attention_weights(remote: TransformersModel, tmp_path: Path) -> None:
    (tmp_path / "returned.py").write_text(OWN)
    asked: dict[str, Any] = {"grid": GRID, "cells": "yoda/haiku", "store": tmp_path / "s.zarr"}
    there = pn.run(tmp_path / "returned.py", remote, **asked)
    assert there.returned.sel(cell="yoda/haiku").item() == 0


@pytest.mark.filterwarnings("ignore:Continuations that end before")
@pytest.mark.parametrize("name", ["kv_graft", "attention_knockout"])
@pytest.mark.parametrize("cells", ["yoda/haiku,marx/policy,marx/haiku", "yoda/haiku"])
def test_experiments_that_change_masks(
    name: str,
    cells: str,
    remote: TransformersModel,
    architecture: str,
    random_model: Callable[[str], TransformersModel],
    tmp_path: Path,
) -> None:
    asked: dict[str, Any] = {"grid": GRID, "cells": cells, "n_tokens": 4, "n_eval": 4}
    compare(name, random_model(architecture), remote, tmp_path, **asked)


def test_the_experiment_that_reads_weights(
    remote: TransformersModel,
    architecture: str,
    random_model: Callable[[str], TransformersModel],
    tmp_path: Path,
) -> None:
    (tmp_path / "identities.txt").write_text("good\nbad\n")
    asked = {"identities": str(tmp_path / "identities.txt"), "n_questions": 2, "layers": "1,3"}
    here = compare("persona_patching", random_model(architecture), remote, tmp_path, **asked)
    # The window of this Mistral does not reach from the last prompt token to the identity.
    assert (float(here.attention_patched.max()) > 0.01) == (architecture != "mistral")


def compare(
    name: str, local: TransformersModel, remote: TransformersModel, folder: Path, **asked: Any
) -> xr.Dataset:
    """Run it here and there, and see that all numbers are the same; gives the local ones."""
    here = pn.run(name, local, store=folder / "h.zarr", **asked)
    there = pn.run(name, remote, store=folder / "t.zarr", **asked)
    assert int(there.completed.sum()) == int(here.completed.sum()) > 0
    for each in set(here.data_vars) - {"seconds"}:
        ours, theirs = here[each].values, there[each].values
        if ours.dtype.kind == "f":
            np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=5e-5, err_msg=str(each))
        else:
            np.testing.assert_array_equal(theirs, ours, err_msg=str(each))
    return here
