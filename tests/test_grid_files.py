"""Grids that are read from tables of texts, from YAML, and from personas and tasks in two files."""

import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import typer.testing

from persona_nns.cli.commands import app
from persona_nns.errors import UsageError
from persona_nns.prompts import load_grid
from persona_nns.prompts.grid_files import KEY, make_key
from persona_nns.runs.grid_plan import plan_of_grid

SHORT = load_grid("short")
KEYED = """
personas:
  baseline: someone
  no: a person who says no
  pirate: a pirate
tasks:
  baseline: Say something.
  joke: Tell a joke.
markers:
  pirate: [arr, ye be]
"""


def write(folder: Path, name: str, text: str) -> Path:
    data = text.encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder / name


def lines(*rows: dict[str, Any]) -> str:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def test_yaml_has_the_shape_of_toml_and_every_value_is_the_text_that_is_written(
    tmp_path: Path,
) -> None:
    grid = load_grid(write(tmp_path, "mine.yaml", KEYED))
    toml = write(
        tmp_path,
        "mine.toml",
        '[personas]\nbaseline = "someone"\nno = "a person who says no"\npirate = "a pirate"\n'
        '[tasks]\nbaseline = "Say something."\njoke = "Tell a joke."\n'
        '[markers]\npirate = ["arr", "ye be"]\n',
    )
    assert grid == load_grid(toml)
    assert grid.digest == load_grid(write(tmp_path, "mine.yml", KEYED)).digest


CSV = """persona,persona_key,task,task_key,mood
a head chef,chef,Write a haiku.,haiku,glad
"a lawyer, retired",,"Plan a day, please.",,sad
a head chef,,Write a haiku.,,
"""
ROWS: tuple[dict[str, Any], ...] = (
    {"persona": "a head chef", "persona_key": "chef", "task": "Write a haiku.", "mood": 1},
    {"persona": " a lawyer, retired ", "task": "Plan a day, please."},
    {"task_key": "haiku", "task": "Write a haiku."},
)


@pytest.mark.parametrize("name", ["mine.csv", "mine.csv.gz", "mine.jsonl", "mine.JSONL.gz"])
def test_a_table_gives_every_pair_of_its_texts_and_the_baseline_of_short(
    tmp_path: Path, name: str
) -> None:
    grid = load_grid(write(tmp_path, name, CSV if ".csv" in name else lines(*ROWS)))
    assert grid.name == "mine"
    assert dict(grid.personas) == {
        "baseline": SHORT.personas["baseline"],
        "chef": "a head chef",
        "a-lawyer-retired": "a lawyer, retired",
    }
    assert dict(grid.tasks) == {
        "baseline": SHORT.tasks["baseline"],
        "haiku": "Write a haiku.",
        "plan-a-day-please": "Plan a day, please.",
    }
    assert len(grid.cells) == 4
    assert grid.default_baselines == ("personas", "tasks")
    assert plan_of_grid(grid, {}).attrs["default_baselines"] == ["personas", "tasks"]
    assert "default_baselines" not in plan_of_grid(SHORT, {}).attrs


