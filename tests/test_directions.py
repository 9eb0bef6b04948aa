"""Directions as things that travel: every format, names in a store, and control vectors."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from nnsight import TransformersModel
from safetensors import safe_open
from torch import Tensor

import persona_nns as pn
from persona_nns.cli.commands import main
from persona_nns.declarations.options import FileName, absolute
from persona_nns.errors import UsageError
from persona_nns.traits import Direction, load_direction, save_direction

VECTORS = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))  # of a model of 5 blocks
ABOUT = {"model": "org/m", "model_version": "ab" * 32, "architecture": "Qwen2ForCausalLM"}

#: Stands for the experiment of that name: its two arrays, with numbers that can be known again.
PERSONA_SPACE = '''
"""An axis and its components."""
import torch
from persona_nns.declarations import Plan, Variable, content_digest

protocol_version = 1
variables = {
    "axis": Variable("space layer d_model", "axis", every_layer=True),
    "component": Variable("space layer rank d_model", "component", every_layer=True),
}

class Space:
    label = "space"
    place = {"space": "roles"}

def plan(tokenizer, *, roles: str = "roles", hollow: bool = False):
    return Plan(
        name="roles", units=[Space()], axes={"space": ["roles"], "rank": [1, 2]},
        unit_axes=("space",), content={"roles": roles, "hollow": hollow},
        token_ids={"space": {"text": [1]}},
        digest=content_digest(roles),
    )

def measure(model, units, *, hollow: bool = False):
    shape = len(model.layers) + 1, model.config.hidden_size
    axis = torch.arange(float(shape[0] * shape[1])).reshape(shape)
    component = torch.stack([axis + 1, axis + 2], 1)
    return {"axis": (axis * float("nan") if hollow else axis)[None], "component": component[None]}
'''


def read_back(file: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(file)


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".safetensors", ".gguf", ".GGUF", ".NPY"])
def test_a_direction_survives_every_format(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"kind{suffix}"
    save_direction(Direction("calm", "s#calm", VECTORS, about=ABOUT), file)
    read = load_direction(str(file))
    assert torch.equal(read.vectors, VECTORS)
    assert read.vectors.dtype == torch.float32
    if suffix.lower() in (".safetensors", ".gguf"):  # the others have no place for words
        assert read.name == "calm"
        assert {key: read.about[key] for key in ABOUT} == ABOUT
    else:
        assert (read.name, dict(read.about)) == ("kind", {})


def test_a_control_vector_is_what_llama_cpp_reads(tmp_path: Path) -> None:
    """direction.N is added to the output of block N (from 0), which enters block N + 1."""
    save_direction(Direction("calm", "", VECTORS, about=ABOUT), tmp_path / "v.gguf")
    file = read_back(tmp_path / "v.gguf")
    found = {tensor.name: tensor for tensor in file.tensors}
    assert list(found) == ["direction.1", "direction.2", "direction.3"]
    for number in (1, 2, 3):
        tensor = found[f"direction.{number}"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32  # all that llama.cpp takes
        assert tensor.shape.tolist() == [4]
        np.testing.assert_array_equal(tensor.data, VECTORS[number + 1].numpy())
    fields = {name: field.contents() for name, field in file.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "qwen2"
    assert fields["controlvector.layer_count"] == 3


def write_gguf(
    file: Path, directions: dict[str, np.ndarray], count: int, arch: str = "controlvector"
) -> str:
    """As repeng's ``export_gguf`` does."""
    writer = gguf.GGUFWriter(file, arch)
    writer.add_string(f"{arch}.model_hint", "mistral")
    writer.add_uint32(f"{arch}.layer_count", count)
    for name, values in directions.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file)


def test_a_control_vector_of_another_tool_is_read(tmp_path: Path) -> None:
    rows = {f"direction.{n}": np.full(4, n, np.float32) for n in (4, 1, 2, 3)}  # of 5 blocks
    read = load_direction(write_gguf(tmp_path / "theirs.gguf", rows, 4))
    # Added to what leaves block N; what leaves the last, before the norm, is no layer of ours.
    assert read.vectors.tolist() == [[n] * 4 for n in (0, 0, 1, 2, 3, 0)]
    assert read.name == "theirs"
    # Some layers alone, and the number of the model's.
    some = {"direction.3": np.ones(4, np.float32)}
    read = load_direction(write_gguf(tmp_path / "some.gguf", some, 7))
    assert read.vectors.sum(-1).tolist() == [0, 0, 0, 0, 4, 0, 0, 0]


