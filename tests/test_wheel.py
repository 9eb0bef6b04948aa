"""The wheel, installed elsewhere, lists every experiment, and runs them here and on a server."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persona_nns.results.reading import open_results

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "qwen2"


def _call(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    answer = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``persona-nns`` of a new environment that holds the wheel, and our dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    _call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, cwd=ROOT)
    (wheel,) = folder.glob("*.whl")
    _call(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    _call(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=folder
    )
    # What the wheel needs is taken from here; an editable install of ours is not, because
    # .pth files are not followed from a .pth file.
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    ours = [place for place in sys.path if Path(place).name == "site-packages"]
    (site / "dependencies.pth").write_text("\n".join(ours) + "\n")
    return folder / "venv" / "bin" / "persona-nns"


def test_it_is_the_wheel_that_runs(installed: Path, tmp_path: Path) -> None:
    where = "import persona_nns; print(persona_nns.__file__)"
    place = _call(installed.with_name("python"), "-c", where, cwd=tmp_path)
    assert place.startswith(str(installed.parents[1]))


# One interpreter for several commands: most of what a command takes is the imports.
COMMANDS = """
import json
import sys

from persona_nns.cli.commands import main

for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as end:
        assert not end.code, (arguments, end.code)
"""


def test_it_lists_models_runs_experiments_and_brings_the_published_numbers(
    installed: Path, tmp_path: Path
) -> None:
    listed = [
        line.split()[0]
        for line in _call(installed, "experiments", cwd=tmp_path).splitlines()
        if not line.startswith(" ")
    ]
    assert listed == sorted(file.stem for file in (ROOT / "experiments").glob("*.py"))
    run = ["run", "localized_positions", "--grid", "review", "--cells", "doctor/plan"]
    commands = [
        ["models"],
        [*run, "--model", str(GOLDEN), "--store", "s.zarr"],
        ["compare", str(ROOT / "stores" / "published"), "behavioral_markers", "-o", "out"],
    ]
    python = installed.with_name("python")
    said = _call(python, "-c", COMMANDS, json.dumps(commands), cwd=tmp_path)
    for words in ("organism-qwen2", "Stored in s.zarr", "16 (66.7%)"):
        assert words in said
    where = "from persona_nns.published.store import published_store; print(published_store())"
    assert _call(python, "-c", where, cwd=tmp_path).startswith(str(installed.parents[1]))


SAME = """
import json
import sys
from pathlib import Path

import numpy as np
import persona_nns as pn

Path("identities.txt").write_text("good\\nbad\\n")
rows = [
    {"pair": 0, "question_id": k, "label": label, "system": f"Be {how}.", "question": "How is it?",
     "response": said}
    for k, said in enumerate(("A fine day.", "It rains and rains."))
    for label, how in (("pos", "glad"), ("neg", "plain"))
]
Path("cheerful.jsonl").write_text("\\n".join(map(json.dumps, rows)))
talk = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "Rain, rain."}]
Path("talks.jsonl").write_text(json.dumps({"messages": talk * 2}))
for backend in ("local", "simulate"):
    for name, source, options in json.loads(sys.argv[1]):
        model = pn.load_model(source, backend=backend)
        width = model.config.hidden_size
        np.save("v.npy", np.random.default_rng(0).normal(size=(len(model.layers) + 1, width)))
        pn.run(name, model, store=f"{backend}.zarr", **options)
"""
GRID = {"grid": "review", "cells": "doctor/plan,chef/arch"}
# Few tokens and bands: what is compared is two places, not two lengths.
FEW: dict[str, dict[str, Any]] = {"attention_knockout": {"n_tokens": 8, "bands": "2,0:3"}}
OWN_INPUTS: dict[str, dict[str, Any]] = {
    "persona_patching": {"identities": "identities.txt", "n_questions": 1},
    "trait_steering": {
        "responses": "cheerful.jsonl",
        "judge": "none",
        "vector": "v.npy",
        "layers": "2",
        "alphas": "0,2",
    },
    "steering_memory": {"vector": "v.npy", "conversations": "talks.jsonl", "alphas": "2"},
}
# One of each kind of inputs: `test_remote` compares all of them, from the checkout.
ELSEWHERE = (
    *("localized_positions", "attention_knockout", "persona_patching"),
    *("trait_steering", "steering_memory"),
)


@pytest.fixture(scope="module")
def both(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel stores here, and with a server."""
    folder = tmp_path_factory.mktemp("both")
    (folder / "same.py").write_text(SAME)
    asked = [
        (name, "organism-qwen2", OWN_INPUTS[name])
        if name in OWN_INPUTS
        else (name, GOLDEN, {**GRID, **FEW.get(name, {})})
        for name in ELSEWHERE
    ]
    _call(installed.with_name("python"), "same.py", json.dumps(asked, default=str), cwd=folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_wheel_gives_the_same_numbers_on_a_server(both: Path, name: str) -> None:
    here, there = (
        open_results(both / f"{backend}.zarr", name) for backend in ("local", "simulate")
    )
    assert bool(there.completed.any())
    np.testing.assert_array_equal(there.completed, here.completed)
    for each in set(here.data_vars) - {"seconds"}:
        ours, theirs = here[each].values, there[each].values
        if ours.dtype.kind == "f":
            np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5, err_msg=str(each))
        else:
            np.testing.assert_array_equal(theirs, ours, err_msg=str(each))
