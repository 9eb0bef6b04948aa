"""Frames: persona and task in any messages, on the templates of public models.

What is expected is spelt out piece by piece (`chat_templates`), and a token is given to a span by
looking at its characters one after the other.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_templates import PUBLIC, Piece, Said, with_public_template

import persona_nns as pn
from persona_nns.errors import PersonaError, UsageError
from persona_nns.prompts.frames import BUNDLED_FRAMES, ROLE, Frame, Message, load_frame
from persona_nns.prompts.grids import Grid, load_grid
from persona_nns.prompts.positions import position_index
from persona_nns.prompts.render import Prompt, render, render_cell, render_cells, with_prompts
from persona_nns.runs import verify_store
from persona_nns.runs.grid_plan import plan_grid
from persona_nns.runs.run import plan_run

OWN = """
[frame]
messages = [
    {role = "system", content = "Answer as {persona} would. {Not a slot}"},
    {role = "user", content = "Are you ready?"},
    {role = "assistant", content = "Yes."},
    {role = "user", content = "Good. {task} Be brief."},
]
"""
BARE = "bare"

# What is said in each frame: with a system role, without one, and without a persona.
P, T = ("{persona}", "persona"), ("{task}", "task")
ROLE_SAID: list[Piece] = [("As ", ""), P, (", ", "task"), T]
HELLO: list[Said] = [
    ("user", [("Hello.", "")]),
    ("assistant", [("Hello! How can I help you today?", "")]),
]
ASKED: list[Said] = [("user", [("Are you ready?", "")]), ("assistant", [("Yes.", "")])]
TOLD: list[Piece] = [("Answer as ", ""), P, (" would. {Not a slot}", "task")]
SAID: dict[str, dict[str, list[Said]]] = {
    "role": {
        "system": [("user", ROLE_SAID)],
        "folded": [("user", ROLE_SAID)],
        BARE: [("user", [T])],
    },
    "system": {
        "system": [("system", [("You are ", ""), P, (".", "task")]), ("user", [T])],
        "folded": [("user", [("You are ", ""), P, (".\n\n", "task"), T])],
        BARE: [("user", [T])],
    },
    "later": {
        "system": [*HELLO, ("user", ROLE_SAID)],
        "folded": [*HELLO, ("user", ROLE_SAID)],
        BARE: [*HELLO, ("user", [T])],
    },
    "own": {
        "system": [
            ("system", TOLD),
            *ASKED,
            ("user", [("Good. ", ""), T, (" Be brief.", "")]),
        ],
        "folded": [
            ("user", [*TOLD, ("\n\nAre you ready?", "")]),
            ("assistant", [("Yes.", "")]),
            ("user", [("Good. ", ""), T, (" Be brief.", "")]),
        ],
        BARE: [*ASKED, ("user", [("Good. ", ""), T, (" Be brief.", "")])],
    },
}
# Texts that stand elsewhere in the prompt, that look like slots, or that begin or end oddly.
TEXTS = [
    ("Yoda", "Write a haiku about Monday mornings."),
    ("user", "Yes."),
    ("You", "As You, You are ready"),
    ("a person who says {task}", "Say {persona}\n\nand assistant – ¿sí?"),
    ("一个深思熟虑的人", "写一首俳句。"),
]


@pytest.fixture
def own(tmp_path: Path) -> Frame:
    """A frame of four messages from a file."""
    file = tmp_path / "own.toml"
    file.write_text(OWN, encoding="utf-8")
    return load_frame(file)


def filled(said: Sequence[Said], persona: str, task: str) -> list[Said]:
    texts = {"{persona}": persona, "{task}": task}
    return [(role, [(texts.get(p, p), label) for p, label in pieces]) for role, pieces in said]


def labels_of(pieces: Sequence[Piece]) -> list[str]:
    """Of every character, the span it belongs to: all between persona and task is the task's."""
    each = [label for text, label in pieces for _ in text]
    first = next((k for k, label in enumerate(each) if label == "persona"), each.index("task"))
    last = max(k for k, label in enumerate(each) if label == "task")
    past = max((k for k, label in enumerate(each) if label == "persona"), default=first - 1)
    return [
        "prefix" if k < first else "persona" if k <= past else "task" if k <= last else "tail"
        for k in range(len(each))
    ]


