import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnsight import TransformersModel
from safetensors.torch import save_file

from persona_nns.errors import UsageError
from persona_nns.organism.bundled import load_artifact
from persona_nns.organism.trait_questions import QUESTIONS
from persona_nns.runs import plan_run
from persona_nns.traits.directions import load_vector
from persona_nns.traits.responses import Response, read_responses
from persona_nns.traits.trait import (
    bundled_traits,
    check_held_out,
    extraction_questions,
    half_of,
    load_traits,
    read_trait,
)
from persona_nns.traits.vectors import read_vector, write_vector

VECTOR = torch.arange(12.0).reshape(3, 4) / 7


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".safetensors"])
def test_a_vector_survives_its_file(tmp_path: Path, suffix: str) -> None:
    write_vector(VECTOR, tmp_path / f"v{suffix}")
    assert torch.equal(read_vector(tmp_path / f"v{suffix}"), VECTOR)


def test_a_bfloat16_vector_is_read_in_float32(tmp_path: Path) -> None:
    torch.save(VECTOR.bfloat16(), tmp_path / "v.pt")
    read = read_vector(tmp_path / "v.pt")
    assert read.dtype == torch.float32
    assert torch.equal(read, VECTOR.bfloat16().float())


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sparse_vector_is_read_with_its_zeros(
    tmp_path: Path, layout: torch.layout, dtype: torch.dtype
) -> None:
    torch.save(VECTOR.to(dtype).to_sparse(layout=layout), tmp_path / "v.pt")
    read = read_vector(tmp_path / "v.pt")
    assert read.layout is torch.strided
    assert torch.equal(read, VECTOR)


def test_a_parameter_and_small_floats_are_read_as_plain_numbers(tmp_path: Path) -> None:
    torch.save(torch.nn.Parameter(VECTOR), tmp_path / "v.PT")
    read = read_vector(tmp_path / "v.PT")
    assert not read.requires_grad
    assert torch.equal(read, VECTOR)
    torch.save(VECTOR.to(torch.float8_e4m3fn), tmp_path / "v.pt")
    assert torch.equal(read_vector(tmp_path / "v.pt"), VECTOR.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("name", ["v.pth", "v.npz", "v.bin", "v", "v.json"])
def test_a_vector_in_another_format_is_refused_with_those_that_are_read(
    tmp_path: Path, name: str
) -> None:
    source = str(tmp_path / name)
    with pytest.raises(UsageError, match=r"nothing at .*\.npy, \.pt, \.safetensors or \.gguf file"):
        load_vector(source, "terse", "response_avg", "m")
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=r"ends in none of \.npy, \.pt, \.safetensors, \.gguf"):
        load_vector(source, "terse", "response_avg", "m")


class Malice:
    def __reduce__(self) -> Any:
        return (print, ("this file ran code",))


def test_a_file_that_runs_code_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(Malice(), tmp_path / "v.pt")
    np.save(tmp_path / "v.npy", np.array([Malice()], dtype=object), allow_pickle=True)
    for name in ("v.pt", "v.npy"):
        with pytest.raises(UsageError, match=r"cannot be read.*no pickle is ever loaded") as caught:
            read_vector(tmp_path / name)
        assert "weights_only" not in str(caught.value)
        assert "allow_pickle" not in str(caught.value)
    assert "ran code" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("v.pt", torch.zeros(3), r"holds \[3\]"),
        ("v.pt", {"v": torch.zeros(3, 4)}, "holds dict"),
        ("v.pt", torch.zeros(3, 4, dtype=torch.long), r"holds \[3, 4\]"),
        ("v.pt", torch.zeros(3, 4, 5).to_sparse(), r"holds \[3, 4, 5\]"),
        ("v.pt", torch.zeros(3, 4, dtype=torch.long).to_sparse(), r"holds \[3, 4\]"),
        ("v.pt", torch.full((3, 4), torch.inf).to_sparse(), "not finite"),
        ("v.pt", torch.zeros(3, 4, device="meta"), "without numbers"),
        ("v.pt", torch.zeros(3, 4, dtype=torch.complex64), r"holds \[3, 4\]"),
        ("v.pt", torch.full((3, 4), torch.nan), "not finite"),
        ("v.pt", b"nonsense", "cannot be read"),
        ("v.pt", b"junk", "cannot be read"),
        ("v.pt", b"", "cannot be read"),
        ("v.npy", b"nonsense", "cannot be read"),
        ("v.safetensors", b"nonsense", "cannot be read"),
        ("v.csv", b"1,2", "ends in none of"),
        ("v.npy", None, "does not exist"),
    ],
)
def test_what_is_no_vector_is_refused(
    tmp_path: Path, name: str, content: Any, message: str
) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(UsageError, match=message):
        read_vector(tmp_path / name)