def test_the_baseline_is_a_key_or_a_row_that_is_marked(tmp_path: Path) -> None:
    rows = (
        {"persona": "an engineer"},
        {"persona": "anyone", "baseline": True},
        {"task": "Talk.", "task_key": "baseline"},
        {"task": "Sing."},
    )
    grid = load_grid(write(tmp_path, "a.jsonl", lines(*rows)))
    table = "persona,task,baseline\nan engineer,,\nanyone,,Yes\n,Talk.,1\n,Sing.,no\n"
    assert load_grid(write(tmp_path, "a.csv", table)) == grid
    assert dict(grid.personas) == {"an-engineer": "an engineer", "baseline": "anyone"}
    assert dict(grid.tasks) == {"baseline": "Talk.", "sing": "Sing."}
    assert grid.default_baselines == ()
    assert [cell.baseline_persona_text for cell in grid.cells] == ["anyone"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.txt", "Write a haiku.\n\n  Plan a day.\n"),
        ("t.csv", "task\nWrite a haiku.\nPlan a day.\n"),
        ("t.jsonl.gz", lines({"task": "Write a haiku."}, {"task": "Plan a day.", "persona": 7})),
        (
            "t.toml",
            '[tasks]\nbaseline = "Give advice to someone facing a difficult decision."\n'
            'write-a-haiku = "Write a haiku."\nplan-a-day = "Plan a day."\n',
        ),
    ],
)
def test_personas_a_line_go_with_tasks_of_another_file(
    tmp_path: Path, name: str, text: str
) -> None:
    if "jsonl" in name:
        text = text.replace(', "persona": 7', "")
    personas = write(tmp_path, "hub.jsonl", lines({"persona": "A nurse."}, {"persona": "A monk."}))
    grid = load_grid(personas, tasks=write(tmp_path, name, text))
    assert [cell.label for cell in grid.cells] == [
        *("a-nurse/write-a-haiku", "a-nurse/plan-a-day"),
        *("a-monk/write-a-haiku", "a-monk/plan-a-day"),
    ]
    assert grid.cells[0].persona_text == "A nurse."
    assert grid.tasks["baseline"] == SHORT.tasks["baseline"]
    assert grid.default_baselines[:1] == ("personas",)
    assert grid.name == "hub-t"


def test_keys_are_the_first_words_in_ascii() -> None:
    assert make_key("A Political Analyst specialized in El Salvador's landscape", "persona") == (
        "a-political-analyst-specialized-in"
    )
    assert make_key("un élève à l'école", "persona") == "un-eleve-a-lecole"
    assert make_key("一位厨师", "persona") == "persona"
    long = make_key(" ".join(["incomprehensibilities"] * 5), "persona")
    assert long == "incomprehensibilities-incomprehensibilit"


def test_keys_of_five_thousand_personas_are_labels_each_its_own_and_always_the_same(
    tmp_path: Path,
) -> None:
    draw = random.Random(7)
    words = ("a", "the", "chef", "nurse", "who", "likes", "jazz", "élan", "in", "Rome-2", "厨师")
    texts = list(dict.fromkeys(" ".join(draw.choices(words, k=9)) for _ in range(5_200)))[:5_000]
    assert len(texts) == 5_000
    # Some of the made keys are given to others, before and after.
    rows = [{"persona": text} for text in texts]
    rows[10]["persona_key"], rows[4_990]["persona_key"] = "a", make_key(texts[0], "persona")
    tasks = write(tmp_path, "t.txt", "Sing.\nDance.\n")
    grid = load_grid(write(tmp_path, "hub.jsonl", lines(*rows)), tasks=tasks)
    keys = {text: key for key, text in grid.personas.items()}
    assert len(grid.personas) == len(keys) == 5_001
    assert all(
        re.fullmatch(KEY, key) and "/" not in key and "," not in key for key in keys.values()
    )
    assert keys[texts[0]] == f"{make_key(texts[0], 'persona')}-2"
    assert len(grid.cells) == len({cell.label for cell in grid.cells}) == 10_000
    assert load_grid(tmp_path / "hub.jsonl", tasks=tasks) == grid
    # What is added at the end changes no key before it.
    more = write(tmp_path, "more.jsonl", lines(*rows, {"persona": f"{texts[5]} too"}))
    grown = load_grid(more, tasks=tasks)
    assert all(grown.personas[key] == text for text, key in keys.items())
    with pytest.raises(UsageError, match="has no cell 'x/y'; its cells are ") as caught:
        grid.select_cells("x/y")
    assert len(str(caught.value)) < 4_000


