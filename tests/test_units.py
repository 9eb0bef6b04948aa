"""Units that are no cells: an experiment that plans its own, from its file to the table."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from nnsight import TransformersModel
from typer.testing import CliRunner

import persona_nns as pn
from persona_nns.cli.commands import app
from persona_nns.declarations.catalog import load_experiment
from persona_nns.figures.tables import result_table
from persona_nns.results.attributes import read_attribute
from persona_nns.runs.verify import verify_store

PAIRS = '''
"""Pairs of words, for the tests."""
from dataclasses import dataclass
import torch
from persona_nns import Variable
from persona_nns.units import Plan, content_digest

protocol_version = 1
calls = []

@dataclass(frozen=True)
class Pair:
    left: str
    right: str
    ids: tuple

    @property
    def label(self):
        return f"{self.left}|{self.right}"

    @property
    def place(self):
        place = {"left": self.left, "right": self.right}
        return {**place, "word": self.left} if self.left == self.right else place

variables = {
    "sum": Variable("left right layer letter", "sum of lengths"),
    "length": Variable("word letter", "length", kind="int"),
}

def plan(tokenizer, *, words: str = "a,bb"):
    """Plan.

    Args:
        words: what to pair.
    """
    split = words.split(",")
    ids = {word: {"alone": tokenizer(word)["input_ids"]} for word in split}
    return Plan(
        name="words",
        units=[Pair(a, b, tuple(ids[a]["alone"])) for a in split for b in split],
        axes={"left": split, "right": split, "word": split, "letter": [0, 1, 2]},
        unit_axes=("left", "right"),
        content={"words": split},
        token_ids=ids,
        digest=content_digest(split),
        coords={"first": ("word", [word[0] for word in split])},
        batch_size=3,
    )

def measure(model, pairs, *, layers: list[int], weight: float = 1.0):
    calls.append([pair.label for pair in pairs])
    size = torch.tensor([float(len(p.left) + 10 * len(p.right)) for p in pairs])
    return {
        "sum": weight * size[:, None, None].expand(-1, len(layers), 3),
        "length": torch.tensor([[len(p.left)] * 3 for p in pairs]),
    }
'''


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.py"
    file.write_text(PAIRS)
    return file


@pytest.fixture(scope="module")
def model(random_model: Callable[[str], TransformersModel]) -> TransformersModel:
    return random_model("qwen2")


def test_a_pair_writes_its_own_place_and_the_diagonal_pair_that_of_its_word(
    own: Path, tmp_path: Path, model: TransformersModel
) -> None:
    ds = pn.run(own, model, layers="0,2", words="a,bb,ccc", store=tmp_path / "s.zarr")
    assert ds["sum"].dims == ("model", "left", "right", "layer", "letter")
    assert ds["sum"].sel(left="a", right="ccc", layer=2, letter=0).item() == 31
    assert ds.length.sel(word="bb").values.tolist() == [[2, 2, 2]]
    assert ds["first"].sel(word="bb").item() == "b"
    assert ds.letter.values.tolist() == [0, 1, 2]
    assert ds.completed.dims == ds.seconds.dims == ("model", "left", "right")
    assert bool(ds.completed.all())
    plain = xr.open_zarr(tmp_path / "s.zarr", group=f"pairs/{ds.attrs['run']}", consolidated=False)
    np.testing.assert_array_equal(plain["sum"], ds["sum"])
    assert plain["sum"].encoding["chunks"] == (1, 1, 1, 2, 3)
    assert plain["length"].encoding["chunks"] == (1, 1, 3)


def test_what_is_missing_is_measured_and_until_then_reads_as_missing(
    own: Path, tmp_path: Path, model: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.Random.shuffle", lambda _self, _batches: None)
    own.write_text(
        PAIRS.replace(
            "    calls.append",
            "    if pairs[0].left == 'bb': raise RuntimeError('gone')\n    calls.append",
        )
    )
    settings: dict[str, Any] = {"store": tmp_path / "s.zarr", "batch_size": 1}
    with pytest.raises(RuntimeError, match="gone"):
        pn.run(own, model, **settings)
    half = pn.open_results(tmp_path / "s.zarr", "pairs")
    assert half.completed.values.tolist() == [[[True, True], [False, False]]]
    assert half.length.sel(word="a").values.tolist() == [[1, 1, 1]]
    assert np.isnan(half.length.sel(word="bb")).all()
    assert np.isnan(half["sum"].sel(left="bb")).all()
    assert pn.list_runs(tmp_path / "s.zarr")[0].describe().endswith("2/4 complete)")

    own.write_text(PAIRS)
    experiment = load_experiment(own)
    whole = pn.run(experiment, model, store=tmp_path / "s.zarr")
    assert experiment.measure.__globals__["calls"] == [["bb|a", "bb|bb"]]
    assert bool(whole.completed.all())
    assert whole.length.sel(word="bb").values.tolist() == [[2, 2, 2]]


def test_written_is_not_completed_on_a_dimension_of_some_units(
    own: Path, tmp_path: Path, model: TransformersModel
) -> None:
    import zarr

    ds = pn.run(own, model, store=tmp_path / "s.zarr")
    group = zarr.open_group(tmp_path / "s.zarr", path=f"pairs/{ds.attrs['run']}", mode="r+")
    group["completed"][0, 1, 1] = False  # type: ignore[index]
    again = pn.open_results(tmp_path / "s.zarr", "pairs")
    np.testing.assert_array_equal(again.length.values, [[[1, 1, 1], [np.nan] * 3]])


def test_inputs_are_known_by_their_content_and_tokens(
    own: Path, tmp_path: Path, model: TransformersModel
) -> None:
    store = tmp_path / "s.zarr"
    first = pn.run(own, model, store=store)
    same = pn.run(own, model, store=store, words="a,bb")
    assert same.attrs["identity"] == first.attrs["identity"]
    assert "words" not in first.attrs["parameters"]
    others = [
        pn.run(own, model, store=store, words="a,bc"),
        pn.run(own, model, store=store, weight=2.0),
        pn.run(own, model, store=store, layers=[1]),
    ]
    assert len({first.attrs["identity"], *(ds.attrs["identity"] for ds in others)}) == 4


def test_two_models_are_joined_in_the_order_of_the_plan(
    own: Path, tmp_path: Path, random_model: Callable[[str], TransformersModel]
) -> None:
    store = tmp_path / "s.zarr"
    for name, layers in (("qwen2", "0"), ("llama", "1")):
        pn.run(own, random_model(name), store=store, words="zz,a", layers=layers)
    ds = pn.open_results(store, "pairs", grid="words")
    assert ds.left.values.tolist() == ds.word.values.tolist() == ["zz", "a"]
    assert ds.length.sel(model="llama", word="zz").values.tolist() == [2, 2, 2]
    assert ds["sum"].sel(model="llama", left="zz", right="a", layer=1, letter=0).item() == 12
    assert result_table(ds, "sum").row_count == 2
    assert result_table(ds, "length").row_count == 12  # two models, two words, three letters


def test_on_the_command_line_there_is_no_grid(own: Path, tmp_path: Path) -> None:
    run = ["run", str(own), "--model", "organism-qwen2", "--store", str(tmp_path / "s.zarr")]
    listed = CliRunner().invoke(app, ["run", str(own), "--help"]).output
    assert "--words" in listed
    assert "what to pair" in listed
    assert "--grid" not in listed
    assert not re.search(r"--cells\b(?!-)", listed)
    assert CliRunner().invoke(app, [*run, "--words", "a,bb", "--layers", "0"]).exit_code == 0
    assert bool(pn.open_results(tmp_path / "s.zarr", "pairs").completed.all())


def test_a_grid_is_for_experiments_that_run_on_one(
    own: Path, tmp_path: Path, model: TransformersModel
) -> None:
    with pytest.raises(pn.UsageError, match=r"runs on no grid .* options: words, weight"):
        pn.run(own, model, "short", store=tmp_path / "s.zarr")
    with pytest.raises(pn.UsageError, match="needs a grid"):
        pn.run("localized_positions", model, store=tmp_path / "s.zarr")


@pytest.mark.parametrize(
    ("dims", "sentence"),
    [
        ("left right head", "has a dimension 'head' without labels"),
        ("letter", "none of the dimensions that its units have a place on: left, right, word"),
    ],
)
def test_a_variable_without_labels_or_units_is_refused(
    own: Path, tmp_path: Path, model: TransformersModel, dims: str, sentence: str
) -> None:
    own.write_text(PAIRS.replace("left right layer letter", dims))
    with pytest.raises(pn.PersonaError, match=sentence):
        pn.run(own, model, store=tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()


def damage_what_is_not_complete(store: Path) -> None:
    """Leave what a loss of power may: pieces that cannot be read, a flag that is cut off."""
    (run,) = (store / "pairs").glob("*.words.*")
    for piece in ("sum/c.0.0.1.0.0", "sum/c.0.1.1.0.0", "length/c.0.1.0"):
        (run / piece).write_bytes(b"(")
    (run / "completed" / "c.0.1.1").write_bytes(b"")


@pytest.mark.parametrize("lazily", [False, True])
def test_what_is_not_complete_is_never_read(
    own: Path,
    tmp_path: Path,
    model: TransformersModel,
    monkeypatch: pytest.MonkeyPatch,
    lazily: bool,
) -> None:
    store = tmp_path / "s.zarr"
    whole = pn.run(own, model, layers="0", store=store)
    (run,) = (store / "pairs").glob("*.words.*")
    (run / "completed" / "c.0.0.1").unlink()
    damage_what_is_not_complete(store)
    if lazily:
        monkeypatch.setattr("persona_nns.results.opening._EAGER", 0)
    cut = pn.open_results(store, "pairs")
    assert bool(cut["sum"].chunks) == lazily
    assert cut.completed.values[0].tolist() == [[True, False], [True, False]]
    for right, name in (("a", "sum"), ("a", "seconds")):
        np.testing.assert_array_equal(cut[name].sel(right=right), whole[name].sel(right=right))
    assert np.isnan(cut["sum"].sel(right="bb")).all()
    assert cut["sum"].sel(right="a", left="bb", letter=2).values.tolist() == [[12.0]]
    assert cut["sum"].sel(left=["bb", "a"], right="a", letter=0).values.tolist() == [[[12], [11]]]
    np.testing.assert_array_equal(cut.length.values, [[[1, 1, 1], [np.nan] * 3]])
    assert pn.list_runs(store)[0].n_completed == 2

    again = load_experiment(own)
    again.measure.__globals__["calls"].clear()
    xr.testing.assert_equal(
        pn.run(again, model, layers="0", store=store).drop_vars("seconds").compute(),
        whole.drop_vars("seconds"),
    )
    calls = again.measure.__globals__["calls"]
    assert sorted(label for batch in calls for label in batch) == ["a|bb", "bb|bb"]


def test_a_plan_that_renders_nothing_is_measured(
    own: Path, tmp_path: Path, model: TransformersModel
) -> None:
    nothing = PAIRS.replace("token_ids=ids", "token_ids={}").replace("batch_size=3,", "")
    own.write_text(nothing)
    ds = pn.run(own, model, layers="0", words="a,bb", store=tmp_path / "s.zarr")
    assert bool(ds.completed.all())
    assert ds["sum"].sel(left="bb", right="a", letter=2, layer=0).item() == 12.0


def test_units_are_verified_like_cells(own: Path, tmp_path: Path, model: TransformersModel) -> None:
    store = tmp_path / "s.zarr"
    pn.run(own, model, layers="0", words="a,bb", store=store)
    (verdict,) = verify_store(store, sample=9, experiments=[str(own)])
    assert (verdict.problems, verdict.n_recomputed) == ((), 4)
    raw = zarr.open_group(store, path=f"pairs/{verdict.info.run}", mode="r+")
    raw["length"][0, 1] = 7  # type: ignore[index]
    (verdict,) = verify_store(store, sample=9, experiments=[str(own)])
    assert verdict.problems == ("'length' of bb|bb is not what is computed anew.",)
    assert CliRunner().invoke(app, ["verify", str(store), "--sample", "0"]).exit_code == 0


GROUPED = (
    PAIRS.replace(
        "@dataclass(frozen=True)\nclass Pair:",
        '''@dataclass(frozen=True)
class Weighing:
    """How lengths are weighed.

    Attributes:
        weight: what the sum is
            multiplied by.
    """

    weight: float = 1.0

@dataclass(frozen=True)
class Shifted(Weighing):
    """Weighed, and shifted.

    Attributes:
        shift: what is added.
    """

    shift: Annotated[float, Field(ge=0)] = 0.0

@dataclass(frozen=True)
class Pair:''',
    )
    .replace(
        "import torch", "from typing import Annotated\nimport torch\nfrom pydantic import Field"
    )
    .replace("weight: float = 1.0):", "weighing: Shifted = Shifted(shift=2.0)):")
    .replace("weight * size", "(weighing.weight * size + weighing.shift)")
    + """
