"""Grids: the texts of the paper, a user's own file, and what a bad file is told."""

from pathlib import Path
from typing import Any

import pytest

from persona_nns.cli.arguments import GRIDS
from persona_nns.errors import UsageError
from persona_nns.prompts.grids import BUNDLED_GRIDS, Grid, load_grid
from persona_nns.prompts.render import render_cell

LONG_PERSONAS = [
    "engineer",
    "counselor",
    "founder",
    "teacher",
    "journalist",
    "doctor",
    "lawyer",
    "chef",
]
LONG_TASKS = ["arch", "plan", "proposal", "policy", "haiku", "recommend"]


def labels(personas: list[str], tasks: list[str]) -> list[str]:
    return [f"{persona}/{task}" for persona in personas for task in tasks]


def test_the_short_grid_has_the_texts_of_the_paper() -> None:
    grid = load_grid("short")
    assert grid.name == "short"
    assert dict(grid.personas) == {
        "baseline": "a thoughtful person",
        "buffett": "Warren Buffett",
        "marx": "Karl Marx",
        "yoda": "Yoda",
        "angelou": "Maya Angelou",
    }
    assert dict(grid.tasks) == {
        "baseline": "Give advice to someone facing a difficult decision.",
        "policy": "Comment on whether universal basic income is a good policy.",
        "haiku": "Write a haiku about Monday mornings.",
        "recommend": "Recommend a book worth reading and explain why.",
    }
    assert [cell.label for cell in grid.cells] == labels(
        ["buffett", "marx", "yoda", "angelou"], ["policy", "haiku", "recommend"]
    )
    assert len(grid.cells) == 12


def test_the_long_grid_has_the_texts_of_the_paper() -> None:
    grid = load_grid("long")
    assert list(grid.personas) == ["baseline", *LONG_PERSONAS]
    assert list(grid.tasks) == ["baseline", *LONG_TASKS]
    assert grid.personas["baseline"] == "a thoughtful person"
    assert grid.tasks["baseline"] == "Give advice to someone facing a difficult decision."
    assert grid.personas["engineer"] == (
        "a senior software engineer with 10 years of experience who pays close attention to "
        "architecture, reliability, and avoiding single points of failure"
    )
    assert grid.personas["counselor"] == (
        "an empathetic counselor with deep training in active listening, cognitive behavioral "
        "therapy, and trauma-informed care, who helps clients feel heard without imposing solutions"
    )
    assert grid.personas["chef"] == (
        "a head chef trained in classical French technique who has run three Michelin-starred "
        "kitchens, builds menus around seasonal ingredients, and teaches young cooks by "
        "demonstration"
    )
    assert grid.tasks["arch"] == (
        "Review this design: a microservice architecture where eight services share a single "
        "PostgreSQL database for both transactional state and event log."
    )
    assert grid.tasks["plan"] == (
        "Review this plan: a three-person team building a B2B SaaS product, planning to launch in "
        "three months, with no usage analytics in v1."
    )
    assert grid.tasks["proposal"] == (
        "Review this proposal: an internal tool that automates calendar scheduling using an LLM, "
        "sending tentative meetings to all parties before confirmation."
    )
    assert [cell.label for cell in grid.cells] == labels(LONG_PERSONAS, LONG_TASKS)
    assert len(grid.cells) == 48


def test_both_grids_share_the_three_general_tasks_and_the_baselines() -> None:
    short, long = load_grid("short"), load_grid("long")
    for task in ("baseline", "policy", "haiku", "recommend"):
        assert short.tasks[task] == long.tasks[task]


def test_the_review_grid_is_the_long_personas_on_the_review_tasks() -> None:
    long, review = load_grid("long"), load_grid("review")
    assert review.name == "review"
    assert dict(review.personas) == dict(long.personas)
    assert dict(review.tasks) == {
        key: long.tasks[key] for key in ("baseline", "arch", "plan", "proposal")
    }
    assert [cell.label for cell in review.cells] == labels(LONG_PERSONAS, LONG_TASKS[:3])
    assert len(review.cells) == 24
    assert len({grid.digest for grid in (load_grid("short"), long, review)}) == 3


