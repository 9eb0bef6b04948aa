"""``export``, ``rm``, ``merge``, ``push`` on the command line, and the guide that shows them."""

import os
import pty
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import xarray as xr
from store_writer import values_are_right, write_all
from test_cli import Command, command
from test_merging import write

from persona_nns.results.reading import list_runs, open_results

_ = command  # a fixture
GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "share.md"
PROGRAM = Path(sys.executable).with_name("persona-nns")


def test_a_run_is_exported_by_its_name(command: Command, tmp_path: Path) -> None:
    write(tmp_path / "s.zarr", [0, 1], name="mine")
    code, out, _ = command("export", "s.zarr", "mine", "-o", "t.csv", "--variable", "kl")
    assert (code, out.splitlines()) == (0, ["t.csv", "t-columns.csv"])
    assert len(pd.read_csv("t.csv")) == 2 * 2 * 2
    code, out, _ = command("export", "s.zarr", "e", "-o", "t.nc")
    assert (code, out) == (0, "t.nc\n")
    with xr.open_dataset("t.nc") as back:
        xr.testing.assert_equal(back.load(), open_results("s.zarr", "e"))
    code, _, err = command("export", "s.zarr", "other", "-o", "t.csv")
    assert code == 2
    assert err == "error: There is no run 'other' in 's.zarr'; there are: e/m.g.i.\n"


def test_a_run_is_removed_where_somebody_says_so(command: Command, tmp_path: Path) -> None:
    group = write(tmp_path / "s.zarr", [0, 1])
    group.note("sessions", "s", {"host": "elsewhere", "process": 7})
    code, _, err = command("rm", "s.zarr", "e/m.g.i")
    assert code == 2
    assert "no terminal to ask at; --yes" in err
    assert "Not known to have ended: process 7 on elsewhere" in err
    code, _, err = command("rm", "s.zarr", "m.g", "--yes")
    assert code == 2
    assert len(list_runs("s.zarr")) == 1
    code, out, _ = command("rm", "s.zarr", "m.g.i", "--yes")
    assert (code, out) == (0, "Removed: e/m.g.i\n")
    assert list_runs("s.zarr") == []


def test_what_a_removal_that_was_cut_off_left_is_removed(command: Command, tmp_path: Path) -> None:
    write(tmp_path / "s.zarr", [0, 1])
    (tmp_path / "s.zarr" / "e" / "m.g.i" / "completed" / "zarr.json").unlink()
    assert list_runs("s.zarr") == []
    code, out, _ = command("rm", "s.zarr", "e/m.g.i", "-y")
    assert (code, out) == (0, "Removed: e/m.g.i\n")
    assert not (tmp_path / "s.zarr" / "e" / "m.g.i").exists()
    assert command("rm", "s.zarr", "e/m.g.i", "-y")[0] == 2


def test_a_run_that_is_computed_here_is_not_removed(command: Command, tmp_path: Path) -> None:
    group = write(tmp_path / "s.zarr", [0])
    group.note("sessions", "s", {"host": socket.gethostname(), "process": os.getpid()})
    code, _, err = command("rm", "s.zarr", "e/m.g.i", "--yes")
    assert code == 2
    assert "is being computed" in err
    assert len(list_runs("s.zarr")) == 1


@pytest.mark.parametrize(("said", "left"), [("n\n", 1), ("y\n", 0)])
def test_at_a_terminal_it_is_asked(tmp_path: Path, said: str, left: int) -> None:
    write_all(tmp_path / "s.zarr", 2, 2)
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [PROGRAM, "rm", tmp_path / "s.zarr", "e/m.g.i"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        os.write(ours, said.encode())
        out = process.communicate()[0]
    os.close(ours)
    os.close(theirs)
    assert "Remove e/m.g.i (2/2 cells complete) from" in out
    assert process.returncode == left
    assert len(list_runs(tmp_path / "s.zarr")) == left


def test_stores_are_merged_and_pushed_to_a_folder(command: Command, tmp_path: Path) -> None:
    write(tmp_path / "a.zarr", [0])
    write(tmp_path / "b.zarr", [1])
    write_all(tmp_path / "b.zarr", 2, 2, identity="new")
    code, out, _ = command("merge", "a.zarr", "b.zarr")
    assert (code, out.splitlines()) == (
        0,
        ["e/m.g.i: 1 added, 2/4 complete", "e/m.g.new: new, 2/2 complete", "In a.zarr"],
    )
    assert values_are_right(open_results("a.zarr", "e", run="m.g.i"))
    code, out, _ = command("push", "b.zarr", "c.zarr", "--run", "e/m.g.new")
    assert (code, out.splitlines()) == (0, ["e/m.g.new: new, 2/2 complete", "In c.zarr"])
    code, _, err = command("merge", "a.zarr", "a.zarr")
    assert code == 2
    assert "merged into itself" in err


def test_a_push_to_a_folder_leaves_out_what_names_this_machine(
    command: Command, tmp_path: Path
) -> None:
    write(tmp_path / "a.zarr", [0], file="/home/anna/lens.py")
    command("push", "a.zarr", "b.zarr")
    assert list_runs("b.zarr")[0].attrs["file"] == "lens.py"


def commands() -> Iterator[str]:
    """The commands of the guide that need neither the hub nor a shell."""
    for block in re.findall(r"```bash\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.splitlines():
            text = line.partition("  #")[0]
            if text.startswith("persona-nns") and "hf://" not in text and "--inst" not in text:
                yield text


def test_every_command_of_the_guide_runs(command: Command, tmp_path: Path) -> None:
    found = list(commands())
    assert len(found) >= 5
    for text in found:
        code, _, err = command(*shlex.split(text)[1:])
        assert code == 0, (text, err)
    for file in ("kl.csv", "all.csv", "all-cell_position.csv", "all-columns.csv", "all.nc"):
        assert (tmp_path / file).is_file()
    assert len(list_runs("stores/all.zarr")) == 1
    assert list_runs("stores/results.zarr") == []