TEXT = '{"persona": "a nun"}\n'


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.csv", "", "There are no personas and no tasks in .*a.csv'"),
        (
            "a.csv",
            "persona\na nun\n",
            "has no column 'task', and so no tasks; give .* --tasks FILE",
        ),
        ("a.csv", "task\nSing.\n", "has no column 'persona', and so no personas"),
        (
            "a.csv",
            "persona;task\na nun;Sing.\n",
            r"Row 1 of .*a.csv' has neither a persona nor .*; it has 'persona;task'",
        ),
        ("a.csv", "persona,task\na nun,Sing.\na nun, old,Hum.\n", "Row 2 of .* put a text with a"),
        ("a.csv", "persona,task\n,\n", "Row 1 of .* has neither"),
        ("a.jsonl", TEXT + '{"text": "x"}\n', "Line 2 of .*a.jsonl' has neither .* 'text'"),
        ("a.jsonl", TEXT + '\n{"persona": 7}\n', "Line 3 of .*: persona is 7, which is no text"),
        ("a.jsonl", TEXT + "[]\n", "Line 2 of .*a.jsonl' is no JSON object"),
        (
            "a.jsonl",
            '{"persona": "a nun", "persona_key": "a/b"}\n',
            "Line 1 of .*: the key 'a/b' holds more than letters",
        ),
        (
            "a.jsonl",
            '{"persona_key": "ab", "task": "Sing."}\n',
            "Line 1 of .* has the persona_key 'ab' and no persona",
        ),
        (
            "a.jsonl",
            TEXT + '{"persona": "a monk", "baseline": "perhaps"}\n',
            "Line 2 of .*: baseline is 'perhaps'; it has to be true or false",
        ),
        (
            "a.jsonl",
            '{"persona": "x", "baseline": true}\n{"persona": "y", "baseline": true}\n',
            "Line 2 of .*: the persona 'y' has the key 'baseline', which stands for 'x' already",
        ),
        ("a.csv", "persona,task,baseline\nx,Do.,1\n,Sing.,\n", r"\[personas\] has no entry beside"),
        ("a.yaml", "personas: [", r"a.yaml' is not valid YAML: .*line 1"),
        ("a.yaml", "", "is not valid YAML: it holds no mapping"),
        ("a.yaml", "a: 1\nb: 2\na: 3\n", r"the key 'a' stands there twice \(line 3\)"),
        (
            "a.yaml",
            "personas: !!python/name:os.system x\n",
            "is not a grid: personas: .*dictionary",
        ),
        ("a.yaml", KEYED.replace("  baseline: someone\n", ""), r"\[personas\] has no entry called"),
        ("a.yaml", KEYED.replace("a pirate", ""), r"personas.pirate: .* at least 1 character"),
    ],
)
def test_what_is_wrong_is_one_sentence_that_says_where(
    tmp_path: Path, name: str, text: str, sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        load_grid(write(tmp_path, name, text))
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_tasks_have_to_be_wanted_and_there(tmp_path: Path) -> None:
    hub = write(tmp_path, "hub.jsonl", TEXT)
    tasks = write(tmp_path, "t.txt", "Sing.\n")
    whole = write(tmp_path, "whole.yaml", KEYED)
    for grid in ("short", SHORT, whole):
        with pytest.raises(UsageError, match=r"has tasks of its own; leave out --tasks"):
            load_grid(grid, tasks=tasks)
    with pytest.raises(UsageError, match=r"t.pdf' are no .toml, .* or .txt file"):
        load_grid(hub, tasks=tmp_path / "t.pdf")
    with pytest.raises(UsageError, match=r"hub.jsonl' holds no tasks"):
        load_grid(hub, tasks=hub)
    with pytest.raises(UsageError, match=r"There are no personas and no tasks in .*e.txt'"):
        load_grid(hub, tasks=write(tmp_path, "e.txt", "\n"))
    with pytest.raises(UsageError, match=r"gone.txt' cannot be read: No such file"):
        load_grid(hub, tasks=tmp_path / "gone.txt")


def test_the_command_line_takes_both_files(tmp_path: Path) -> None:
    hub = write(tmp_path, "hub.jsonl", TEXT)
    tasks = write(tmp_path, "t.txt", "Sing.\n")
    given = ["--model", "organism-qwen2", "--grid", str(hub), "--tasks", str(tasks)]
    shown = typer.testing.CliRunner().invoke(app, ["prompts", *given])
    assert shown.exit_code == 0, shown.output
    assert "XY of a-nun/sing" in shown.output
    store = tmp_path / "s.zarr"
    ran = typer.testing.CliRunner().invoke(
        app, ["run", "behavioral_markers", *given, "--layers", "4", "--store", str(store)]
    )
    assert isinstance(ran.exception, UsageError), ran.output
    assert "The grid has no markers for a-nun" in str(ran.exception)
