"""Questions from every kind of file, and what is wrong with one that cannot be used."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from persona_nns.errors import PersonaError, UsageError
from persona_nns.prompts.questions import load_questions, name_questions

ROW: dict[str, Any] = {
    "question": "Two and two?",
    "subject": "sums",
    "choices": ["3", "4", "5, or “so”", "6"],
    "answer": 1,
}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_the_bundled_questions_are_read_in_their_order() -> None:
    questions = load_questions("bundled")
    assert len(questions) == 48
    assert questions[0].question == "What is the capital of France?"
    assert questions[0].choices[questions[0].answer] == "Paris"


def test_a_jsonl_and_a_csv_file_give_the_same_questions(tmp_path: Path) -> None:
    (only,) = load_questions(write(tmp_path / "q.jsonl", ROW))
    assert (only.question, only.subject, only.answer) == ("Two and two?", "sums", 1)
    assert only.choices == tuple(ROW["choices"])
    for choices in (json.dumps(ROW["choices"]), str(ROW["choices"])):
        quoted = choices.replace('"', '""')
        text = f'subject,question,choices,answer\nsums,Two and two?,"{quoted}",1\n'
        (tmp_path / "q.csv").write_text(text, encoding="utf-8")
        assert load_questions(tmp_path / "q.csv") == (only,)


def test_a_parquet_file_gives_the_same_questions(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pandas as pd

    pd.DataFrame([ROW]).to_parquet(tmp_path / "q.parquet")
    assert load_questions(tmp_path / "q.parquet") == load_questions(
        write(tmp_path / "q.jsonl", ROW)
    )


def test_what_a_parquet_file_leaves_out_may_be_null(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pandas as pd

    file = tmp_path / "q.parquet"
    pd.DataFrame([{**ROW, "subject": None}, ROW]).to_parquet(file)
    assert [question.subject for question in load_questions(file)] == ["", "sums"]
    for choices, sentence in ((None, "has no 'choices'"), ("abcd", "choices is 'abcd'")):
        pd.DataFrame([{**ROW, "choices": choices}]).to_parquet(file)
        with pytest.raises(UsageError, match=f"Row 1 .*{sentence}"):
            load_questions(file)
    file.write_bytes(b"nonsense")
    with pytest.raises(UsageError, match="is no parquet file"):
        load_questions(file)


def test_a_parquet_file_of_the_hub_gives_the_same_questions(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    features = {"answer": {"names": ["A", "B", "C", "D"], "_type": "ClassLabel"}}
    schema = pyarrow.schema(
        {
            "question": pyarrow.string(),
            "subject": pyarrow.string(),
            "choices": pyarrow.list_(pyarrow.string()),
            "answer": pyarrow.int64(),
        },
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    file = tmp_path / "dev-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([ROW], schema), file)
    assert load_questions(file) == load_questions(write(tmp_path / "q.jsonl", ROW))


@pytest.mark.parametrize("letter", ["B", "b", " B "])
def test_an_answer_may_be_a_letter(tmp_path: Path, letter: str) -> None:
    (question,) = load_questions(write(tmp_path / "q.jsonl", {**ROW, "answer": letter}))
    assert question.answer == 1
    quoted = json.dumps(ROW["choices"]).replace('"', '""')
    (tmp_path / "q.csv").write_text(f'question,choices,answer\nq,"{quoted}",{letter}\n')
    assert load_questions(tmp_path / "q.csv")[0].answer == 1


def test_the_first_files_of_mmlu_have_no_heading(tmp_path: Path) -> None:
    file = tmp_path / "abstract_algebra_dev.csv"
    file.write_text('"Find Z_3[x],\nif any.",0,1,2,3,B\nEight?,"5, 5",6,7,8,D\n')
    first, second = load_questions(file)
    assert first.question == "Find Z_3[x],\nif any."
    assert (first.choices, first.answer) == (("0", "1", "2", "3"), 1)
    assert (second.choices, second.answer) == (("5, 5", "6", "7", "8"), 3)
    assert {first.subject, second.subject} == {"abstract_algebra"}
    for line, sentence in (
        ("Nine?,1,2,3,4", "Row 2 .* has 5 fields; without a heading they are six"),
        ("Nine?,1,2,3,4,E", "Row 2 .*: answer is 'E'"),
        ("Nine?,1,2,,4,D", "Row 2 .*: choices .*choice C is blank"),
    ):
        file.write_text(f"Eight?,5,6,7,8,D\n{line}\n")
        with pytest.raises(UsageError, match=sentence):
            load_questions(file)


def test_a_heading_of_six_columns_is_no_question(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("question,answer,A,B,C,D\nq,A,1,2,3,4\n")
    with pytest.raises(UsageError, match=r"Row 1 .* has no 'choices'"):
        load_questions(tmp_path / "q.csv")


def test_any_line_break_inside_a_text_belongs_to_it(tmp_path: Path) -> None:
    text = "One\u2028two\u0085three\x0cfour\r\nfive?"
    row = json.dumps({**ROW, "question": text.replace("\r\n", "")}, ensure_ascii=False)
    (tmp_path / "q.jsonl").write_text(f"{row}\r\n", encoding="utf-8", newline="")
    assert load_questions(tmp_path / "q.jsonl")[0].question == text.replace("\r\n", "")
    quoted = json.dumps(ROW["choices"], ensure_ascii=False).replace('"', '""')
    table = f'question,choices,answer\r\n"{text}","{quoted}",1\r\n'
    (tmp_path / "q.csv").write_text(table, encoding="utf-8", newline="")
    assert load_questions(tmp_path / "q.csv")[0].question == text


def test_choices_may_be_numbers(tmp_path: Path) -> None:
    (question,) = load_questions(write(tmp_path / "q.jsonl", {**ROW, "choices": [1, 2, 2.5, 3]}))
    assert question.choices == ("1", "2", "2.5", "3")


@pytest.mark.parametrize("choices", ["[1.10, 2.00, 3, 4]", "[1e3, 2, 3, 4]", "[NaN, 1, 2, 3]"])
@pytest.mark.parametrize("column", ["choices", "question", "subject"])
def test_a_number_whose_text_would_change_is_refused(
    tmp_path: Path, choices: str, column: str
) -> None:
    value = choices if column == "choices" else choices[1:-1].partition(",")[0]
    plain = {name: text for name, text in ROW.items() if name != column}
    line = f'{json.dumps(plain)[:-1]}, "{column}": {value}}}'
    (tmp_path / "q.jsonl").write_text(f"{json.dumps(ROW)}\n{line}\n")
    message = f"Row 2 of .*q.jsonl': {column} is .*(put it in quotes|that is finite)"
    with pytest.raises(UsageError, match=message):
        load_questions(tmp_path / "q.jsonl")


@pytest.mark.parametrize(
    "choices",
    [
        *("[1.10, 2.00, 3, 4]", "['a', 1.10, 'b', 'c']", "('a', 0x10, 'b', 'c')"),
        *("[NaN, 1, 2, 3]", "['a', nan, 'b', 'c']", "[1_000, 2, 3, 4,]"),
        *("{'a', 'b', 'c', 'd'}", "{'a': 1, 'b': 2, 'c': 3, 'd': 4}", '{"a": 1}', "'abcd'", "4"),
        *("frozenset(('a', 'b', 'c', 'd'))", "['a', '', 'b', 'c']", "['a', '\u2003', 'b', 'c']"),
        *("[True, False, 'a', 'b']", "[None, 'a', 'b', 'c']", "a b c d", ""),
    ],
)
def test_choices_of_a_csv_file_that_are_no_four_texts_are_refused(
    tmp_path: Path, choices: str
) -> None:
    quoted = choices.replace('"', '""')
    text = f'question,choices,answer\nq,"[1, 2.5, -3, ""d""]",1\nq,"{quoted}",1\n'
    (tmp_path / "q.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=r"Row 2 of .*q.csv'.*choices"):
        load_questions(tmp_path / "q.csv")


def test_numbers_that_keep_their_text_and_columns_of_others_are_let_through(tmp_path: Path) -> None:
    quoted = "\"(1, 2.5, -3, 'd')\""
    (tmp_path / "q.csv").write_text(f"question,choices,answer,nan\nq,{quoted},1,nan\n")
    assert load_questions(tmp_path / "q.csv")[0].choices == ("1", "2.5", "-3", "d")
    line = f'{json.dumps(ROW)[:-1]}, "difficulty": 1.10, "author": NaN}}'
    (tmp_path / "q.jsonl").write_text(line)
    assert load_questions(tmp_path / "q.jsonl")[0].answer == 1


def test_a_number_of_a_parquet_file_that_is_none_is_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    row = {**ROW, "choices": [1.0, float("nan"), 2.0, 3.0]}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "q.parquet")
    with pytest.raises(UsageError, match=r"Row 1 of .*: choices is .*that is finite"):
        load_questions(tmp_path / "q.parquet")


def test_mmlu_comes_from_the_test_split_of_a_subject(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*arguments: Any, split: str) -> list[dict[str, Any]]:
        asked.append((*arguments, split))
        if arguments[1] == "magic":
            raise ValueError("BuilderConfig 'magic' not found.")
        return [ROW]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_questions("mmlu:anatomy")[0].question == "Two and two?"
    load_questions("mmlu")
    assert asked == [("cais/mmlu", "anatomy", "test"), ("cais/mmlu", "all", "test")]
    with pytest.raises(PersonaError, match="subject 'magic' could not be loaded: BuilderConfig"):
        load_questions("mmlu:magic")


def test_without_the_package_mmlu_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="needs the package 'datasets'"):
        load_questions("mmlu")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"answer": None}, "Row 2 of .* has no 'answer'"),
        ({"choices": None}, "Row 2 of .* has no 'choices'"),
        ({"question": None}, "Row 2 of .* has no 'question'"),
        ({"answer": 4}, "Row 2 .*: answer is 4: .* less than or equal to 3"),
        ({"answer": -1}, "Row 2 .*: answer is -1"),
        ({"answer": "E"}, "Row 2 .*: answer is 'E'"),
        ({"choices": ["a", "b", "c"]}, "Row 2 .*: choices is .*at least 4 items"),
        ({"choices": ["a", "b", "c", "d", "e"]}, "Row 2 .*: choices is .*at most 4 items"),
        ({"question": ""}, "Row 2 .*: question is ''"),
        ({"question": " \n"}, "Row 2 .*: question is .*blank"),
        ({"choices": ["a", "", "c", "d"]}, "Row 2 .*: choices is .*choice B is blank"),
        ({"choices": ["a", "b", "c", "\u2028"]}, "Row 2 .*: choices is .*choice D is blank"),
        ({"choices": "abcd"}, "Row 2 .*: choices is 'abcd': .*has to be a list"),
        ({"choices": {"a": 1, "b": 2, "c": 3, "d": 4}}, "Row 2 .*: choices .*has to be a list"),
        ({"answer": True}, "Row 2 .*: answer is True: .*index of a choice"),
    ],
)
def test_a_row_that_is_no_question_says_why(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    row = {name: value for name, value in {**ROW, **change}.items() if value is not None}
    with pytest.raises(UsageError, match=sentence):
        load_questions(write(tmp_path / "q.jsonl", ROW, row))


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "list.jsonl").write_text("[1]")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.csv").write_text("question,choices,answer\nq,a b c d,1\n")
    (tmp_path / "long.csv").write_text(f"question,choices,answer\n{'q' * 200_000},[],1\n")
    (tmp_path / "missing.csv").write_text("question,answer\nq,1\n")
    for name, sentence in (
        ("bad.jsonl", "Line 1 of .* is not JSON"),
        ("list.jsonl", "Line 1 of .* is no JSON object"),
        ("empty.jsonl", "There are no questions"),
        ("none.jsonl", "cannot be read"),
        ("bad.csv", "which is no list"),
        ("missing.csv", "has no 'choices'"),
        ("long.csv", "is no CSV file: field larger"),
        ("q.txt", "Unknown questions .* use 'bundled'"),
    ):
        with pytest.raises(UsageError, match=sentence):
            load_questions(tmp_path / name)


def test_a_source_has_a_short_name() -> None:
    assert name_questions("mmlu:anatomy") == "mmlu-anatomy"
    assert name_questions("bundled") == "bundled"
    assert name_questions("some/folder/mine.jsonl") == "mine"