def test_a_safetensors_file_with_several_tensors_is_refused(tmp_path: Path) -> None:
    save_file({"a": VECTOR, "b": VECTOR.clone()}, tmp_path / "v.safetensors")
    with pytest.raises(UsageError, match=r"2 tensors \(a, b\)"):
        read_vector(tmp_path / "v.safetensors")


@pytest.mark.parametrize("split", ["extraction", "evaluation"])
def test_bundled_traits_are_the_shipped_artifacts(split: Any) -> None:
    assert bundled_traits() == ("cheerful", "sycophantic", "terse")
    for trait in load_traits("cheerful,terse,sycophantic", split):
        file = load_artifact(trait.name, split)
        assert list(trait.questions) == file["questions"] == list(QUESTIONS[trait.name, split])
        assert trait.eval_prompt == file["eval_prompt"]
        first = file["instruction"][0]
        assert trait.system(0, "pos") == f"You are a {trait.name} assistant. {first['pos']}"
        assert trait.system(0, "neg") == f"You are a helpful assistant. {first['neg']}"


def test_a_trait_of_ones_own_is_read_from_its_file(tmp_path: Path) -> None:
    trait = replace(load_traits("terse", "extraction")[0], name="laconic")
    file = tmp_path / "extraction" / "laconic.json"
    file.parent.mkdir()
    file.write_text(json.dumps(load_artifact("terse", "extraction")))
    assert read_trait(file) == trait
    assert load_traits("laconic", "extraction", tmp_path) == [trait]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": None}, "lacks questions"),
        ({"eval_prompt": None, "instruction": None}, "lacks instruction, eval_prompt"),
        ({"questions": []}, "questions is an empty list; it has to be a list"),
        ({"questions": "How?"}, "questions is 'How\\?'; it has to be a list"),
        ({"questions": ["How?"] * 19 + [""]}, "texts that are not empty"),
        ({"instruction": {"pos": "a", "neg": "b"}}, "instruction is .*; it has to be a list"),
        (
            {"instruction": [{"pos": "a"}] * 5},
            "needs the texts 'pos' and 'neg' .a role, not a trait",
        ),
        ({"eval_prompt": "Rate {answer}."}, r"with \{question\} and \{answer\}"),
    ],
)
def test_files_that_are_not_in_the_format_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    data = {**load_artifact("terse", "extraction"), **change}
    file = tmp_path / "extraction" / "odd.json"
    file.parent.mkdir()
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
    with pytest.raises(UsageError, match=message):
        load_traits("odd", "extraction", tmp_path)


#: The shape of the assistant-axis code's files: one list of questions, any number of each.
WHOLE = {
    "instruction": [
        {"pos": f"Be {word}.", "neg": "Be {model_name}."} for word in ("sharp", "acid")
    ],
    "questions": [f"What about {thing}?" for thing in ("art", "rain", "trains", "tea", "jazz")],
    "eval_prompt": "Is it acerbic?\n{question}\n{answer}\nOne number from 0 to 100.",
}


def write_trait(file: Path, data: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data))
    return file


def test_a_trait_file_may_have_any_number_of_questions_and_instructions(tmp_path: Path) -> None:
    trait = read_trait(write_trait(tmp_path / "acerbic.json", WHOLE))
    assert (trait.name, len(trait.pairs), len(trait.questions)) == ("acerbic", 2, 5)
    assert trait.system(1, "neg") == "You are a helpful assistant. Be {model_name}."
    named = trait.of_model("org/m-7b")
    assert named.pairs == (("Be sharp.", "Be org/m-7b."), ("Be acid.", "Be org/m-7b."))
    assert named.questions == trait.questions


def test_one_list_of_questions_is_divided_by_a_seed_into_halves(tmp_path: Path) -> None:
    write_trait(tmp_path / "acerbic.json", WHOLE)
    halves = {
        seed: tuple(
            load_traits("acerbic", split, tmp_path, seed)[0].questions
            for split in ("extraction", "evaluation")
        )
        for seed in range(20)
    }
    for extraction, evaluation in halves.values():
        assert (len(extraction), len(evaluation)) == (3, 2)
        assert not set(extraction) & set(evaluation)
        kept = [each for each in WHOLE["questions"] if each in extraction]
        assert list(extraction) == kept  # in the order of the file
    assert len(set(halves.values())) > 5  # of the 10 that there are
    # The rule, computed by itself.
    order = sorted(WHOLE["questions"], key=lambda text: sha256(f'[3, "{text}"]'.encode()).digest())
    assert set(halves[3][0]) == set(order[:3])
    # Neither the order of the list nor a question that is there twice moves another one.
    again = half_of([*reversed(WHOLE["questions"]), WHOLE["questions"][0]], "extraction", 3)
    assert set(again) == set(halves[3][0])
    check_held_out(
        *([replace(read_trait(tmp_path / "acerbic.json"), questions=of)] for of in halves[3])
    )
    assert extraction_questions("acerbic", tmp_path, 3) == halves[3][0]


