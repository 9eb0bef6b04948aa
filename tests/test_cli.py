"""The command line as a person uses it: what it prints, what it leaves, how it exits."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from readme_example import EXAMPLE
from rich.console import Console

import persona_nns as pn
from persona_nns.cli import terminal
from persona_nns.cli.commands import main

GOLDEN = Path(__file__).parent / "golden"
GRID = """
[personas]
baseline = "a thoughtful person"
yoda = "Yoda"
chef = "a head chef"
[tasks]
baseline = "Give advice."
haiku = "Write a haiku about Monday mornings."
"""

OWN_FIGURE = """

def mine(results):
    from persona_nns.figures import lines_by_layer

    return lines_by_layer(results, ["norm_ratio"])


figures = {"mine": mine}
"""

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    """Run ``persona-nns …`` in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(terminal, "out", Console(width=200))
    monkeypatch.setattr(terminal, "err", Console(width=200, stderr=True))

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["persona-nns", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        code = stop.value.code
        return (code if isinstance(code, int) else 0), printed.out, printed.err

    return call


@pytest.fixture
def grid_file(tmp_path: Path) -> str:
    (tmp_path / "mine.toml").write_text(GRID)
    return "mine.toml"


def test_a_run_is_stored_shown_listed_and_drawn(command: Command, grid_file: str) -> None:
    model = str(GOLDEN / "qwen2")
    request = ["run", "localized_positions", "--model", model, "--grid", grid_file]
    code, out, err = command(*request, "--layers", "2,4", "--store", "s.zarr")
    assert code == 0
    assert "error" not in err
    assert "qwen2 · mine: batch 1 of 1, 2 of 2 cells" in err
    assert "causal KL in nat" in out
    assert "Stored in s.zarr: qwen2.mine." in out

    results = pn.open_results("s.zarr", "localized_positions")
    median = float(results.kl.sel(layer=4, position="p_last").median())
    code, out, _ = command("show", "s.zarr", "localized_positions", "--variable", "kl")
    assert code == 0
    assert f"{median:.3f} [" in out

    code, out, _ = command("ls", "s.zarr")
    assert code == 0
    assert results.attrs["run"] in out
    assert "2/2" in out
    assert "kB" in out
    assert "float32, layers=" in out
    code, out, _ = command("verify", "s.zarr", "--sample", "1")
    assert code == 0
    assert "right  localized_positions/qwen2.mine." in out
    assert "2/2 cells, 1 computed anew" in out

    code, out, _ = command("plot", "s.zarr", "localized_positions", "-o", "figure.png")
    assert code == 0
    assert out.split() == [
        "figure.png",
        "figure-cosines_by_layer.png",
        "figure-norm.png",
        "figure-kl_by_persona.png",
        "figure-kl_by_task.png",
    ]
    assert all(Path(name).stat().st_size > 5000 for name in out.split())


def test_a_users_own_file_runs_and_is_drawn(command: Command, grid_file: str) -> None:
    Path("my_experiment.py").write_text(EXAMPLE)
    request = ["run", "my_experiment.py", "--model", str(GOLDEN / "qwen2"), "--grid", grid_file]
    code, _, err = command(*request, "--store", "s.zarr")
    assert code == 0
    assert "qwen2 · mine: 2 cells" in err
    ratio = pn.open_results("s.zarr", "my_experiment").norm_ratio
    assert ratio.sizes == {"model": 1, "cell": 2, "layer": 6}
    assert ratio.sel(layer=0).values.ravel().tolist() == [1.0, 1.0]  # one token, one embedding
    assert float(abs(ratio.sel(layer=5) - 1).max()) > 0.01
    code, out, _ = command("plot", "s.zarr", "my_experiment.py")
    assert code == 0
    (run,) = pn.list_runs("s.zarr")
    assert f"my_experiment-{run.run}-norm_ratio_by_layer.pdf" in out
    Path("my_experiment.py").write_text(EXAMPLE + OWN_FIGURE)  # drawn as the file says now
    code, out, _ = command("plot", "s.zarr", "my_experiment")
    assert code == 0
    assert f"my_experiment-{run.run}-mine.pdf" in out
    Path("my_experiment.py").unlink()
    code, out, _ = command("plot", "s.zarr", "my_experiment")
    assert code == 0
    assert f"my_experiment-{run.run}-norm_ratio_by_layer.pdf" in out


def test_experiments_and_models_are_listed(command: Command) -> None:
    code, out, _ = command("experiments")
    assert code == 0
    assert "localized_positions" in out
    assert "Where do persona and task add up?" in out
    code, out, _ = command("models")
    assert code == 0
    assert "organism-qwen2" in out
    assert "Qwen2ForCausalLM" in out


def test_help_shows_the_options_an_experiment_has(command: Command) -> None:
    code, out, _ = command("run", "localized_positions", "--help")
    assert code == 0
    for option in ("--layers", "--positions", "--n-eval", "--as", "--template", "--store"):
        assert option in out
    wrapped = " ".join(out.replace("│", " ").split())
    assert "reference tokens that the KL is summed over" in wrapped


BASE = ["--model", str(GOLDEN / "qwen2"), "--grid", "short"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "additivity", *BASE], "Unknown experiment 'additivity'"),
        (["run", "none.py", *BASE], "'none.py' does not exist"),
        (["run", "localized_positions", "--model", "gpt17", "--grid", "short"], "Unknown model"),
        (["run", "localized_positions", "--model", str(GOLDEN), "--grid", "short"], "no config"),
        (["run", "localized_positions", *BASE, "--layers", "6"], "Layer 6 is out of range"),
        (["run", "localized_positions", *BASE, "--positions", "q"], "Unknown position 'q'"),
        (["run", "localized_positions", *BASE, "--cells", "yoda"], "has no cell 'yoda'"),
        (["run", "localized_positions", *BASE, "--dtype", "float16"], "float16 overflows"),
        (["run", "localized_positions", *BASE, "--dtype", "int8"], "Unknown dtype 'int8'"),
        (["run", "localized_positions", *BASE, "--device", "abacus"], "device 'abacus'"),
        (["run", "localized_positions", *BASE, "--backend", "cloud"], "Unknown backend 'cloud'"),
        (["run", "localized_positions", *BASE, "--template", "no.jinja"], "cannot be read"),
        (["run", "localized_positions", *BASE, *BASE[:2]], "Two models have the label 'qwen2'"),
        (["run", "localized_positions", *BASE, "--as", "a", "--as", "b"], "use --as once a model"),
        (["run", "localized_positions", *BASE[:2], "--grid", "tiny"], "Unknown grid 'tiny'"),
        (["run", "localized_positions", *BASE[:2], "--grid", "no.toml"], "cannot be read"),
        (["show", "none.zarr", "localized_positions"], "no Zarr store at 'none.zarr'"),
        (["plot", "none.zarr", "localized_positions", "-o", "f.txt"], "figure format"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_leaves_nothing(
    command: Command, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    if arguments[0] == "run":
        arguments = [*arguments, "--store", "s.zarr"]
    code, out, err = command(*arguments)
    assert code == 2
    assert out == ""
    assert sentence in err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_grid_without_baseline_or_with_an_empty_persona_is_refused(
    command: Command, tmp_path: Path
) -> None:
    for text, sentence in (
        (GRID.replace('baseline = "a thoughtful person"', ""), "no entry called 'baseline'"),
        (GRID.replace('"Yoda"', '" "'), "personas.yoda"),
    ):
        (tmp_path / "bad.toml").write_text(text)
        request = ["run", "localized_positions", *BASE[:2], "--grid", "bad.toml"]
        code, _, err = command(*request, "--store", "s.zarr")
        assert code == 2
        assert sentence in err
        assert not (tmp_path / "s.zarr").exists()


def test_a_model_without_a_chat_template_asks_for_one(
    command: Command, tmp_path: Path, make_folder: Callable[..., Path]
) -> None:
    folder = make_folder("llama")
    (folder / "chat_template.jinja").unlink()
    request = ["run", "localized_positions", "--model", str(folder), "--grid", "short"]
    code, _, err = command(*request, "--store", "s.zarr")
    assert code == 2
    assert "has no chat template" in err
    assert "--template plain" in err
    assert not (tmp_path / "s.zarr").exists()
    code, _, err = command(
        *request, "--store", "s.zarr", "--template", "plain", "--cells", "yoda/haiku"
    )
    assert code == 0


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of folders")
def test_an_unwritable_store_is_refused_before_anything_is_computed(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = command("run", "localized_positions", *BASE, "--store", "file/s.zarr")
    assert code == 2
    assert "'file/s.zarr' cannot be written" in err


def test_debug_shows_the_traceback(command: Command) -> None:
    code, _, err = command("run", "localized_positions", *BASE, "--layers", "9", "--debug")
    assert code == 2
    assert "Traceback" in err


CELLS = "buffett/policy,angelou/haiku"
OWN = """
\"\"\"Kinds of variables.\"\"\"
import torch
from persona_nns import Variable
variables = {
    "count": Variable("cell", "letters", kind="int"),
    "long": Variable("cell", "is long", kind="bool"),
    "text": Variable("cell", "name", kind="text"),
}
def measure(model, cells):
    count = torch.tensor([len(cell.persona) - 1 for cell in cells])
    return {"count": count, "long": count > 4, "text": [f"[{c.persona}]" for c in cells]}
"""


def test_counts_shares_and_texts_are_shown(command: Command) -> None:
    Path("kinds.py").write_text(OWN)
    code, out, _ = command(
        "run", "kinds.py", *BASE, "--store", "x[/b] y.zarr", "--as", "*[m]", "--cells", CELLS
    )
    assert code == 0
    assert "letters" in out
    assert "6.000 [6.000,6.000]" in out  # yoda was not asked for
    assert "persona-nns show 'x[/b] y.zarr' kinds" in out
    code, out, _ = command("show", "x[/b] y.zarr", "kinds")
    assert "100.0 %" in out
    assert "*[m]" in out
    code, out, _ = command("show", "x[/b] y.zarr", "kinds", "--variable", "text")
    assert (code, out.count("[angelou]"), out.count("[yoda]")) == (0, 1, 0)
    code, out, _ = command("ls", "x[/b] y.zarr")
    assert "*[m].short." in out


def test_the_last_model_is_checked_before_the_first_one_runs(
    command: Command, tmp_path: Path, make_folder: Callable[..., Path]
) -> None:
    folder = make_folder("llama")  # 5 layers, where the golden model has 6
    request = ["run", "localized_positions", *BASE, "--model", str(folder), "--layers", "5"]
    code, _, err = command(*request, "--store", "s.zarr")
    assert code == 2
    assert "Layer 5 is out of range: the model has layers 0 to 4" in err
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "localized_positions", "--grid", "short"], "Missing option '--model'"),
        (["run", "localized_positions", *BASE, "--layer", "2"], "No such option"),
        (
            ["run", "localized_positions", *BASE, "--batch-size", "0"],
            "Invalid value for '--batch-size'",
        ),
        (["run", "localized_positions", *BASE, "--n-eval", "0"], "greater than or equal to 1"),
        (["run", "localized_positions", *BASE, "--as", " "], "label of the model is empty"),
        (["shew"], "No such command 'shew'"),
    ],
)
def test_a_wrong_option_is_one_sentence(
    command: Command, arguments: list[str], sentence: str
) -> None:
    code, _, err = command(*arguments)
    assert code == 2
    assert sentence in err
    assert len(err.strip().splitlines()) == 1


def test_one_grid_under_two_names_is_one_result_and_can_be_drawn(
    command: Command, grid_file: str, make_folder: Callable[..., Path]
) -> None:
    Path("copy.toml").write_text(Path(grid_file).read_text())
    Path("norms.py").write_text(EXAMPLE)
    for model, grid in (
        (str(GOLDEN / "qwen2"), grid_file),
        (str(make_folder("llama")), "copy.toml"),
    ):
        request = ["run", "norms.py", "--model", model, "--grid", grid]
        assert command(*request, "--store", "s.zarr")[0] == 0
    request = ["run", "norms.py", *BASE[:2], "--grid", "copy.toml"]
    assert command(*request, "--store", "s.zarr")[0] == 0
    assert len(pn.list_runs("s.zarr")) == 2
    code, out, err = command("plot", "s.zarr", "norms.py")
    assert (code, err) == (0, "")
    assert "norms-qwen2+llama" in out
    for info in pn.list_runs("s.zarr"):  # each has files of its own
        assert f"norms-{info.run}-" in command("plot", "s.zarr", "norms", "--run", info.run)[1]
    assert len(list(Path().glob("*-norm_ratio_by_layer.png"))) == 3