def assert_as_written(
    prompt: Prompt, tokenizer: Any, said: Sequence[Said], name: str, *, has_persona: bool
) -> None:
    public = PUBLIC[name]
    pieces = public.writer(said, True)
    text, labels = "".join(piece for piece, _ in pieces), labels_of(pieces)
    assert prompt.text == text
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert list(prompt.ids) == encoded["input_ids"]
    of_span: dict[str, list[int]] = {"prefix": [], "persona": [], "task": [], "tail": []}
    for token, (place, _) in enumerate(encoded["offset_mapping"]):
        while place < len(text) and text[place].isspace():
            place += 1  # a token of white space goes with what follows
        of_span[labels[place] if place < len(text) else "tail"].append(token)
    assert {name: list(tokens) for name, tokens in prompt.spans.items()} == of_span
    assert bool(of_span["persona"]) == has_persona
    assert of_span["task"]
    assert position_index(prompt, "p_last") == len(encoded["input_ids"]) - 1
    turn = "".join(piece for piece, _ in public.writer(said, False))
    if public.user_last:
        alone = tokenizer(turn, add_special_tokens=False)["input_ids"]
        assert list(prompt.ids[: len(alone)]) == alone
        assert position_index(prompt, "p_user_last") == len(alone) - 1
    else:
        with pytest.raises(UsageError, match="p_user_last is not defined"):
            position_index(prompt, "p_user_last")
    if public.bos and public.bos != public.eos:
        assert prompt.ids.count(tokenizer.bos_token_id) == 1
    pairs = zip(prompt.ids, prompt.ids[1:], strict=False)
    assert not [one for one, other in pairs if one == other and one in tokenizer.all_special_ids]


@pytest.mark.parametrize("frame", [*BUNDLED_FRAMES, "own"])
@pytest.mark.parametrize("name", PUBLIC)
def test_a_frame_in_a_public_template_is_as_written(
    tokenizer: Any, own: Frame, name: str, frame: str
) -> None:
    changed = with_public_template(tokenizer, PUBLIC[name])
    form = "system" if PUBLIC[name].system_role else "folded"
    loaded = own if frame == "own" else load_frame(frame)
    for persona, task in TEXTS:
        prompt = render(changed, persona, task, loaded)
        said = filled(SAID[frame][form], persona, task)
        assert_as_written(prompt, changed, said, name, has_persona=True)
        bare = render(changed, None, task, loaded)
        said = filled(SAID[frame][BARE], persona, task)
        assert_as_written(bare, changed, said, name, has_persona=False)