def test_a_seed_is_needed_for_one_list_and_refused_for_two(tmp_path: Path) -> None:
    write_trait(tmp_path / "acerbic.json", WHOLE)
    write_trait(tmp_path / "one.json", {**WHOLE, "questions": ["Why?", "Why?"]})
    write_trait(tmp_path / "evaluation" / "held.json", WHOLE)
    with pytest.raises(UsageError, match=r"has one list of questions; .*--split-seed SEED\)\.$"):
        load_traits("acerbic", "extraction", tmp_path)
    with pytest.raises(UsageError, match=r"has one question alone, which cannot be divided"):
        load_traits("one", "extraction", tmp_path, 1)
    for name, folder in (("terse", None), ("held", tmp_path)):
        with pytest.raises(UsageError, match=r"in two folders of .*; leave out --split-seed\.$"):
            load_traits(name, "evaluation", folder, 1)
    assert extraction_questions("held", tmp_path) == ()


def test_the_seed_is_recorded_and_the_halves_are_asked(
    tmp_path: Path, golden_model: Callable[[str], TransformersModel]
) -> None:
    write_trait(tmp_path / "acerbic.json", WHOLE)
    asked = {
        "trait": "acerbic", "artifacts": str(tmp_path), "split_seed": 3, "judge": "none"
    }  # fmt: skip
    planned = {
        split: plan_run(
            "trait_responses",
            golden_model("qwen2"),
            store=tmp_path / "s.zarr",
            split=split,
            **asked,
        ).request
        for split in ("extraction", "evaluation")
    }
    texts = {split: request.plan.coords["question_text"][1] for split, request in planned.items()}
    assert len(texts["extraction"]) == 3
    assert sorted([*texts["extraction"], *texts["evaluation"]]) == sorted(WHOLE["questions"])
    assert planned["evaluation"].block.attrs["plan_options"]["split_seed"] == 3
    assert planned["evaluation"].block.attrs["systems"][0] == [
        "You are a acerbic assistant. Be sharp.",
        "You are a helpful assistant. Be qwen2.",
    ]


def test_unknown_traits_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Bundled are cheerful, sycophantic, terse"):
        load_traits("stoic", "extraction")
    with pytest.raises(UsageError, match="given twice"):
        load_traits("terse,terse", "extraction")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        read_trait(tmp_path / "x.json")


def test_evaluation_questions_have_to_be_held_out() -> None:
    seen, held_out = (load_traits("terse", split) for split in ("extraction", "evaluation"))
    check_held_out(seen, held_out)
    leaked = replace(held_out[0], questions=(*held_out[0].questions[:-1], seen[0].questions[0]))
    with pytest.raises(UsageError, match="in both splits"):
        check_held_out(seen, [leaked])


def test_responses_survive_their_file(tmp_path: Path) -> None:
    rows = [
        Response(0, 3, "pos", "Be “kind”.", "Wie?", "So.\nUnd so."),
        Response(0, 3, "neg", "", "Wie?", "Anders."),
    ]
    lines = "".join(f"{json.dumps(vars(row), ensure_ascii=False)}\n" for row in rows)
    (tmp_path / "kind.jsonl").write_text(lines, encoding="utf-8")
    assert read_responses(tmp_path / "kind.jsonl") == rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"system": None}, "lacks system: line 1 of"),
        ({"label": "positive"}, "is 'positive', not 'pos' or 'neg': line 1"),
        ({"pair": "0"}, "'pair' is '0' and not a whole number"),
        ({"response": ""}, "response is empty"),
        ({"question": 7}, "'question' is 7 and not a text"),
    ],
)
def test_rows_that_lack_something_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    row = {
        "pair": 0,
        "question_id": 0,
        "label": "pos",
        "system": "s",
        "question": "q",
        "response": "r",
        **change,
    }
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({key: value for key, value in row.items() if value is not None}))
    with pytest.raises(UsageError, match=message):
        read_responses(file)


def test_files_without_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="holds no responses"):
        read_responses(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_text("{no\n")
    with pytest.raises(UsageError, match=r"Line 1 of .* is no JSON"):
        read_responses(tmp_path / "x.jsonl")
