"""The wheel, installed elsewhere, lists and runs every experiment."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from persona_nns.catalog import bundled_experiments
from persona_nns.store import open_results

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
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv" / "bin" / "persona-nns"


def test_it_is_the_wheel_that_runs(installed: Path, tmp_path: Path) -> None:
    where = "import persona_nns; print(persona_nns.__file__)"
    place = _call(installed.with_name("python"), "-c", where, cwd=tmp_path)
    assert place.startswith(str(installed.parents[1]))


def test_it_lists_models_and_runs_experiments(installed: Path, tmp_path: Path) -> None:
    listed = [
        line.split()[0]
        for line in _call(installed, "experiments", cwd=tmp_path).splitlines()
        if not line.startswith(" ")
    ]
    assert listed == sorted(file.stem for file in (ROOT / "experiments").glob("*.py"))
    assert "organism-qwen2" in _call(installed, "models", cwd=tmp_path)
    for name in listed:
        if "--grid" not in _call(installed, "run", name, "--help", cwd=tmp_path):
            continue  # its inputs are options of its own
        request = ["run", name, "--model", GOLDEN, "--grid", "review", "--cells", "doctor/plan"]
        printed = _call(installed, *request, "--store", "s.zarr", cwd=tmp_path)
        assert "Stored in s.zarr" in printed
    (tmp_path / "identities.txt").write_text("good\nbad\n")
    request = ["run", "persona_patching", "--model", "organism-qwen2", "--n-questions", "1"]
    request += ["--identities", "identities.txt", "--store", "s.zarr"]
    assert "Stored in s.zarr" in _call(installed, *request, cwd=tmp_path)


def test_it_brings_the_published_numbers(installed: Path, tmp_path: Path) -> None:
    store = ROOT / "stores" / "published"
    request = ["compare", store, "behavioral_markers", "-o", tmp_path / "out"]
    assert "16 (66.7%)" in _call(installed, *request, cwd=tmp_path)
    where = "from persona_nns.published import published_store; print(published_store())"
    place = _call(installed.with_name("python"), "-c", where, cwd=tmp_path)
    assert place.startswith(str(installed.parents[1]))


ON_A_GRID = [
    name for name, file in bundled_experiments().items() if "\ndef plan(" not in file.read_text()
]
OWN_INPUTS = {"persona_patching": ["--identities", "identities.txt", "--n-questions", "1"]}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "kv_graft" else pytest.mark.slow)
        for name in (*ON_A_GRID, *OWN_INPUTS)
    ],
)
def test_the_wheel_gives_the_same_numbers_on_a_server(
    installed: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "identities.txt").write_text("good\nbad\n")
    model = "organism-qwen2" if name in OWN_INPUTS else GOLDEN
    inputs = OWN_INPUTS.get(name, ["--grid", "review", "--cells", "doctor/plan,chef/arch"])
    opened: list[xr.Dataset] = []
    for backend in ("local", "simulate"):
        store = tmp_path / f"{backend}.zarr"
        request = ["run", name, "--model", model, *inputs, "--backend", backend, "--store", store]
        _call(installed, *request, cwd=tmp_path)
        opened.append(open_results(store, name))
    here, there = opened
    assert int(there.completed.sum()) == (4 if name in OWN_INPUTS else 2)
    for each in set(here.data_vars) - {"seconds"}:
        ours, theirs = here[each].values, there[each].values
        if ours.dtype.kind == "f":
            np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5, err_msg=str(each))
        else:
            np.testing.assert_array_equal(theirs, ours, err_msg=str(each))
