"""Every file that is read takes what editors and other tools write, or says what is wrong where."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from persona_nns.errors import UsageError
from persona_nns.organism.bundled import load_artifact
from persona_nns.prompts import load_grid, load_identities, load_questions, name_questions
from persona_nns.prompts.files import read_text, stem_of, suffix_of
from persona_nns.traits import is_rows_file, read_responses, read_trait

BREAKS = "one\u2028two\u2029three\u0085four\x0bfive\x0csix\x1cseven\x1deight\x1enine"
INSIDE_TOML = "one\u2028two\u2029three\u0085four"  # TOML has no other control characters
RESPONSE = {"pair": 0, "question_id": 0, "label": "pos", "system": "", "question": "Why?"}
CHOICES = ["3", BREAKS, "5", "6"]
QUESTION = {"question": BREAKS, "choices": CHOICES, "answer": 1}
QUOTED = json.dumps(CHOICES, ensure_ascii=False).replace('"', '""')
TABLE = f'question,choices,answer\n"{BREAKS}","{QUOTED}",1\n'


def json_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def trait_json() -> str:
    trait = load_artifact("terse", "extraction")
    trait["questions"][0] = BREAKS
    return json.dumps(trait, ensure_ascii=False, indent=1)


GRID = '[personas]\nbaseline = "one"\nchef = "{}"\n[tasks]\nbaseline = "do"\nhaiku = "sing"\n'
# Name → what is in it, how it is read, and the text with the line breaks that comes out.
READ: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "calm.jsonl": (
        json_line({**RESPONSE, "response": BREAKS}),
        lambda file: read_responses(file)[0].response,
        BREAKS,
    ),
    "calm.jsonl.gz": (
        json_line({**RESPONSE, "response": BREAKS}),
        lambda file: read_responses(file)[0].response,
        BREAKS,
    ),
    "q.jsonl": (json_line(QUESTION), lambda file: load_questions(file)[0].question, BREAKS),
    "q.jsonl.gz": (json_line(QUESTION), lambda file: load_questions(file)[0].choices[1], BREAKS),
    "q.csv": (TABLE, lambda file: load_questions(file)[0].choices[1], BREAKS),
    "q.csv.gz": (TABLE, lambda file: load_questions(file)[0].question, BREAKS),
    "terse.json": (trait_json(), lambda file: read_trait(file).questions[0], BREAKS),
    "who.txt": (f"good\n{BREAKS}\n", lambda file: load_identities(file)[1], BREAKS),
    "g.toml": (
        GRID.format(INSIDE_TOML),
        lambda file: load_grid(file).personas["chef"],
        INSIDE_TOML,
    ),
}


def write(file: Path, text: str, *, mark: bool = False, end: str = "\n") -> Path:
    data = text.replace("\n", end).encode("utf-8-sig" if mark else "utf-8")
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [False, True])
@pytest.mark.parametrize("name", READ)
def test_marks_line_ends_and_breaks_inside_a_text_are_read(
    tmp_path: Path, name: str, mark: bool, end: str
) -> None:
    text, read, expected = READ[name]
    assert read(write(tmp_path / name, text, mark=mark, end=end)) == expected


@pytest.mark.parametrize("name", READ)
def test_what_is_not_utf_8_says_where(tmp_path: Path, name: str) -> None:
    file, (text, read, _) = tmp_path / name, READ[name]
    zipped = gzip.compress if file.suffix == ".gz" else bytes
    file.write_bytes(zipped(b"first\nsecond\nthi\xe9rd\n"))
    with pytest.raises(UsageError, match=rf"{name}' cannot be read: line 3 is not UTF-8"):
        read(file)
    file.write_bytes(zipped(text.encode("utf-16")))
    with pytest.raises(UsageError, match=rf"{name}' cannot be read: it is UTF-16; save it as"):
        read(file)
    file.unlink()
    with pytest.raises(UsageError, match=rf"{name}' cannot be read: No such file"):
        read(file)


def test_what_is_no_json_says_the_line_and_the_reason(tmp_path: Path) -> None:
    for name, text, message in (
        ("a.jsonl", "{}\n\n{no\n", "Line 3 of .*a.jsonl' is no JSON object: .*Expecting"),
        ("a.jsonl", "\n[1]\n", "Line 2 of .*a.jsonl' is no JSON object"),
        ("a.jsonl", "[" * 99_999, "Line 1 of .*nested too deeply"),
    ):
        file = write(tmp_path / name, text)
        for read in (read_responses, load_questions):
            with pytest.raises(UsageError, match=message):
                read(file)
    with pytest.raises(UsageError, match=r"t.json' cannot be read: Expecting .* line 2"):
        read_trait(write(tmp_path / "t.json", '{"a": 1,\n'))
    rows = json_line({**RESPONSE, "response": "x"}) + "\n" + json_line(RESPONSE)
    with pytest.raises(UsageError, match=r"lacks response: line 3 of .*b.jsonl'"):
        read_responses(write(tmp_path / "b.jsonl", rows))
    rows = json_line(QUESTION) + "\n" + json_line({**QUESTION, "answer": 9})
    with pytest.raises(UsageError, match=r"Row 3 of .*q.jsonl': answer is 9"):
        load_questions(write(tmp_path / "q.jsonl", rows))


def test_a_broken_gzip_file_is_said(tmp_path: Path) -> None:
    whole = gzip.compress(json_line({**RESPONSE, "response": "x" * 999}).encode())
    for data in (b"no gzip", whole[:-12], whole[:20] + b"!!!!" + whole[24:], b""):
        (tmp_path / "a.jsonl.gz").write_bytes(data)
        with pytest.raises(UsageError, match=r"a.jsonl.gz' (cannot be read|holds no responses)"):
            read_responses(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("name", ["evil_pos_instruct.csv", "a.json", "a.parquet", "a.txt", "a.gz"])
def test_answers_in_another_format_are_refused_with_those_that_are_read(
    tmp_path: Path, name: str
) -> None:
    table = "question,prompt,answer,question_id,evil,coherence\nWhy?,<s>,So.,evil_0,80.0,90.0\n"
    file = write(tmp_path / name, table)
    for read in (read_responses, is_rows_file):
        with pytest.raises(UsageError, match=rf"\.jsonl or \.jsonl\.gz file .*{name}' is neither"):
            read(file)


def test_a_store_is_no_file_of_answers(tmp_path: Path) -> None:
    for store in ("stores/results.zarr", "s3://bucket/rows.jsonl", tmp_path, "results"):
        assert not is_rows_file(store)
    assert is_rows_file("gone.jsonl")
    assert is_rows_file("GONE.JSONL.GZ")


def test_names_of_files_have_an_ending_and_a_stem() -> None:
    assert [suffix_of(name) for name in ("a.b.JSONL", "a.jsonl.gz", "a", "x/y.z/a.csv")] == [
        *(".jsonl", ".jsonl.gz", "", ".csv")
    ]
    assert [stem_of(name) for name in ("x/a.b.JSONL", "a.jsonl.gz", "a", ".txt")] == [
        *("a.b", "a", "a", ".txt")
    ]
    assert name_questions("x/mine.jsonl.gz") == "mine"


def test_a_folder_and_what_can_be_no_path_are_refused(tmp_path: Path) -> None:
    for file in (tmp_path, "a\0b", "x" * 999, "~nobody-of-this-name/x"):
        with pytest.raises(UsageError, match=r"The text .* cannot be read: "):
            read_text(file, "The text")