@pytest.mark.parametrize(
    ("language", "said"),
    [
        ("de", "Als ein nachdenklicher Mensch: Schreibe ein Haiku über den Montagmorgen."),
        ("fr", "Réponds en tant que personne réfléchie. Écris un haïku sur les lundis matin."),
        (
            "es",
            "Responde como una persona reflexiva. Escribe un haiku sobre las mañanas de los lunes.",
        ),
        ("zh", "请以一个深思熟虑的人的身份回答：写一首关于星期一早晨的俳句。"),
    ],
)
def test_the_short_grid_in_another_language(tokenizer: Any, language: str, said: str) -> None:
    short, grid = load_grid("short"), load_grid(f"short-{language}")
    assert grid.name == f"short-{language}"
    assert [cell.label for cell in grid.cells] == [cell.label for cell in short.cells]
    assert not {*grid.tasks.values()} & {*short.tasks.values()}
    assert grid.personas["baseline"] != short.personas["baseline"]
    assert all(4 <= len(cell.markers) <= 9 for cell in grid.cells)
    assert grid.frame != short.frame
    for cell in grid.cells:
        prompts = render_cell(tokenizer, cell, ("BB", "XB", "BY", "XY", "BARE"))
        if cell.task == "haiku":
            assert f"user\n{said}<|im_end|>" in prompts["BY"].text
        assert f"user\n{cell.task_text}<|im_end|>" in prompts["BARE"].text
        persona = prompts["XY"].spans["persona"]
        ids = prompts["XY"].ids[persona.start : persona.stop]
        assert tokenizer.decode(list(ids)).strip() == cell.persona_text


def test_the_help_names_every_bundled_grid() -> None:
    assert ", ".join(BUNDLED_GRIDS) == GRIDS


def test_every_long_persona_has_the_published_markers() -> None:
    markers = load_grid("long").markers
    assert list(markers) == LONG_PERSONAS
    assert markers["engineer"][:3] == ("SPOF", "single point of failure", "single-point-of-failure")
    assert "indemnif" in markers["lawyer"]
    counts = {persona: len(words) for persona, words in markers.items()}
    assert counts == {
        "engineer": 14,
        "counselor": 14,
        "founder": 18,
        "teacher": 13,
        "journalist": 16,
        "doctor": 16,
        "lawyer": 18,
        "chef": 17,
    }
    cell = load_grid("review").cells[-1]
    assert (cell.persona, cell.markers) == ("chef", markers["chef"])


def test_a_cell_knows_the_texts_of_its_five_prompts() -> None:
    cell = load_grid("short").cells[0]
    person, advice = "a thoughtful person", "Give advice to someone facing a difficult decision."
    policy = "Comment on whether universal basic income is a good policy."
    assert cell.label == "buffett/policy"
    assert cell.texts("BB") == (person, advice)
    assert cell.texts("XB") == ("Warren Buffett", advice)
    assert cell.texts("BY") == (person, policy)
    assert cell.texts("XY") == ("Warren Buffett", policy)
    assert cell.texts("BARE") == (None, policy)


def test_cells_are_selected_in_the_order_of_the_grid() -> None:
    grid = load_grid("short")
    chosen = grid.select_cells(["yoda/haiku", "buffett/policy"])
    assert [cell.label for cell in chosen] == ["buffett/policy", "yoda/haiku"]


def test_a_cell_that_is_not_there_is_named_beside_those_that_are() -> None:
    with pytest.raises(UsageError, match="has no cell 'chef/arch'; its cells are buffett/policy, "):
        load_grid("short").select_cells(["yoda/haiku", "chef/arch"])


def test_a_grid_is_returned_as_it_is() -> None:
    grid = load_grid("short")
    assert load_grid(grid) is grid


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        UsageError, match=r"^Unknown grid 'medium'.* short, long, review, short-de, .*, or .*toml"
    ):
        load_grid("medium")


MINE = """
[personas]
baseline = "someone"
pirate = " a pirate who says \\"arr\\" "
astronomer = "an astronomer – étoiles"

[tasks]
baseline = "Say something."
joke = "Tell a joke."

[markers]
pirate = ["arr", "ye be"]
"""


