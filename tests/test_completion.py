"""The tab key as shells ask for it: in a process of its own, by the protocol, and in bash."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from store_writer import block_of, write_all

from persona_nns.cli import completion
from persona_nns.cli.arguments import FETCHED
from persona_nns.cli.experiment_commands import ExperimentCommands
from persona_nns.models.fetched import fetched_models
from persona_nns.results.allocation import attach

PROGRAM = Path(sys.executable).with_name("persona-nns")
HEAVY = ("torch", "transformers", "zarr", "xarray", "pandas", "numpy")


def completed(*words: str, cwd: Path | None = None) -> list[str]:
    """What bash is told of a line whose last word is being written."""
    line = " ".join(["persona-nns", *words])
    environment = {
        **os.environ,
        "_PERSONA_NNS_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words)),
    }
    answer = subprocess.run([PROGRAM], env=environment, capture_output=True, text=True, cwd=cwd)
    assert answer.returncode in (0, 1), answer.stderr
    assert not answer.stderr
    return answer.stdout.split()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completion") / "s.zarr"
    write_all(folder, 2, 2, identity="one")
    write_all(folder, 2, 2, identity="two")
    attach(folder, block_of(2, "two")).say({"name": "mine"})
    return folder


def test_commands_experiments_options_and_models() -> None:
    assert {"run", "export", "rm", "merge", "push", "show"} <= set(completed(""))
    assert completed("run", "localized") == ["localized_positions"]
    assert completed("run", "kv_graft", "--lay") == ["--layers", "--layer-sets"]
    assert completed("run", "kv_graft", "--graf") == ["--grafts"]
    assert completed("run", "kv_graft", "--model", "organism") == [
        "organism-qwen2",
        "organism-gemma2",
    ]
    assert "short-zh" in completed("run", "kv_graft", "--grid", "short")


def test_runs_and_variables_of_a_store_on_the_line(store: Path) -> None:
    s = str(store)
    assert completed("show", s, "") == ["e"]
    assert completed("show", s, "e", "--run", "") == ["m.g.one", "m.g.two", "mine", "latest"]
    assert completed("show", s, "e", "--variable", "") == ["kl", "n_eval", "text", "hit"]
    assert completed("show", s, "e", "--variable", "k") == ["kl"]
    assert completed("export", s, "e/m.g.o") == ["e/m.g.one"]
    assert completed("export", s, "e/m.g.one", "--variable", "h") == ["hit"]
    assert completed("rm", s, "e/") == ["e/m.g.one", "e/m.g.two"]
    assert completed("merge", "other.zarr", s, "--run", "mi") == ["mine"]
    assert completed("push", s, "hf://datasets/a/b", "--run", "m.g.t") == ["m.g.two"]
    assert completed("show", "s3://bucket/s.zarr", "loc") == ["localized_positions"]
    assert completed("show", str(store / "nothing"), "e", "--run", "") == []


def test_a_store_with_damaged_metadata_is_completed_all_the_same(store: Path) -> None:
    damaged = store / "e" / "cut" / "zarr.json"
    damaged.parent.mkdir()
    damaged.write_text('{"node_')
    given = {"store": str(store), "experiment": "e"}
    context: Any = SimpleNamespace(params=given, args=[], command=SimpleNamespace(params=[]))
    assert completion.run_names(context, "m.") == ["m.g.one", "m.g.two"]
    shutil.rmtree(damaged.parent)


def test_nothing_heavy_is_imported(store: Path) -> None:
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('heavy', *sorted({{*{HEAVY!r}}} & {{*sys.modules}})))\n"
        "sys.argv[0] = 'persona-nns'\n"
        "from persona_nns.cli import main; main()"
    )
    lines = ("run kv_graft --", "run ", f"show {store} e --run ", f"export {store} ")
    for line in lines:
        environment = {
            **os.environ,
            "_PERSONA_NNS_COMPLETE": "complete_zsh",
            "_TYPER_COMPLETE_ARGS": f"persona-nns {line}",
        }
        command = [sys.executable, "-c", code]
        answer = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert answer.stdout.endswith("heavy\n"), answer.stdout + answer.stderr
        assert answer.stdout.count("\n") > 1


def test_names_that_are_written_down_twice_agree() -> None:
    assert FETCHED.split(", ") == list(fetched_models())


def test_the_options_of_a_file_of_ones_own_are_completed(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text('"""Own."""\n\n\ndef measure(model, cells, *, some_thing: int = 1): ...\n')
    command = completion.quick_command(str(file))
    assert "--some-thing" in {option for each in command.params for option in each.opts}
    assert command.help == "Own."
    assert completion.quick_command("no such file").params
    context: Any = SimpleNamespace(resilient_parsing=True)
    assert ExperimentCommands().get_command(context, str(file)).name == str(file)


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_itself_completes_a_line(tmp_path: Path) -> None:
    """What pressing the key calls in it, with the script that is installed."""
    script = subprocess.run(
        [PROGRAM],
        env={**os.environ, "_PERSONA_NNS_COMPLETE": "source_bash"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (tmp_path / "completion.sh").write_text(script)
    typed = (
        f"source {tmp_path}/completion.sh\n"
        "COMP_WORDS=(persona-nns run localized); COMP_CWORD=2\n"
        "_persona_nns_completion persona-nns localized run\n"
        'echo "told ${COMPREPLY[*]}"\n'
        "complete -p persona-nns\n"
    )
    environment = {**os.environ, "PATH": f"{PROGRAM.parent}:{os.environ['PATH']}"}
    answer = subprocess.run(
        ["bash", "--norc"], input=typed, env=environment, capture_output=True, text=True
    )
    assert "told localized_positions\n" in answer.stdout
    assert "-F _persona_nns_completion persona-nns" in answer.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts_are_shown(shell: str) -> None:
    answer = subprocess.run(
        [PROGRAM, "--show-completion", shell],
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0
    assert "_PERSONA_NNS_COMPLETE" in answer.stdout