@pytest.mark.parametrize(
    ("rows", "arch", "message"),
    [
        ({"direction.1": (4,)}, "llama", r"architecture 'llama'; a control vector is of"),
        ({"direction.0": (4,)}, "controlvector", r"holds 'direction.0', and not directions alone"),
        ({"token_embd": (4,)}, "controlvector", r"holds 'token_embd', and not"),
        ({"direction.1": (4,), "direction.2": (5,)}, "controlvector", r"\[\(4,\), \(5,\)\]"),
        ({"direction.1": (2, 4)}, "controlvector", r"are of \[\(2, 4\)\]"),
        ({"direction.99999": (4,)}, "controlvector", r"counts 100,000 layers"),
        ({}, "controlvector", r"are of \[\]"),
    ],
)
def test_what_is_no_control_vector_is_refused(
    tmp_path: Path, rows: dict[str, tuple[int, ...]], arch: str, message: str
) -> None:
    tensors = {name: np.ones(shape, np.float32) for name, shape in rows.items()}
    with pytest.raises(UsageError, match=message):
        load_direction(write_gguf(tmp_path / "v.gguf", tensors, 1, arch))


def test_a_damaged_control_vector_is_one_sentence(tmp_path: Path) -> None:
    rows = {"direction.1": np.full(4, np.nan, np.float32)}
    with pytest.raises(UsageError, match="not finite"):
        load_direction(write_gguf(tmp_path / "v.gguf", rows, 4))
    (tmp_path / "v.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="cannot be read as GGUF"):
        load_direction(str(tmp_path / "v.gguf"))
    with pytest.raises(UsageError, match=r"a model of 2 blocks has none there"):
        save_direction(Direction("v", "", torch.ones(3, 4)), tmp_path / "few.gguf")
    assert not (tmp_path / "few.gguf").exists()


def test_files_of_pytorch_stay_plain_tensors(tmp_path: Path) -> None:
    for name in ("v.pt", "v.safetensors"):
        save_direction(Direction("calm", "", VECTORS, about=ABOUT), tmp_path / name)
    assert torch.equal(torch.load(tmp_path / "v.pt", weights_only=True), VECTORS)
    with safe_open(tmp_path / "v.safetensors", "pt") as file:
        assert list(file.keys()) == ["vector"]
        assert file.metadata()["model_version"] == ABOUT["model_version"]


@pytest.fixture(scope="module")
def store(
    tmp_path_factory: pytest.TempPathFactory, golden_model: Callable[[str], TransformersModel]
) -> str:
    """A store with two traits and a space of qwen2, and a trait of gemma2."""
    folder = tmp_path_factory.mktemp("directions")
    (folder / "persona_space.py").write_text(PERSONA_SPACE)
    rows = [
        {"pair": 0, "question_id": 0, "label": label, "system": "S.", "question": "Why?",
         "response": said}
        for label, said in (("pos", "Yes, do tea."), ("neg", "Often, tea is a common habit."))
    ]  # fmt: skip
    for trait, model in (("calm", "qwen2"), ("brisk", "qwen2"), ("calm", "gemma2")):
        file = folder / f"{trait}.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        pn.run(
            "trait_vectors",
            golden_model(model),
            responses=str(file),
            judge="none",
            store=folder / "s",
        )
    pn.run(str(folder / "persona_space.py"), golden_model("qwen2"), store=folder / "s")
    return str(folder / "s")


def stored(store: str, experiment: str, name: str, **choice: Any) -> Tensor:
    run = next(
        info.run
        for info in pn.list_runs(store, experiment)
        if info.attrs["model"] == "qwen2" and info.attrs["grid"] in ("calm", "roles")
    )
    found = pn.open_results(store, experiment, run=run)[name].sel(choice)
    return torch.from_numpy(found.squeeze(drop=True).transpose("layer", "d_model").values)


def test_directions_of_a_store_by_name(store: str) -> None:
    axis = load_direction(f"{store}#axis", "qwen2")
    assert torch.equal(axis.vectors, stored(store, "persona_space", "axis"))
    assert axis.gap is not None
    torch.testing.assert_close(axis.gap, axis.vectors.norm(dim=-1))
    second = load_direction(f"{store}#component:2", "qwen2")
    assert torch.equal(second.vectors, stored(store, "persona_space", "component", rank=2))
    assert (second.name, second.gap) == ("component:2", None)
    calm = load_direction(f"{store}#calm", "qwen2", average="prompt_last")
    vector = stored(store, "trait_vectors", "vector", average="prompt_last")
    assert torch.equal(calm.vectors, vector)
    assert calm.gap is not None
    torch.testing.assert_close(calm.gap, vector.norm(dim=-1), rtol=1e-4, atol=1e-5)
    assert calm.questions == {"Why?"}
    assert calm.about["average"] == "prompt_last"
    assert calm.about["experiment"] == "trait_vectors"
    # The trait that is asked for, where a store alone is named; and a run, which says it itself.
    assert torch.equal(
        load_direction(store, "qwen2", trait="calm").vectors,
        load_direction(f"{store}#calm@{calm.about['run']}").vectors,
    )
    assert load_direction(f"{store}#calm", "gemma2").about["model"] == "gemma2"