def test_the_default_frame_is_the_role_prompt(tokenizer: Any) -> None:
    for persona, task in TEXTS:
        plain = render(tokenizer, persona, task)
        assert plain == render(tokenizer, persona, task, load_frame("role"))
        messages = [{"role": "user", "content": f"As {persona}, {task}"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert list(plain.ids) == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["llama-3.1", "gemma-2"])
def test_white_space_that_a_template_leaves_out_is_in_no_span(tokenizer: Any, name: str) -> None:
    changed = with_public_template(tokenizer, PUBLIC[name])
    spaced = Frame((Message("system", "\n {persona} "), Message("user", " {task}\n\n")))
    prompt = render(changed, "  Yoda ", " Sing. \n", spaced)
    between = "<|eot_id|>" if name == "llama-3.1" else "\n\n"
    shown = prompt.text.index("Yoda")
    assert prompt.text[shown - 1].isspace()
    encoded = changed(prompt.text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    words = {
        span: prompt.text[offsets[of.start][0] : offsets[of.stop - 1][1]].strip()
        for span, of in prompt.spans.items()
    }
    assert words["persona"] == "Yoda"
    assert between.strip() in words["task"]
    assert words["task"].endswith("Sing.")
    assert words["tail"].startswith(("<|eot_id|>", "<end_of_turn>"))


def test_bare_may_be_what_a_template_does_not_take(tokenizer: Any, small_grid: Grid) -> None:
    agreed = Frame(
        (
            Message("user", "You are {persona}."),
            Message("assistant", "I am."),
            Message("user", "{task}"),
        )
    )
    grid = small_grid.put_in(agreed)
    assert grid.name == "small.own"
    gemma = with_public_template(tokenizer, PUBLIC["gemma-2"])
    render_cells(gemma, grid.cells)  # without BARE all is well
    with pytest.raises(UsageError, match=r"fails on messages of assistant, user .*must alternate"):
        render_cell(gemma, grid.cells[0], ("BARE",))
    chatml = with_public_template(tokenizer, PUBLIC["smollm2"])
    bare = render_cell(chatml, grid.cells[0], ("BARE",))["BARE"]
    assert bare.text.count("<|im_start|>assistant\nI am.") == 1


def test_what_needs_bare_says_so_and_writes_nothing(
    tokenizer: Any, small_grid: Grid, random_folder: Any, tmp_path: Path
) -> None:
    agreed = Frame(
        (
            Message("user", "You are {persona}."),
            Message("assistant", "I am."),
            Message("user", "{task}"),
        ),
        "agreed",
    )
    model = pn.load_model(random_folder("gemma2"))
    model.tokenizer = with_public_template(tokenizer, replace(PUBLIC["gemma-2"], special=()))
    model.tokenizer.chat_template = model.tokenizer.chat_template.replace("{{ bos_token }}", "")
    grid = replace(small_grid, markers=dict.fromkeys(small_grid.personas, ("the",)))
    chosen: dict[str, Any] = {"frame": agreed, "store": tmp_path / "s.zarr", "progress": False}
    with pytest.raises(UsageError, match=r"fails on messages of assistant, user"):
        pn.run("behavioral_markers", model, grid, n_tokens=2, **chosen)
    assert not (tmp_path / "s.zarr").exists()
    ds = pn.run("localized_positions", model, grid, cells="yoda/haiku", n_eval=2, **chosen)
    assert ds.attrs["grid"] == "small.agreed"
    (cell,) = grid.put_in(agreed).select_cells("yoda/haiku")
    travelling = with_prompts(model.tokenizer, cell)
    assert render_cell(model.tokenizer, travelling) == render_cell(model.tokenizer, cell)
    with pytest.raises(PersonaError, match="does not take the prompt BARE of 'yoda/haiku'"):
        render_cell(model.tokenizer, travelling, ("BARE",))


def test_each_distinct_prompt_of_a_grid_is_tokenised_once(
    tokenizer: Any, small_grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    encode = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer),
        "__call__",
        lambda self, texts, **how: asked.extend(texts) or encode(self, texts, **how),
    )
    crowd = {f"p{k}": f"a person who is {k} years old" for k in range(50)}
    grid = replace(small_grid, personas={"baseline": "a person", **crowd})
    plan = plan_grid(tokenizer, grid, ["p_last", "p_last-3"])
    assert len(plan.token_ids) == 100
    assert len(asked) == len(set(asked)) == 50 * 2 + 50 + 2 + 1 + 2  # XY, XB, BY, BB, BARE


PLANNING = """
from pathlib import Path

import persona_nns as pn
from persona_nns.prompts import Grid
from persona_nns.runs import plan_run

personas = {f"p{k}": f"a biologist who has studied reefs, number {k}" for k in range(5000)}
tasks = {"baseline": "Give advice.", "haiku": "Write a haiku.", "policy": "Comment on a policy."}
grid = Grid("crowd", {"baseline": "a thoughtful person", **personas}, tasks)
model = pn.load_model("organism-qwen2")
plan = plan_run("localized_positions", model, grid, store="none.zarr").request.plan
(peak,) = (line for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))
print(len(plan.units), int(peak.split()[1]) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read on Linux")
def test_a_grid_of_ten_thousand_cells_is_planned_in_a_gigabyte(tmp_path: Path) -> None:
    # The kernel's own peak: that of `resource` is the parent's where it had more.
    command = [sys.executable, "-c", PLANNING]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    n_cells, gibibytes = map(float, done.stdout.split())
    assert n_cells == 10_000
    assert gibibytes < 1


def test_cells_share_the_prompts_that_are_the_same(tokenizer: Any, small_grid: Grid) -> None:
    rendered = render_cells(tokenizer, small_grid.cells)
    assert len({id(prompt) for of_cell in rendered for prompt in of_cell.values()}) == 1 + 2 + 2 + 4
    for cell, of_cell in zip(small_grid.cells, rendered, strict=True):
        assert of_cell == render_cell(tokenizer, cell)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("{persona}", "nobody", r"\{persona\} stands in its messages 0 times; it has to stand"),
        ("{task}", "{task} {task}", r"\{task\} stands in its messages 2 times"),
        ("Yes.", "{task}", r"\{task\} stands in its messages 2 times"),
        ("{task} Be", "{persona} {task} Be", r"\{persona\} stands in its messages 2 times"),
        ('"Good. {task} Be brief."', '"Good."}, {role = "assistant", content = "{task}"', "last"),
        ('role = "assistant"', 'role = "tool"', r"messages\.2\.role: .*'system', 'user' or"),
        ('role = "assistant"', 'role = "system"', "a system message can only be the first"),
        ('"Yes."', '""', r"messages\.2\.content: .*at least 1 character"),
        ('"Yes."', "7", r"messages\.2\.content: .*valid string"),
        ("[frame]", "[frames]", "frame: Field required"),
        ("messages =", "said =", r"frame\.messages: Field required"),
    ],
)
def test_a_file_that_holds_no_frame_is_told_why(
    tmp_path: Path, old: str, new: str, sentence: str
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(OWN.replace(old, new), encoding="utf-8")
    with pytest.raises(UsageError, match=rf"mine\.toml' holds no frame: .*{sentence}") as caught:
        load_frame(file)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_a_persona_after_the_task_is_refused() -> None:
    with pytest.raises(UsageError, match=r"\{persona\} stands after \{task\}"):
        Frame((Message("user", "{task} Do it as {persona}."),), "late")


def test_unknown_frames_and_files_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Unknown frame 'middle'; use role, system, later, or"):
        load_frame("middle")
    with pytest.raises(UsageError, match=r"frame file .*absent.toml' cannot be read"):
        load_frame(tmp_path / "absent.toml")
    (tmp_path / "broken.toml").write_text("[frame")
    with pytest.raises(UsageError, match="is not valid TOML"):
        load_frame(tmp_path / "broken.toml")


GRID = """
[personas]
baseline = "someone"
pirate = "a pirate"

[tasks]
baseline = "Say something."
joke = "Tell a joke."
"""


def test_a_grid_file_brings_its_frame_and_another_one_replaces_it(tmp_path: Path) -> None:
    file = tmp_path / "sea.toml"
    file.write_text(GRID + OWN, encoding="utf-8")
    grid = load_grid(file)
    assert grid.frame.has_system_message
    assert grid.cells[0].frame == grid.frame
    assert load_frame(file) == grid.frame  # the frame of a grid's file
    role = load_grid(file, "role")
    assert (role.frame, role.name) == (ROLE, "sea.role")
    plain = tmp_path / "plain.toml"
    plain.write_text(GRID, encoding="utf-8")
    assert load_grid(plain, "role") == load_grid(plain)
    assert role.digest == load_grid(plain).digest != grid.digest


def test_a_wrong_frame_of_a_grid_is_told_where(tmp_path: Path) -> None:
    file = tmp_path / "sea.toml"
    file.write_text(GRID + OWN.replace("{persona}", ""), encoding="utf-8")
    with pytest.raises(UsageError, match=r"is not a grid: frame: \{persona\} stands .* 0 times"):
        load_grid(file)


def test_a_run_knows_its_frame_and_its_identity_follows_the_tokens(
    tmp_path: Path, golden_model: Any
) -> None:
    model, store = golden_model("qwen2"), tmp_path / "s.zarr"
    plans = {
        frame: plan_run("localized_positions", model, "short", frame=frame, store=store)
        for frame in (None, "role", "system", "later")
    }
    attrs = {frame: planned.request.block.attrs for frame, planned in plans.items()}
    assert attrs[None]["identity"] == attrs["role"]["identity"]
    assert attrs[None]["run"] == attrs["role"]["run"]
    assert attrs[None]["grid"] == "short"
    assert len({of["identity"] for of in attrs.values()}) == 3
    assert len({of["grid_digest"] for of in attrs.values()}) == 3
    assert attrs["system"]["grid"] == "short.system"
    assert attrs["system"]["frame"] == [
        {"role": "system", "content": "You are {persona}."},
        {"role": "user", "content": "{task}"},
    ]
    assert attrs["system"]["system_role"] is True
    assert "system_role" not in attrs["role"]
    folding = with_public_template(model.tokenizer, PUBLIC["mistral-0.1"])
    folded = load_grid("short", "system")
    assert plan_grid(folding, folded, []).attrs["system_role"] is False


def test_a_run_in_a_frame_is_found_again_and_computed_anew(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    folder = Path(__file__).parent / "golden" / "qwen2"
    chosen: dict[str, Any] = {"cells": "yoda/haiku", "layers": "2", "store": store}
    role = pn.run("localized_positions", folder, "short", progress=False, **chosen)
    system = pn.run(
        "localized_positions", folder, "short", frame="system", progress=False, **chosen
    )
    again = pn.run("localized_positions", folder, "short", frame="system", **chosen)
    assert again.attrs["run"] == system.attrs["run"] != role.attrs["run"]
    at = {"cell": "yoda/haiku", "position": "p_last", "layer": 2}
    assert abs(role.kl.sel(at).item() - system.kl.sel(at).item()) > 1e-3
    opened = pn.open_results(store, "localized_positions", grid="short.system")
    assert opened.attrs["run"] == system.attrs["run"]
    assert (
        pn.open_results(store, "localized_positions", grid="short").attrs["run"]
        == (role.attrs["run"])
    )
    verdicts = list(verify_store(store))
    assert [(verdict.problems, verdict.n_recomputed) for verdict in verdicts] == [((), 1)] * 2


def test_an_experiment_without_a_grid_takes_no_frame(tmp_path: Path, golden_model: Any) -> None:
    with pytest.raises(UsageError, match="runs on no grid of personas and tasks"):
        pn.run("persona_patching", golden_model("qwen2"), frame="system", store=tmp_path / "s.zarr")


def test_a_text_that_a_template_changes_is_refused_in_any_message(tokenizer: Any) -> None:
    changed = with_public_template(tokenizer, PUBLIC["qwen3"])
    thinking = replace(
        load_frame("later"),
        messages=(
            Message("user", "Hello."),
            Message("assistant", "<think>Hm.</think>Hello."),
            Message("user", "As {persona}, {task}"),
        ),
    )
    with pytest.raises(PersonaError, match="changes the prompt"):
        render(changed, "Yoda", "Write.", thinking)
