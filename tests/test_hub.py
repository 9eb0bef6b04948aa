"""Stores on the Hugging Face hub: its own client, over HTTP, with a stand-in on loopback."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import xarray as xr
import zarr
from hub_standin import TOKEN, Hub, standing_in
from huggingface_hub import HfFileSystem, close_session, constants
from rich.console import Console
from store_writer import block_of, values_are_right, write_all

from persona_nns.cli import main, terminal
from persona_nns.results.allocation import attach
from persona_nns.results.hub import _dataset_of
from persona_nns.results.locations import hub_reason
from persona_nns.results.merging import merge_stores
from persona_nns.results.public import for_everybody
from persona_nns.results.reading import list_runs, open_results

PROGRAM = Path(sys.executable).with_name("persona-nns")
DATASET = "hf://datasets/me/personas"


@dataclass(frozen=True)
class Answer:
    returncode: int
    stdout: str
    stderr: str


Call = Callable[..., Answer]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with standing_in() as hub:
        yield hub


@pytest.fixture
def process(hub: Hub, tmp_path: Path) -> Call:
    """A command line, or a program (``-c``), that knows the stand-in as the hub."""

    def call(*words: str) -> Answer:
        told = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
        }
        command = [sys.executable] if words[0] == "-c" else [str(PROGRAM)]
        answer = subprocess.run([*command, *words], env=told, capture_output=True, text=True)
        return Answer(answer.returncode, answer.stdout, answer.stderr)

    return call


@pytest.fixture
def call(
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Call]:
    """A command line in this process, which is quicker, told the same."""
    monkeypatch.setattr(terminal, "out", Console(width=200))
    monkeypatch.setattr(terminal, "err", Console(width=200, stderr=True))

    def call(*words: str, **environment: str) -> Answer:
        endpoint = environment.get("HF_ENDPOINT", hub.url)
        there = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", there)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", "HF_HUB_OFFLINE" in environment)
        monkeypatch.setenv("HF_TOKEN", environment.get("HF_TOKEN", TOKEN))
        monkeypatch.setattr(sys, "argv", ["persona-nns", *words])
        HfFileSystem.clear_instance_cache()
        close_session()
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        code = stop.value.code
        return Answer(code if isinstance(code, int) else 0, printed.out, printed.err)

    yield call
    HfFileSystem.clear_instance_cache()
    close_session()


def on_hub(hub: Hub, folder: Path) -> Path:
    """What a dataset of the stand-in holds, as files here."""
    for path, content in hub.files("me/personas").items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def test_a_store_is_pushed_in_one_commit_read_there_and_grows(
    hub: Hub, process: Call, call: Call, tmp_path: Path
) -> None:
    store = str(tmp_path / "s.zarr")
    write_all(store, 2, 2)
    refused = call("push", store, DATASET)
    assert refused.returncode == 1
    assert "create it with --create private or --create public" in refused.stderr
    assert hub.datasets == {}

    pushed = process("push", store, DATASET, "--create", "private")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.endswith(f"In {DATASET}/s.zarr\n")
    assert hub.datasets["me/personas"].private
    assert hub.datasets["me/personas"].messages == ["initial commit", "1 runs of persona_nns"]

    listed = call("ls", f"{DATASET}/s.zarr")
    assert "m.g.i" in listed.stdout
    assert "2/2" in listed.stdout
    code = (
        "import sys, persona_nns as pn\n"
        "ds = pn.open_results(sys.argv[1], 'e')\n"
        "ds.to_netcdf(sys.argv[2])"
    )
    opened = process("-c", code, f"{DATASET}/s.zarr", str(tmp_path / "there.nc"))
    assert opened.returncode == 0, opened.stderr
    with xr.open_dataset(tmp_path / "there.nc") as there:
        xr.testing.assert_equal(there.load(), open_results(store, "e"))

    again = call("push", store, DATASET)
    assert again.returncode == 0, again.stderr
    assert len(hub.datasets["me/personas"].messages) == 2  # nothing was new
    files = dict(hub.files("me/personas"))
    write_all(store, 3, 2, identity="two")
    grown = call("push", store, f"{DATASET}/s.zarr", "--run", "latest")
    assert grown.returncode == 0, grown.stderr
    assert len(hub.datasets["me/personas"].messages) == 3
    assert files.items() <= hub.files("me/personas").items()

    merged = call("merge", str(tmp_path / "back.zarr"), f"{DATASET}/s.zarr")
    assert merged.returncode == 0, merged.stderr
    for run in ("m.g.i", "m.g.two"):
        back = open_results(tmp_path / "back.zarr", "e", run=run)
        assert values_are_right(back)
        assert back.completed.all()

    removed = call("rm", f"{DATASET}/s.zarr", "e/m.g.i", "--yes")
    assert removed.returncode == 0, removed.stderr
    assert [info.run for info in list_runs(on_hub(hub, tmp_path / "now") / "s.zarr")] == ["m.g.two"]


def test_a_store_in_blocks_is_pushed_without_its_locks(
    hub: Hub, call: Call, tmp_path: Path
) -> None:
    write_all(tmp_path / "s.zarr", 5, 2, per_chunk=2)
    write_all(tmp_path / "s.zarr", 3, 2, identity="two", per_chunk=2)
    first = call("push", str(tmp_path / "s.zarr"), DATASET, "--create", "public", "--run", "m.g.i")
    assert first.returncode == 0, first.stderr
    second = call("push", str(tmp_path / "s.zarr"), DATASET)
    assert second.returncode == 0, second.stderr
    assert list(tmp_path.rglob("*.lock"))
    there = on_hub(hub, tmp_path / "there")
    assert not list(there.rglob("*.lock"))
    for run, n_cells in (("m.g.i", 5), ("m.g.two", 3)):
        back = open_results(there / "s.zarr", "e", run=run)
        assert values_are_right(back)
        assert int(back.completed.sum()) == n_cells


def test_other_numbers_there_are_refused_and_nothing_is_sent(
    hub: Hub, call: Call, tmp_path: Path
) -> None:
    write_all(tmp_path / "s.zarr", 2, 2)
    assert call("push", str(tmp_path / "s.zarr"), DATASET, "--create", "public").returncode == 0
    zarr.open_group(str(tmp_path / "s.zarr" / "e" / "m.g.i"))["kl"][0, 0, 0, 0] = 5  # type: ignore[index]
    write_all(tmp_path / "s.zarr", 2, 2, identity="new")
    refused = call("push", str(tmp_path / "s.zarr"), DATASET)
    assert refused.returncode == 1
    assert "'kl' of the cell 'p000/t' is 5.0 there and 0.25 in the target" in refused.stderr
    assert len(hub.datasets["me/personas"].messages) == 2


def test_the_card_says_what_is_in_it_and_is_written_once(
    hub: Hub, call: Call, tmp_path: Path
) -> None:
    write_all(tmp_path / "s.zarr", 2, 2)
    call("push", str(tmp_path / "s.zarr"), DATASET, "--create", "public")
    card = hub.files("me/personas")["README.md"].decode()
    assert card.startswith("---\npretty_name: personas\n")
    assert f'ds = pn.open_results("{DATASET}/s.zarr", "e")' in card
    assert "| e | m | g | 2/2 cells | 1 |" in card
    assert "\nlicense" not in card
    dataset = hub.datasets["me/personas"]
    dataset.commit({**hub.files("me/personas"), "README.md": b"mine"}, "a card of my own")
    write_all(tmp_path / "s.zarr", 2, 2, identity="new")
    call("push", str(tmp_path / "s.zarr"), DATASET)
    assert hub.files("me/personas")["README.md"] == b"mine"
    assert len(dataset.messages) == 4


def test_a_commit_of_somebody_else_meanwhile_is_not_overwritten(
    hub: Hub, call: Call, tmp_path: Path
) -> None:
    write_all(tmp_path / "s.zarr", 2, 2)
    call("push", str(tmp_path / "s.zarr"), DATASET, "--create", "public")
    write_all(tmp_path / "s.zarr", 2, 2, identity="new")
    dataset = hub.datasets["me/personas"]

    def somebody_else() -> None:
        dataset.commit({**hub.files("me/personas"), "other": b"1"}, "somebody else's")

    hub.before_commit.append(somebody_else)
    refused = call("push", str(tmp_path / "s.zarr"), DATASET)
    assert refused.returncode == 1
    assert "somebody has changed it meanwhile; push again" in refused.stderr
    assert dataset.messages[-1] == "somebody else's"
    assert call("push", str(tmp_path / "s.zarr"), DATASET).returncode == 0
    assert {"other", "s.zarr/e/m.g.new/zarr.json"} <= hub.files("me/personas").keys()


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (("ls", f"{DATASET}/s.zarr"), {}, "There is no Zarr store at .* (or it is private: `hf au"),
        (("push", "{store}", DATASET), {"HF_TOKEN": ""}, "or it is private; create it with"),
        (
            ("push", "{store}", DATASET, "--create", "public"),
            {"HF_TOKEN": ""},
            "the hub wants to know who you are; log in with `hf auth login`, or set HF_TOKEN",
        ),
        (("push", "{store}", DATASET), {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
        (("ls", f"{DATASET}/s.zarr"), {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
        (("push", "{store}", DATASET), {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set; unset it"),
        (("push", "{store}", "hf://me/model"), {}, "is no dataset of the hub; write hf://datasets"),
        (("push", "{store}", DATASET + "@old"), {}, "or it is private"),
    ],
)
def test_what_goes_wrong_is_one_sentence(
    call: Call, tmp_path: Path, words: tuple[str, ...], environment: dict[str, str], said: str
) -> None:
    write_all(tmp_path / "s.zarr", 1, 1)
    store = str(tmp_path / "s.zarr")
    answer = call(*(word.replace("{store}", store) for word in words), **environment)
    assert answer.returncode in (1, 2)
    (line,) = [line for line in answer.stderr.splitlines() if line.startswith("error:")]
    for part in said.split(" .* "):
        assert part in line
    assert "Traceback" not in answer.stderr


def test_what_names_this_machine_does_not_leave_it(hub: Hub, call: Call, tmp_path: Path) -> None:
    store, home = tmp_path / "s.zarr", "/home/anna/secret-project"
    block = block_of(1)
    private = {
        "file": f"{home}/lens.py",
        "model_source": f"{home}/my-model",
        "vector_source": "~anna/v.zarr",
        "plan_options": {"responses": f"{home}/r.jsonl", "n": 3},
        "judge": ["https://anna:hunter2@judge.example/v1?key=hunter2", "x"],
        "personas": {"path": "/think about it"},
    }
    group = attach(store, replace(block, attrs={**block.attrs, **private}))
    write_all(store, 1, 1)
    group.note("sessions", "s", {"host": socket.gethostname(), "process": 1, "python": "3.11"})
    group.note("jobs", "j", {"id": "job-1", "host": "http://10.0.0.3", "state": "waiting"})
    assert call("push", str(store), DATASET, "--create", "public").returncode == 0
    sent = b"\n".join(hub.files("me/personas").values()).decode(errors="replace")
    for secret in ("anna", "secret-project", "hunter2", "10.0.0.3", '"host"', '"process"'):
        assert secret not in sent
    attrs = json.loads(hub.files("me/personas")["s.zarr/e/m.g.i/zarr.json"])["attributes"]
    assert (attrs["file"], attrs["model_source"]) == ("lens.py", "my-model")
    assert attrs["plan_options"] == {"responses": "r.jsonl", "n": 3}
    assert attrs["judge"] == ["https://judge.example/v1", "x"]
    assert attrs["personas"] == private["personas"]
    assert attrs["identity"] == "i"
    merge_stores(tmp_path / "kept.zarr", store)  # a merge keeps what it finds
    assert list_runs(tmp_path / "kept.zarr")[0].attrs["file"] == private["file"]


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ("/home/anna/v.pt", "v.pt"),
        ("/home/anna/folder/", "folder"),
        ("file:///home/anna/v.pt", "v.pt"),
        ("C:\\Users\\anna\\v.pt", "v.pt"),
        ("~/v.pt", "v.pt"),
        ("docs/identities.txt", "docs/identities.txt"),
        ("organism-qwen2", "organism-qwen2"),
        ("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"),
        ("s3://bucket/s.zarr", "s3://bucket/s.zarr"),
        ("http://u:p@h:8/v1?k=1#f", "http://h:8/v1"),
        ("4/7 of it", "4/7 of it"),
        (3, 3),
    ],
)
def test_paths_and_keys_in_attributes(value: object, plain: object) -> None:
    assert for_everybody({"option": value, "many": [{"of": value}]}) == {
        "option": plain,
        "many": [{"of": plain}],
    }


def test_addresses_of_datasets() -> None:
    there = _dataset_of("hf://datasets/me/x@refs%2Fpr%2F1/a/b.zarr/")
    assert (there.repo, there.revision, there.folder) == ("me/x", "refs/pr/1", "a/b.zarr")
    assert there.address == "hf://datasets/me/x@refs%2Fpr%2F1/a/b.zarr"
    assert _dataset_of("hf://datasets/me/x").folder == ""


def test_an_error_of_another_kind_is_its_first_line() -> None:
    assert hub_reason(ValueError("this\nand that")) == "this."