def write(folder: Path, text: str, name: str = "mine.toml") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def test_a_users_file_is_a_grid_named_after_it(tmp_path: Path) -> None:
    file = write(tmp_path, MINE)
    grid = load_grid(file)
    assert load_grid(str(file)) == grid
    assert grid.name == "mine"
    assert dict(grid.personas) == {
        "baseline": "someone",
        "pirate": 'a pirate who says "arr"',
        "astronomer": "an astronomer – étoiles",
    }
    assert [cell.label for cell in grid.cells] == ["pirate/joke", "astronomer/joke"]
    assert [cell.markers for cell in grid.cells] == [("arr", "ye be"), ()]
    assert grid.cells[0].baseline_task_text == "Say something."


def test_the_digest_follows_keys_and_texts_and_not_the_name(tmp_path: Path) -> None:
    mine = load_grid(write(tmp_path, MINE))
    same = load_grid(write(tmp_path, MINE, "other.toml"))
    text = load_grid(write(tmp_path, MINE.replace("Tell a joke.", "Tell a story.")))
    key = load_grid(write(tmp_path, MINE.replace("joke =", "jest =")))
    assert isinstance(mine, Grid)
    assert mine.digest == same.digest
    assert len({mine.digest, text.digest, key.digest}) == 3


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('baseline = "someone"', "", r"\[personas\] has no entry called 'baseline'"),
        ('baseline = "Say something."', "", r"\[tasks\] has no entry called 'baseline'"),
        ('joke = "Tell a joke."', "", r"\[tasks\] has no entry beside 'baseline'"),
        ('"someone"', '""', r"personas\.baseline: .*at least 1 character"),
        ('"someone"', '"   "', r"personas\.baseline: .*at least 1 character"),
        ('"Tell a joke."', "7", r"tasks\.joke: .*valid string"),
        ("[tasks]", "[questions]", "(tasks: Field required|table 'questions')"),
        ("[markers]", "[colours]\n[markers]", "it has a table 'colours'"),
        ("joke =", "'a/b' =", r"the key 'tasks\.a/b' holds more than letters"),
        ("joke =", "'a b' =", r"the key 'tasks\.a b' holds more than letters"),
        ("joke =", "'' =", "the key 'tasks.*holds more than letters"),
        ("\npirate = [", "\nchef = [", r"\[markers\] names the persona 'chef', which \[personas\]"),
        ('["arr", "ye be"]', '["arr", ""]', r"markers\.pirate\.1: .*at least 1 character"),
        ('["arr", "ye be"]', '"arr"', r"markers\.pirate: .*valid list"),
    ],
)
def test_a_file_that_breaks_the_format_is_told_where(
    tmp_path: Path, old: str, new: str, sentence: str
) -> None:
    assert MINE.count(old) == 1
    file = write(tmp_path, MINE.replace(old, new))
    with pytest.raises(UsageError, match=rf"mine\.toml' is not a grid: .*{sentence}") as caught:
        load_grid(file)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message


def test_a_grid_without_any_table_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a grid: personas: Field required"):
        load_grid(write(tmp_path, ""))


@pytest.mark.parametrize("text", ["[personas", "a = ", MINE.replace("[tasks]", "[personas]")])
def test_a_file_that_is_not_toml_is_told_so(tmp_path: Path, text: str) -> None:
    with pytest.raises(
        UsageError, match=r"mine\.toml' is not valid TOML: .*line|is not valid TOML"
    ):
        load_grid(write(tmp_path, text))


def test_a_file_that_is_not_text_is_told_so(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(b"\xff\xfe\x00[personas]")
    with pytest.raises(UsageError, match="cannot be read"):
        load_grid(file)


def test_a_missing_file_and_a_folder_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.toml' cannot be read: .*No such file"):
        load_grid(tmp_path / "absent.toml")
    folder = tmp_path / "folder.toml"
    folder.mkdir()
    with pytest.raises(UsageError, match=r"folder\.toml' cannot be read: .*directory"):
        load_grid(folder)
    with pytest.raises(UsageError, match="Unknown grid"):
        load_grid(tmp_path)
