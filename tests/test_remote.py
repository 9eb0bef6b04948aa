"""The same experiment on a server: same files, same numbers, nothing of this machine sent along."""

import json
import pickletools
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import nnsight
import numpy as np
import pytest
import torch
import zarr
import zstandard
from everywhere import (
    CASES,
    HERE_ONLY,
    ON_A_GRID,
    WITHIN_WINDOW,
    Case,
    compare,
    on_grid,
    run_both,
    write_inputs,
)
from nnsight import TransformersModel
from readme_example import EXAMPLE

import persona_nns as pn
from persona_nns.cli.commands import main
from persona_nns.declarations.catalog import bundled_experiments
from persona_nns.models.load import hosted, record_of
from persona_nns.prompts.grids import Grid
from persona_nns.results.groups import open_group
from persona_nns.runs.remote import dispatch
from persona_nns.runs.remote.connection import Patience, client_python
from persona_nns.runs.remote.environment import CRITICAL, Environment
from persona_nns.runs.remote.job_book import read_jobs
from persona_nns.runs.verify import verify_store


@pytest.fixture(scope="module")
def folder(random_folder: Callable[[str], Path]) -> Path:
    """Of the one model that these tests run here and on a server; for Qwen2, see the wheel's."""
    return random_folder("gemma2")


@pytest.fixture(scope="module")
def local(random_model: Callable[[str], TransformersModel]) -> TransformersModel:
    return random_model("gemma2")


@pytest.fixture(scope="module")
def simulated(folder: Path) -> TransformersModel:
    """Client of a simulated server."""
    return pn.load_model(folder, backend="simulate")


@pytest.fixture(scope="module")
def url(simulated: TransformersModel) -> str:
    """Of the simulated server, as if it were anyone's."""
    place = hosted(simulated)
    assert place is not None
    return place.server.url


@pytest.fixture(autouse=True)
def haste(monkeypatch: pytest.MonkeyPatch) -> None:
    patience = Patience(unreachable=20, first=0.05, longest=0.2)
    monkeypatch.setattr(dispatch, "PATIENCE", patience)


# What a frame changes is the prompts, which are the same to all of them.
FRAMED = [
    pytest.param(name, frame, marks=pytest.mark.slow)
    for name in ("localized_positions", "kv_graft")
    for frame in ("system", "later")
]


