"""What is prepared for a GPU runs on the CPU, line by line, on the organisms."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_it_passes_on_the_organisms(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    command = ["tests/gpu/run.sh", "--device", "cpu", "--quick", "-o", str(file)]
    here = {"PYTHON": sys.executable, "PERSONA_NNS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **here}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(file.read_text())
    assert (seen["device"], seen["quick"], seen["failed"]) == ("cpu", True, {})
    assert not list(tmp_path.glob("*.part"))
    left_out = {name.partition(":")[2].strip() for name in seen["left_out"]}
    assert {"bfloat16, smollm2", "smollm2", "spread over several"} <= left_out
    parts = {name: part["found"] for name, part in seen["parts"].items()}
    assert parts["machine"]["versions"]["torch"]
    differences = parts["agreement: organism-qwen2"]["largest_difference"]
    measured = {name: value for name, value in differences.items() if isinstance(value, float)}
    assert set(measured) == {
        *("localized_positions", "persona_accuracy", "trait_vectors", "trait_steering-generated")
    }
    assert max(measured.values()) == 0  # a CPU beside itself
    assert parts["agreement: spread"]["largest_difference"] == 0
    assert 0 < parts["agreement: bfloat16, organism-qwen2"]["largest_difference"] < 0.5
    for grid in ("short", "long"):
        for attention in ("eager", "sdpa"):
            (speed,) = (
                found for name, found in parts.items() if name.endswith(f"{grid} grid, {attention}")
            )
            assert set(speed["seconds"]) == {"reuse", "no_reuse", "paper"}
            assert speed["floor"]["seconds"] == max(
                speed["floor"]["multiplying_seconds"], speed["floor"]["reading_seconds"]
            )
            assert speed["extrapolated_from"]["paper"] < speed["cells"]


def test_a_part_that_fails_is_noted_and_the_next_one_runs(tmp_path: Path) -> None:
    from gpu_report import Report

    file = tmp_path / "gpu.json"
    report = Report(file, 100, device="cpu")
    assert not report.part("one", 0, lambda _: 1 / 0)
    assert report.part("two", 0, lambda left: left > 90)
    assert report.part("three", 200, lambda _: 1 / 0)
    seen = json.loads(file.read_text())
    assert "ZeroDivisionError" in seen["failed"]["one"]
    assert seen["parts"]["two"]["found"] is True
    assert seen["left_out"]["three"].startswith("left out: ")


def test_parts_of_smollm2_are_joined_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_models import find_smollm2

    for name, text in (("model.gguf.01", "and the end"), ("model.gguf.00", "The start ")):
        (tmp_path / name).write_text(text)
    file, lacking = find_smollm2(tmp_path)
    assert Path(file).read_text() == "The start and the end"
    assert not lacking
    monkeypatch.setenv("PERSONA_NNS_CACHE", str(tmp_path / "none"))
    assert find_smollm2(None)[1].startswith("SmolLM2 is not in the cache")


def test_without_a_gpu_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    from gpu_run import main

    with pytest.raises(SystemExit):
        main([])
    assert "there is no CUDA device here" in capsys.readouterr().err