def finish(tokenizer, pairs, measured, *, weighing: Weighing, halved: bool = False):
    return {**measured, "sum": measured["sum"] * (0.5 if halved else weighing.weight)}
"""
)


def test_the_fields_of_a_group_are_options(
    own: Path, tmp_path: Path, model: TransformersModel
) -> None:
    """Names, defaults, help, refusals and identity are those of options that stand alone."""
    alone = pn.run(own, model, layers="0", weight=3.0, store=tmp_path / "s.zarr")
    own.write_text(GROUPED)
    experiment = load_experiment(own)
    assert list(experiment.options) == ["words", "weight", "shift"]
    assert [each.default for each in experiment.options.values()] == ["a,bb", 1.0, 2.0]
    ds = pn.run(own, model, layers="0", weight=3.0, store=tmp_path / "s.zarr")
    parameters = read_attribute(alone, "parameters")
    assert read_attribute(ds, "parameters") == {**parameters, "shift": 2.0}
    assert ds["sum"].sel(left="a", right="bb", letter=0).item() == 3 * (3 * 21 + 2)
    unshifted = pn.run(own, model, layers="0", shift=0, store=tmp_path / "s.zarr")
    assert unshifted["sum"].sel(left="a", right="bb", letter=0).item() == 21
    with pytest.raises(pn.UsageError, match=r"no option 'weighing'; its options: words, weight, s"):
        pn.run(own, model, weighing=1, store=tmp_path / "s.zarr")
    with pytest.raises(pn.UsageError, match="'shift' cannot be -1: Input should be greater"):
        pn.run(own, model, shift=-1, store=tmp_path / "s.zarr")
    shown = CliRunner().invoke(app, ["run", str(own), "--help"], env={"COLUMNS": "200"}).output
    assert "what the sum is multiplied by. [default: 1.0]" in shown
    assert "what is added. [default: 2.0]" in shown
    assert "--weighing" not in shown
    verdicts = verify_store(tmp_path / "s.zarr", sample=1, experiments=[str(own)])
    assert {each.info.run: each.problems for each in verdicts}[ds.attrs["run"]] == ()


def test_what_finish_takes_is_an_option_or_has_a_default(own: Path) -> None:
    own.write_text(GROUPED.replace("halved: bool = False", "halved: bool"))
    with pytest.raises(pn.PersonaError, match="takes 'halved', which is an option of neither"):
        load_experiment(own)
