"""Workers, which stand in other folders, are told absolute paths, whatever the option is called."""

import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from readme_example import EXAMPLE
from store_writer import plan_of

from persona_nns.cli.commands import main
from persona_nns.declarations.catalog import bundled_experiments, load_experiment
from persona_nns.declarations.options import FileName, NamesFile, absolute

GOLDEN = Path(__file__).parent / "golden" / "qwen2"


@dataclass
class Sent:
    """What `launch` is asked for."""

    model: dict[str, Any]
    settings: dict[str, Any]
    n_threads: int | None


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Sent]:
    """What was sent to workers from a folder with a model, a template and a file."""
    found: list[Sent] = []

    def launch(_experiment: Any, model: Any, settings: Any, *_: Any, n_threads: int | None) -> str:
        found.append(Sent(model, settings, n_threads))
        raise KeyboardInterrupt

    monkeypatch.setattr("persona_nns.runs.workers.launch", launch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").symlink_to(GOLDEN)
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    (tmp_path / "words.txt").write_text("a\n")
    (tmp_path / "plain").write_text("not a template")
    return found


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["persona-nns", "run", *arguments, "--workers", "2"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130


OWN = EXAMPLE.replace(
    "def measure(",
    """from pathlib import Path
from persona_nns.declarations import FileName

def measure(""",
).replace("layers: list[int]", "layers: list[int], words: FileName, more: Path = Path('x'), n: str")


def test_paths_of_shared_options_and_of_ones_own_are_absolute(
    sent: list[Sent], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Path("own.py").write_text(OWN)
    own = ["--words", "words.txt", "--more", "y", "--n", "words.txt"]
    run(monkeypatch, "own.py", "--model", "m", "--grid", "short", "--template", "t.jinja", *own)
    (asked,) = sent
    here = {name: str(tmp_path / name) for name in ("m", "t.jinja", "words.txt")}
    assert asked.model["name"] == here["m"]
    assert asked.model["label"] == "qwen2"
    assert asked.model["template"] == here["t.jinja"]
    assert asked.settings["store"] == str(tmp_path / "stores" / "results.zarr")
    assert asked.settings["words"] == here["words.txt"]
    assert asked.settings["more"] == tmp_path / "y"
    assert asked.settings["n"] == "words.txt"  # a text that is no path


def test_what_is_no_path_stays_as_it_is(sent: list[Sent], monkeypatch: pytest.MonkeyPatch) -> None:
    request = ["persona_patching", "--model", "organism-qwen2", "--template", "plain"]
    more = ["--identities", "~/none.txt", "--questions", "bundled", "--threads", "3"]
    with monkeypatch.context() as patch:
        patch.setattr("persona_nns.runs.request.make_plan", lambda *_, **__: plan_of(1))
        patch.setattr("persona_nns.results.store.check_writable", lambda _: None)
        run(monkeypatch, *request, *more, "--store", "s3://bucket/s.zarr")
    (asked,) = sent
    assert (asked.model["name"], asked.model["template"]) == ("organism-qwen2", "plain")
    assert asked.settings["store"] == "s3://bucket/s.zarr"
    assert asked.settings["identities"] == "~/none.txt"
    assert asked.settings["questions"] == "bundled"
    assert asked.n_threads == 3


def test_a_path_is_known_by_the_type_of_its_option(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").touch()

    def function(
        one: FileName,
        maybe: FileName | None,
        several: list[Annotated[str, NamesFile(("b",))]],
        made: Annotated[str, NamesFile(made=True)],
        text: str,
    ) -> None: ...

    parameters = inspect.signature(function).parameters
    values = {"one": "a", "maybe": None, "several": ["a", "b", "c"], "made": "d", "text": "a"}
    assert absolute(parameters, {**values, "other": "a"}) == {
        "one": str(tmp_path / "a"),
        "maybe": None,
        "several": [str(tmp_path / "a"), "b", "c"],
        "made": str(tmp_path / "d"),
        "text": "a",
        "other": "a",
    }


FILES = {"vector", "responses", "artifacts", "identities", "questions", "output", "roles"}


@pytest.mark.parametrize("name", bundled_experiments())
def test_the_files_of_bundled_experiments_have_the_type(name: str) -> None:
    options = load_experiment(name).options
    for option in FILES & set(options):
        assert "NamesFile" in repr(options[option].annotation), option