@pytest.mark.parametrize(
    ("source", "model", "message"),
    [
        ("{}", "qwen2", r"several directions for the model 'qwen2': .*#axis, .*#brisk, .*#calm\.$"),
        ("{}", "m", r"no direction for the model 'm'; run trait_vectors or persona_space first"),
        ("{}#calm", None, r"several trait_vectors of 'calm'; choose a run: calm|several"),
        ("{}#fierce", "qwen2", r"no trait_vectors of 'fierce' for the model 'qwen2'"),
        ("{}#component:3", "qwen2", r"has no component 3; it has 1 to 2"),
        ("{}#axis@gone", "qwen2", r"no persona_space in the run 'gone'"),
        ("{}#", "qwen2", r"names no direction; write STORE#axis"),
        ("gone.zarr#axis", "qwen2", r"nothing at 'gone.zarr'"),
        ("gone.gguf", "qwen2", r"'gone.gguf' does not exist"),
    ],
)
def test_what_is_not_there_or_not_one_is_a_sentence(
    store: str, source: str, model: str | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load_direction(source.format(store), model)


def test_an_axis_of_nothing_is_refused(
    tmp_path: Path, golden_model: Callable[[str], TransformersModel]
) -> None:
    (tmp_path / "persona_space.py").write_text(PERSONA_SPACE)
    file, place = str(tmp_path / "persona_space.py"), tmp_path / "s"
    pn.run(file, golden_model("qwen2"), store=place, hollow=True)
    with pytest.raises(UsageError, match=r"#axis' holds numbers that are not finite"):
        load_direction(f"{place}#axis")
    pn.run(file, golden_model("qwen2"), store=place)
    with pytest.raises(UsageError, match=r"several persona_space; choose a run: qwen2\.roles"):
        load_direction(f"{place}#axis")
    assert float(load_direction(f"{place}#axis@latest").vectors[0, 1]) == 1


def test_the_command_line_writes_directions_and_steers_with_them(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(store).parent)

    def command(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["persona-nns", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    file = tmp_path / "axis.gguf"
    assert command("direction", "s#axis", "-o", str(file), "--model", "qwen2") == 0
    assert command("direction", str(file), "-o", str(tmp_path / "axis.safetensors")) == 0
    axis = load_direction("s#axis", "qwen2")
    again = load_direction(str(tmp_path / "axis.safetensors"))
    assert torch.equal(again.vectors, axis.vectors)
    assert again.about["run"] == axis.about["run"]
    away = str(tmp_path / "away.safetensors")
    assert command("direction", "s#axis", "-o", away, "--model", "qwen2", "--opposite") == 0
    assert torch.equal(load_direction(away).vectors, -axis.vectors)
    assert load_direction(away).name == "-axis"
    assert command("direction", "s", "-o", str(file)) == 2
    assert "several directions" in capsys.readouterr().err
    assert command("direction", "s#axis", "-o", "axis.csv") == 2
    assert "ends in none of" in capsys.readouterr().err


def test_a_direction_of_another_width_is_one_sentence(
    store: str, tmp_path: Path, golden_model: Callable[[str], TransformersModel]
) -> None:
    rows = str(Path(store).parent / "calm.jsonl")
    for shape, message in (((5, 7), "width 7"), ((3, 64), "3 layers")):
        save_direction(Direction("v", "", torch.ones(shape)), tmp_path / "v.pt")
        with pytest.raises(UsageError, match=rf"The vector has .*{message}.*needs \d+ of width"):
            pn.run(
                "trait_steering",
                golden_model("qwen2"),
                responses=rows,
                vector=str(tmp_path / "v.pt"),
                store=tmp_path / "s",
            )


def test_workers_are_told_where_the_store_of_a_direction_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.zarr").mkdir()
    from inspect import Parameter

    known = {"vector": Parameter("vector", Parameter.KEYWORD_ONLY, annotation=FileName)}
    told = absolute(known, {"vector": "s.zarr#axis"})
    assert told == {"vector": f"{tmp_path / 's.zarr'}#axis"}
    assert absolute(known, {"vector": "gone#axis"}) == {"vector": "gone#axis"}
