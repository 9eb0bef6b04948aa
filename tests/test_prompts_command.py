"""`persona-nns prompts` prints what a model reads, without its weights."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from persona_nns.cli import terminal
from persona_nns.cli.commands import main

GOLDEN = Path(__file__).parent / "golden" / "qwen2"
Printed = Callable[..., tuple[Any, ...]]


@pytest.fixture
def printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Printed:
    """What `prompts` prints for a folder that holds no weights."""
    for file in GOLDEN.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    monkeypatch.setattr(terminal, "out", Console(width=80))
    monkeypatch.setattr(terminal, "err", Console(width=200, stderr=True))

    def call(*options: str) -> tuple[Any, ...]:
        command = ["persona-nns", "prompts", "--model", str(tmp_path), "--grid", "short"]
        monkeypatch.setattr(sys, "argv", [*command, *options])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capsys.readouterr()

    return call


def test_a_prompt_is_shown_with_spans_positions_and_counts(printed: Printed) -> None:
    code, out, err = printed("--cells", "yoda/haiku,marx/haiku", "--positions", "p_last,g1")
    assert (code, err) == (0, "")
    shown = out.split("\n\n")
    assert [one.split(":")[0] for one in shown if one.strip()] == [
        "BB of all 2 cells",
        "XB of marx/haiku",
        "XB of yoda/haiku",
        "BY of all 2 cells",
        "XY of marx/haiku",
        "XY of yoda/haiku",
        "BARE of all 2 cells",
    ]
    assert shown[5].splitlines() == [
        "XY of yoda/haiku: 26 tokens",
        "<|im_start|>user",
        "As ⟦persona: Yoda⟧⟦task: , Write a haiku about Monday mornings.⟧<|im_end|>",
        "<|im_start|>assistant",
        "  spans      prefix 0–4 (5), persona 5–9 (5), task 10–17 (8), tail 18–25 (8)",
        "  positions  p_last = 25 '\\n', g1 = 26 (generated)",
    ]
    assert "persona (0)" in shown[6]


def test_the_spans_are_those_that_are_measured(printed: Printed, tokenizer: Any) -> None:
    from persona_nns.prompts.grids import load_grid
    from persona_nns.prompts.render import render_cell

    (cell,) = load_grid("short").select_cells("angelou/policy")
    prompt = render_cell(tokenizer, cell)["XY"]
    _, out, _ = printed("--cells", cell.label)
    shown = next(one for one in out.split("\n\n") if one.startswith("XY"))
    assert f"{len(prompt)} tokens" in shown
    for span, tokens in prompt.spans.items():
        assert f"{span} {tokens.start}–{tokens.stop - 1} ({len(tokens)})" in shown
    assert f"⟦persona: {cell.persona_text}⟧" in shown


def test_a_frame_shows_the_prompt_in_it(printed: Printed) -> None:
    code, out, err = printed("--cells", "yoda/haiku", "--frame", "system")
    assert (code, err) == (0, "")
    shown = out.split("\n\n")
    assert shown[3].splitlines()[1:5] == [
        "<|im_start|>system",
        "You are ⟦persona: Yoda⟧⟦task: .<|im_end|>",
        "<|im_start|>user",
        "Write a haiku about Monday mornings.⟧<|im_end|>",
    ]
    assert "system" not in shown[4]
    code, out, err = printed("--frame", "nowhere")
    assert (code, out) == (2, "")
    assert "Unknown frame 'nowhere'; use role, system, later, or a .toml file" in err


def test_a_wrong_cell_or_position_is_one_sentence(printed: Printed) -> None:
    code, out, err = printed("--cells", "nobody/haiku")
    assert (code, out) == (2, "")
    assert "has no cell 'nobody/haiku'" in err
    code, out, err = printed("--positions", "p_first")
    assert (code, out) == (2, "")
    assert "Unknown position 'p_first'" in err