@pytest.mark.filterwarnings("ignore:Continuations that end before")
@pytest.mark.parametrize(("name", "frame"), [*((name, "role") for name in ON_A_GRID), *FRAMED])
def test_every_experiment_gives_the_same_numbers_there(
    name: str,
    frame: str,
    simulated: TransformersModel,
    local: TransformersModel,
    make_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    options = on_grid(name, frame)
    if name in WITHIN_WINDOW:
        folder = make_folder("gemma2", sliding_window=256)
        local, simulated = pn.load_model(folder), pn.load_model(folder, backend="simulate")
    here, there = run_both(name, local, simulated, tmp_path, **options)
    assert here.attrs["run"] == there.attrs["run"]
    assert int(there.completed.sum()) == 3
    compare(here, there, atol=1e-5)
    if options.get("keep_residuals"):
        group = f"{name}/{here.attrs['run']}/residuals/residuals"
        kept = [open_group(tmp_path / store, "", "r") for store in ("h.zarr", "t.zarr")]
        arrays = [np.asarray(root[group]) for root in kept if root is not None]
        np.testing.assert_allclose(*arrays, rtol=1e-4, atol=1e-5)


def test_gradients_are_asked_of_no_server(simulated: TransformersModel, tmp_path: Path) -> None:
    with pytest.raises(pn.UsageError, match="run there: --rankings effect,attention,random"):
        pn.run("head_budget", simulated, "short", store=tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_experiments_with_inputs_of_their_own_give_the_same_numbers_there(
    case: Case,
    simulated: TransformersModel,
    local: TransformersModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_inputs(local)
    here, there = run_both(case.experiment, local, simulated, tmp_path, **case.options)
    assert bool(there.completed.all())
    compare(here, there, atol=1e-4)
    numbers = [here[each] for each in here.data_vars if here[each].dtype == "f4"]
    assert any(np.isfinite(each).any() for each in numbers) or (here.response.values != "").any()


def test_no_experiment_is_left_out() -> None:
    tried = {*ON_A_GRID, *(case.experiment for case in CASES), *HERE_ONLY}
    assert tried == {*bundled_experiments()}


def test_those_that_train_stay_here(simulated: TransformersModel, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.ones((len(simulated.layers) + 1, simulated.config.hidden_size)))
    options = {"vector": str(tmp_path / "v.npy"), "layer": 2}
    with pytest.raises(pn.UsageError, match="trained on this machine; use the backend 'local'"):
        pn.run("trait_distillation", simulated, store=tmp_path / "s.zarr", **options)
    with pytest.raises(pn.UsageError, match="trained on this machine; use the backend 'local'"):
        pn.run("persona_cartridge", simulated, "short", store=tmp_path / "s.zarr")
    given = {"cartridge": ["c.safetensors"], "store": tmp_path / "s.zarr"}
    with pytest.raises(pn.UsageError, match=r"'c.safetensors' goes with weights .* 'local'"):
        pn.run("kv_graft", simulated, "short", **given)
    assert not (tmp_path / "s.zarr").exists()


def test_jobs_and_bytes_are_noted(simulated: TransformersModel, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    ds = pn.run("localized_positions", simulated, "short", layers="2", store=store)
    run = open_group(store, f"localized_positions/{ds.attrs['run']}", "r")
    assert run is not None
    noted = read_jobs(store, "localized_positions", ds.attrs["run"]).values()
    jobs = sorted(noted, key=lambda job: len(job.units))
    assert [len(job.units) for job in jobs] == [4, 8]  # a first one alone, then what fits
    assert all(0 < job.request_bytes < 1e6 and job.result_bytes > 0 for job in jobs)
    assert [job.checks_names for job in jobs] == [True, False]
    sessions = run["sessions"]
    assert isinstance(sessions, zarr.Group)
    (session,) = (dict(note.attrs) for _, note in sessions.groups())
    assert session["server_versions"] == {name: version(name) for name in CRITICAL}
    assert session["hosted_model"] == "simulated/gemma2"


def test_the_client_holds_no_weights(simulated: TransformersModel) -> None:
    assert not simulated.dispatched
    assert {parameter.device.type for parameter in simulated._module.parameters()} == {"meta"}
    assert record_of(simulated).precision == "float32"


HELPER = """
import functools
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

FACTOR = 3.0

@dataclass(frozen=True)
class Scale:
    factor: float
    names: list[str] = field(default_factory=list)

    @property
    def doubled(self) -> float:
        return 2 * self.factor

@contextmanager
def counted(calls: list):
    calls.append("in")
    yield calls
    calls.append("out")

def twice(function):
    @functools.wraps(function)
    def wrapper(*arguments):
        return 2 * function(*arguments)
    return wrapper

@twice
def scaled(value, scale):
    return value * scale.factor
"""
OWN = '''
"""Everything that an experiment may lean on."""
import xarray as xr
import numpy as np
import helper
from helper import Scale, counted, scaled
from nnsight import TransformersModel, save
from persona_nns import Cell, Variable
from persona_nns.batches import left_pad
from persona_nns.prompts import render_cell
import torch

variables = {"value": Variable("cell", "value"), "text": Variable("cell", "text", kind="text"),
             "count": Variable("cell", "count", kind="int")}

def figure(ds: xr.Dataset) -> xr.Dataset:
    return ds

def measure(model: TransformersModel, cells: list[Cell], *, power: float = 1.0) -> dict:
    calls = []
    rows = [render_cell(model.tokenizer, cell, ("BARE",))["BARE"].ids for cell in cells]
    batch = left_pad(rows, device=model.device)
    with counted(calls):
        with model.trace(batch.tokens, position_ids=batch.position_ids, use_cache=False):
            norm = save(model.layers[1].input[:, -1].norm(dim=-1))
    scale = Scale(helper.FACTOR)
    assert calls == ["in", "out"] and scale.doubled == 6.0 and scale.names == []
    assert helper.Scale(1.0) == Scale(1.0)
    return {"value": scaled(norm, scale) ** power, "text": [cell.label for cell in cells],
            "count": torch.tensor([len(row) for row in rows])}
'''


def test_a_users_file_and_the_files_beside_it_run_there_unchanged(
    simulated: TransformersModel,
    local: TransformersModel,
    small_grid: Grid,
    tmp_path: Path,
) -> None:
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "norms.py").write_text(EXAMPLE)
    try:
        for name in ("own.py", "norms.py"):
            here, there = (
                pn.run(tmp_path / name, model, small_grid, store=tmp_path / f"{place}.zarr")
                for place, model in (("h", local), ("t", simulated))
            )
            for variable in here.drop_vars("seconds").data_vars:
                ours, theirs = here[variable].values, there[variable].values
                if ours.dtype.kind == "f":
                    np.testing.assert_allclose(theirs, ours, rtol=1e-4)
                else:
                    np.testing.assert_array_equal(theirs, ours)
    finally:
        del sys.modules["helper"]


def test_a_request_names_nothing_of_this_machine(
    simulated: TransformersModel,
    small_grid: Grid,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[bytes] = []
    submit = dispatch.Connection.submit

    def listen(self: Any, envelope: Any, payload: bytes) -> str:
        sent.append(zstandard.ZstdDecompressor().decompress(payload))
        return submit(self, envelope, payload)

    monkeypatch.setattr(dispatch.Connection, "submit", listen)
    monkeypatch.setenv("NDIF_API_KEY", "sekret")
    pn.run("localized_positions", simulated, small_grid, store=tmp_path / "s.zarr")
    text = sent[0]
    for secret in (
        b"sekret",
        str(Path.cwd()).encode(),
        str(tmp_path).encode(),
        sys.prefix.encode(),
    ):
        assert secret not in text
    for missing in (b"xarray", b"pydantic", b"zarr"):
        assert missing not in text
    operations = [str(argument) for _, argument, _ in pickletools.genops(text)]
    assert not any("CodeType" in argument for argument in operations)  # source, not bytecode
    assert not any(argument.startswith("persona_nns ") for argument in operations)


def test_a_module_used_as_a_whole_through_another_is_refused(
    simulated: TransformersModel, small_grid: Grid, tmp_path: Path
) -> None:
    whole = EXAMPLE.replace("Variable, left_pad,", "Variable,")
    whole = whole.replace("import torch\n", "import torch\nimport persona_nns\n", 1)
    whole = whole.replace("left_pad(", "persona_nns.tracing.batches.left_pad(")
    (tmp_path / "norms.py").write_text(whole)
    with pytest.raises(
        pn.UsageError, match=r"measure\(\) uses persona_nns.tracing(.batches)? as a whole"
    ):
        pn.run(tmp_path / "norms.py", simulated, small_grid, store=tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()


def test_nnsights_own_client_is_served_on_the_websocket(
    url: str,
    folder: Path,
    local: TransformersModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nnsight.CONFIG.APP, "REMOTE_LOGGING", False)
    model = pn.load_model(folder, backend=url, label="simulated/gemma2")
    ids = torch.tensor([[5, 6, 7]])
    with model.trace(ids, remote=url):
        there = nnsight.save(model.layers[2].output)
    with local.trace(ids):
        here = nnsight.save(local.layers[2].output)
    torch.testing.assert_close(there, here)


def test_a_folder_stands_for_a_hosted_model(
    url: str, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    store = tmp_path / "s.zarr"
    command = ["run", "localized_positions", "--model", str(folder)]
    rest = ["--as", "simulated/gemma2", "--backend", url, "--grid", "short", "--layers", "2"]
    _call([*command, *rest, "--cells", "yoda/haiku", "--store", str(store)])
    assert "Stored in" in capsys.readouterr().out
    ds = pn.open_results(store, "localized_positions")
    assert ds.model.item() == "simulated/gemma2"
    assert ds.precision.item() == "float32"  # as the server told
    (info,) = pn.list_runs(store)
    assert info.attrs["model_source"] == "simulated/gemma2"
    # The next command finds the run without asking what the precision is.
    _call([*command, *rest, "--cells", "yoda/haiku,marx/haiku", "--store", str(store)])
    (info,) = pn.list_runs(store)
    assert info.n_completed == 2
    # It can be verified there, and is left alone where no server is named.
    (verdict,) = verify_store(store, sample=1)
    assert (verdict.state, verdict.n_recomputed) == ("not checked", 0)
    (verdict,) = verify_store(store, sample=1, backend=url)
    assert (verdict.state, verdict.not_checked.count("--model FOLDER")) == ("not checked", 1)
    (verdict,) = verify_store(store, sample=1, backend=url, models=[str(folder)])
    assert (verdict.state, verdict.n_recomputed) == ("right", 1)


def test_a_server_that_changes_its_precision_is_refused(
    url: str, folder: Path, small_grid: Grid, tmp_path: Path
) -> None:
    model = pn.load_model(folder, backend=url, label="simulated/gemma2")
    (tmp_path / "norms.py").write_text(EXAMPLE)
    settings: dict[str, Any] = {"store": tmp_path / "s.zarr"}
    ds = pn.run(tmp_path / "norms.py", model, small_grid, cells="chef/haiku", **settings)
    run = open_group(tmp_path / "s.zarr", f"norms/{ds.attrs['run']}", "a")
    assert run is not None
    run.attrs["precision"] = "bfloat16"
    with pytest.raises(pn.PersonaError, match="in float32 now, and this run was measured in bfl"):
        pn.run(tmp_path / "norms.py", model, small_grid, **settings)


def test_models_lists_what_a_server_hosts(url: str, capsys: Any) -> None:
    _call(["models", "--backend", url])
    printed = capsys.readouterr().out
    assert "simulated/gemma2" in printed
    assert "running" in printed
    assert "Its versions are those here." in printed


def _call(arguments: list[str]) -> None:
    before, sys.argv = sys.argv, ["persona-nns", *arguments]
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = before
    assert ended.value.code == 0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"backend": "cluster"}, "Unknown backend 'cluster'; use local, simulate, ndif, or"),
        ({"backend": "ftp://host"}, "Unknown backend 'ftp://host'"),
        ({"backend": "https://me:word@host"}, "cannot hold a name or password"),
        ({"backend": "ndif", "dtype": "float32"}, "leave out --dtype with the backend 'ndif'"),
        ({"backend": "simulate", "device": "cpu"}, "leave out --device with the backend 'simul"),
        ({"backend": "ndif"}, "add --as org/name"),
        ({"backend": "ndif", "label": "noslash"}, "add --as org/name"),
    ],
)
def test_a_wrong_request_for_a_server(
    folder: Path, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(pn.UsageError, match=sentence):
        pn.load_model(folder, **settings)


def test_another_nnsight_is_refused_and_other_versions_are_told() -> None:
    other = Environment("3.12", {"nnsight": nnsight.__version__, "torch": "2.0.0"})
    (warning,) = other.check("http://host")
    assert "torch 2.0.0 (here 2.13.0: numbers may differ within rounding)" in warning
    assert f"Python 3.12 (here {client_python()}: what can be sent as source" in warning
    assert "nnsight" not in warning
    assert Environment("", {}).check("http://host") == [
        "The server http://host does not say which versions it runs."
    ]
    with pytest.raises(pn.PersonaError, match=r"runs nnsight 0\.7\.1, and here is"):
        Environment("3.11", {"nnsight": "0.7.1"}).check("http://host")


@pytest.mark.parametrize(
    ("theirs", "sentence"),
    [
        ("0.8.0", "requests mean the same; it computes attention its own way, within rounding"),
        ("0.8.0rc1", "requests mean the same; it computes attention its own way, within rounding"),
        ("0.8.3", "requests mean the same"),
    ],
)
def test_the_warning_about_nnsight_says_whether_it_matters(theirs: str, sentence: str) -> None:
    (warning,) = Environment("", {"nnsight": theirs}).check("http://host")
    ours = version("nnsight")
    assert warning.endswith(f"other versions: nnsight {theirs} (here {ours}: {sentence}).")


def test_the_key_of_a_server_is_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    from persona_nns.models.servers import Server, read_backend

    monkeypatch.setenv("NDIF_API_KEY", "sekret")
    monkeypatch.setenv("NDIF_HOST", "https://ndif.example.org/")
    host = read_backend("ndif")
    assert isinstance(host, Server)
    assert host.url == "https://ndif.example.org"
    assert host.headers() == {"ndif-api-key": "sekret"}
    assert "sekret" not in repr(host)


def test_a_simulated_server_gets_no_key(
    simulated: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NDIF_API_KEY", "sekret")
    place = hosted(simulated)
    assert place is not None
    assert place.server.headers() == {}
    answer = httpx.get(f"{place.server.url}/status").json()
    (entry,) = answer["deployments"].values()
    assert json.loads(entry["model_key"].partition(":")[2])["repo_id"] == "simulated/gemma2"
