"""A process that trains a cartridge is killed, and the next one goes on where it stopped."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from random_models import GOLDEN

import persona_nns as pn
from persona_nns.models.cartridges import load_cartridge

PROGRAM = "from persona_nns.cli import main; main()"


def start(folder: Path) -> subprocess.Popen[bytes]:
    options = "--personas yoda --train-tasks policy,haiku --forms prefix --slots 2 --steps 60"
    where = ["--store", str(folder / "s.zarr"), "--output", str(folder / "out")]
    asked = ["persona_cartridge", "--model", str(GOLDEN / "qwen2"), "--grid", "short"]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "run", *asked, *options.split(), *where],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )


def checkpoints(folder: Path) -> list[str]:
    return sorted(file.parent.name for file in folder.rglob("checkpoint-*/trainer_state.json"))


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    process = start(whole)
    assert process.wait(timeout=600) == 0, process.stderr and process.stderr.read()
    process, deadline = start(cut), time.monotonic() + 600
    while not checkpoints(cut) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert checkpoints(cut) in (["checkpoint-20"], ["checkpoint-40"])
    assert not list(cut.glob("out/*/*.safetensors"))
    assert start(cut).wait(timeout=600) == 0
    losses = [pn.open_results(each / "s.zarr", "persona_cartridge").loss for each in (whole, cut)]
    assert losses[0].shape[-1] == 60
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)
    ours, theirs = (load_cartridge(next(each.glob("out/*/*.safetensors"))) for each in (cut, whole))
    torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.values, theirs.values, rtol=1e-5, atol=1e-6)
