"""Scores by words of one's own, without a judge."""

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nnsight import TransformersModel
from typer.testing import CliRunner

import persona_nns as pn
from persona_nns.cli.commands import app
from persona_nns.errors import UsageError
from persona_nns.traits import JudgeOptions
from persona_nns.traits.judges import Answer
from persona_nns.traits.rows import rows_of_file
from persona_nns.traits.trait import load_traits
from persona_nns.traits.word_judge import WordJudge, read_words

TERSE = load_traits("terse", "extraction")[0]
PIRATE = replace(TERSE, name="pirate")
WORDS = {"pirate": ["arr", "ye be", "sea-dog"], "terse": ["briefly"]}


def write(file: Path, words: Any) -> str:
    if file.suffix.lower() == ".json":
        file.write_text(json.dumps(words))
    else:
        file.write_text("".join(f"{trait} = {json.dumps(of)}\n" for trait, of in words.items()))
    return str(file)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Arr! Who are you? Ye be a sea-dogs' friend. I see.", 50.0),
        ("Barred arrows.", 0.0),  # a word alone stands on word boundaries
        ("Maybe be; eye bees", 100.0),  # one with a space is looked for as it is
        ("ARR, arr and arr. No.", 50.0),  # a sentence counts once
        ("arr", 100.0),
        ("", 0.0),
    ],
)
def test_the_score_is_the_share_of_sentences_with_a_word(
    tmp_path: Path, answer: str, score: float
) -> None:
    judge = WordJudge(write(tmp_path / "w.toml", WORDS))
    with pytest.warns(UserWarning, match="Words tell nothing of coherence: it is NaN"):
        scores = judge.scores(PIRATE, [Answer("Who?", answer)])
    assert scores.trait == (score,)
    assert math.isnan(scores.coherence[0])


@pytest.mark.parametrize("name", ["w.toml", "w.json", "W.JSON"])
def test_words_are_read_from_toml_and_json(tmp_path: Path, name: str) -> None:
    assert read_words(write(tmp_path / name, WORDS)) == WORDS


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("w.csv", "a,b", "w.csv' is no .toml or .json file"),
        ("w.toml", "pirate = [", "w.toml' is not valid TOML"),
        ("w.json", "{", "w.json' cannot be read: .*line 1"),
        ("w.json", "[]", "has no traits; each needs a list of words"),
        ("w.toml", 'pirate = "arr"', "pirate is 'arr'; it has to be a list of words"),
        ("w.json", '{"pirate": []}', "pirate is .*; it has to be a list of words"),
        ("w.json", '{"pirate": ["arr", " "]}', "pirate is .*; it has to be a list of words"),
    ],
)
def test_what_is_no_list_of_words_is_one_sentence(
    tmp_path: Path, name: str, text: str, sentence: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=sentence) as caught:
        JudgeOptions("classifier:lexicon", judge_words=str(tmp_path / name)).check("pirate")
    assert "\n" not in str(caught.value)


def test_words_go_with_their_judge_and_trait(tmp_path: Path) -> None:
    file = write(tmp_path / "w.toml", WORDS)
    judging = JudgeOptions("classifier:lexicon", judge_words=file)
    judging.check("pirate", ["any question"])
    with pytest.raises(UsageError, match=r"has none for 'evil', only for pirate, terse"):
        judging.check("evil")
    with pytest.raises(UsageError, match=r"needs a file .*\(--judge-words FILE\)"):
        JudgeOptions("classifier:lexicon").check("pirate")
    with pytest.raises(UsageError, match="are for --judge classifier:lexicon, not for 'lexicon'"):
        JudgeOptions(judge_words=file).check("terse")
    with pytest.raises(UsageError, match="'classifier:lexicon' with --judge-words FILE, or a"):
        JudgeOptions(f"classifier:lexicon:{file}").check("terse")


def test_other_words_are_another_judge(tmp_path: Path) -> None:
    known = {
        name: JudgeOptions("classifier:lexicon", judge_words=write(tmp_path / name, words)).identity
        for name, words in (
            ("a.toml", WORDS), ("b.json", WORDS), ("c.json", {**WORDS, "pirate": ["arr"]})
        )
    }  # fmt: skip
    assert known["a.toml"] == known["b.json"] != known["c.json"]


def test_pairs_are_kept_by_the_trait_alone_where_nobody_judged_coherence(tmp_path: Path) -> None:
    said = [("pos", "Arr, I sail."), ("neg", "I walk."), ("pos", "I walk."), ("neg", "I walk.")]
    rows = [
        {
            "pair": 0, "question_id": k // 2, "label": label, "system": "", "question": "How?",
            "response": text,
        }
        for k, (label, text) in enumerate(said)
    ]  # fmt: skip
    (tmp_path / "pirate.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    judging = JudgeOptions("classifier:lexicon", judge_words=write(tmp_path / "w.json", WORDS))
    with pytest.warns(UserWarning, match="Nobody judged coherence: pairs are kept by their trait"):
        judged = rows_of_file(tmp_path / "pirate.jsonl", PIRATE, judging)
    assert [row.kept for row in judged] == [True, True, False, False]
    assert [row.trait for row in judged] == [100.0, 0.0, 0.0, 0.0]
    assert all(math.isnan(row.coherence) for row in judged)


def test_any_model_is_scored_by_words_from_the_start_or_later(
    tmp_path: Path, golden_model: Callable[[str], TransformersModel]
) -> None:
    file, store = write(tmp_path / "w.toml", {"terse": ["a", "the", "e"]}), str(tmp_path / "s.zarr")
    asking: dict[str, Any] = {"trait": "terse", "split": "evaluation", "max_new_tokens": 6}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pn.run("trait_responses", golden_model("qwen2"), store=store, judge="none", **asking)
        how = ["--judge", "classifier:lexicon", "--judge-words", file]
        done = CliRunner().invoke(app, ["rescore", store, "trait_responses", *how])
        assert done.exit_code == 0, done.output
        by_words: dict[str, Any] = {"judge": "classifier:lexicon", "judge_words": file}
        scored = pn.run("trait_responses", golden_model("qwen2"), store=store, **asking, **by_words)
    assert len(pn.list_runs(store)) == 2  # what was judged later is this run
    said = [Answer("", text) for text in scored.response.values.ravel()]
    with pytest.warns(UserWarning, match="coherence"):
        expected = WordJudge(file).scores(TERSE, said).trait
    assert scored.score.values.ravel().tolist() == pytest.approx(expected)
    assert len(set(expected)) > 1
    assert bool(scored.coherence.isnull().all())
