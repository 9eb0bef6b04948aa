"""Which revision of a hosted model a run is of: the one asked for, and the commit it turned out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer

import persona_nns as pn
from persona_nns.errors import RemoteError
from persona_nns.models.hosting import hosted
from persona_nns.models.records import record_of
from persona_nns.runs.remote import dispatch
from persona_nns.runs.remote.connection import Patience

HASTE = Patience(unreachable=20, news=60, unknown=1, first=0.02, longest=0.1, others=0.5)
OWN = '''
"""A number for each cell, which the server of these tests makes up."""
from persona_nns import Variable

variables = {"value": Variable("cell", "value")}

def measure(model, cells):
    raise AssertionError("measured here")
'''

pytestmark = pytest.mark.filterwarnings("ignore:The server .* does not say which versions")


@pytest.fixture
def folder(random_folder: Callable[[str], Path]) -> Path:
    return random_folder("qwen2")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    monkeypatch.setattr(dispatch, "PATIENCE", HASTE)
    server = FakeServer()
    server.install(monkeypatch)
    return server


def load(folder: Path, revision: str | None = None) -> Any:
    return pn.load_model(
        folder, backend="https://host.invalid", label="tiny/qwen2", revision=revision
    )


def run(folder: Path, model: Any, **asked: Any) -> Any:
    (folder / "own.py").write_text(OWN)
    return pn.run(folder / "own.py", model, "short", store=folder / "s.zarr", **asked)


def test_a_revision_is_asked_for_and_in_the_identity(folder: Path) -> None:
    plain, other = load(folder), load(folder, "v2")
    places = [hosted(model) for model in (plain, other)]
    assert [place is not None and '"revision": "v2"' in place.key for place in places] == [
        False,
        True,
    ]
    assert record_of(other).version == f"{record_of(plain).version} at v2"


def test_runs_of_two_revisions_are_two_runs(
    folder: Path, server: FakeServer, tmp_path: Path
) -> None:
    first = run(tmp_path, load(folder), cells="yoda/haiku")
    second = run(tmp_path, load(folder, "v2"), cells="yoda/haiku")
    assert first.attrs["run"] != second.attrs["run"]
    assert len(server.sent) == 2


def test_a_run_keeps_to_the_commit_it_was_measured_on(
    folder: Path, server: FakeServer, tmp_path: Path
) -> None:
    server.facts = {"revision": "a" * 40}
    done = run(tmp_path, load(folder), cells="yoda/haiku")
    assert done.attrs["server_revision"] == "a" * 40
    server.facts = {"revision": "b" * 40}
    sentence = f"has revision {'b' * 40} of 'tiny/qwen2' now, and this run was measured on aaaa"
    with pytest.raises(RemoteError, match=sentence):
        run(tmp_path, load(folder))
    assert int(pn.open_results(tmp_path / "s.zarr", "own").completed.sum()) == 1
    server.facts = {"revision": "a" * 40}
    assert bool(run(tmp_path, load(folder)).completed.all())


def test_a_revision_of_a_model_that_runs_here_is_refused(folder: Path) -> None:
    with pytest.raises(pn.UsageError, match=r"'v2'.* of a model on a server"):
        pn.load_model(folder, revision="v2")
    with pytest.raises(pn.UsageError, match=r"'v2'.* of a model on a server"):
        pn.load_model(folder, revision="v2", backend="simulate")
