"""The experiment: training, its resumption, what is stored, what is refused."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from nnsight import TransformersModel, save
from plain_grafts import Oracle
from safetensors.torch import save_file
from test_cartridge import experiment, grafting, plain_kl  # noqa: F401 - fixtures
from test_kv_graft import close
from transformers import PreTrainedModel

import persona_nns as pn
from persona_nns.errors import PersonaError, UsageError
from persona_nns.figures.drawing import draw
from persona_nns.models.cartridges import load_cartridge, save_cartridge
from persona_nns.models.load import load_model, record_of
from persona_nns.prompts.grids import load_grid
from persona_nns.prompts.render import render_cell
from persona_nns.runs import plan_run, verify_store
from persona_nns.tracing import (
    Piece,
    Prefilled,
    fill_cache,
    read_rotation,
    say,
    splice,
    summed_kl,
)
from persona_nns.traits.cartridges import CartridgeTraining, Slots, train_slots

pytestmark = pytest.mark.filterwarnings("ignore:The grid has no markers")
SMALL: dict[str, Any] = {
    "grid": "short",
    "personas": "yoda,marx",
    "train_tasks": "policy,haiku",
    "slots": "2,3",
    "steps": 12,
    "layer_sets": "2;1,3",
    "progress": False,
}
FORMS = ("graft", "prefix")


@pytest.fixture(scope="module")
def model(random_model: Callable[[str], TransformersModel]) -> TransformersModel:
    return random_model("qwen2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cartridges")


@pytest.fixture(scope="module")
def results(model: TransformersModel, folder: Path) -> xr.Dataset:
    store, output = folder / "s.zarr", str(folder / "out")
    return pn.run("persona_cartridge", model, store=store, output=output, **SMALL)


def files_of(folder: Path) -> dict[tuple[str, str, int], Path]:
    found: dict[tuple[str, str, int], Path] = {}
    for file in (folder / "out" / "qwen2").glob("*.safetensors"):
        persona, form, slots, _ = file.stem.split("-")
        found[persona, form, int(slots)] = file
    return found


def test_training_lowers_the_loss_and_the_file_is_what_was_measured(
    results: xr.Dataset,
    model: TransformersModel,
    plain_model: Callable[[str], PreTrainedModel],
    folder: Path,
) -> None:
    """Every closure once more, in plain transformers, from the files."""
    ds = results.isel(model=0)
    assert ds.task.values.tolist() == ["policy", "haiku", "recommend"]
    assert ds.slots.values.tolist() == [2, 3]
    assert ds.persona.values.tolist() == ["marx", "yoda"]  # in the order of the grid
    assert (ds.loss.isel(step=-1) < ds.loss.isel(step=0)).all()
    files, following = files_of(folder), {"marx": "yoda", "yoda": "marx"}
    assert len(files) == 8
    for cell in load_grid("short").select_cells("marx/policy,marx/recommend,yoda/recommend"):
        oracle = Oracle(plain_model("qwen2"), model.tokenizer, cell)
        host = oracle.kl(oracle.uncached("BY"))
        here = ds.sel(persona=cell.persona, task=cell.task)
        close(here.host_kl, host)
        close(here.closure_full_graft, 1 - oracle.graft("persona") / host)
        split, other = ("held_out", "train")[:: 1 if cell.task == "recommend" else -1]
        for form in FORMS:
            for slots in (2, 3):
                at = here.sel(form=form, slots=slots)
                own = load_cartridge(files[cell.persona, form, slots], record_of(model))
                kl = plain_kl(oracle, own)
                close(at.kl.sel(split=split), kl)
                close(at.closure.sel(split=split), 1 - kl / host)
                rival = load_cartridge(files[following[cell.persona], form, slots])
                control = 1 - plain_kl(oracle, rival) / host
                close(at.closure_control.sel(split=split), control)
                for name in ("kl", "closure", "closure_control", "closure_untrained"):
                    assert at[name].sel(split=other).isnull()
                    assert at[name].sel(split=split).notnull()
                assert (own.slots, own.form, own.tasks) == (slots, form, ("policy", "haiku"))
                assert own.persona_text == cell.persona_text
                np.testing.assert_allclose(own.losses, at.loss, rtol=1e-6)
                assert own.n_bytes == int(here.cache_bytes.sel(slots=slots))


def test_the_first_loss_is_that_of_what_training_begins_with(results: xr.Dataset) -> None:
    ds = results.isel(model=0)
    untrained = ds.host_kl * (1 - ds.closure_untrained.sel(split="train"))
    close(ds.loss.isel(step=0), untrained.mean("task").transpose(*ds.loss.dims[:-1]))


def test_the_oracle_is_that_of_host_injection(
    results: xr.Dataset, model: TransformersModel, tmp_path: Path
) -> None:
    asked = {"layer_sets": "2;1,3", "n_tokens": 2, "progress": False}
    found = pn.run("host_injection", model, "short", store=tmp_path / "s.zarr", **asked)
    for cell in ("marx/policy", "yoda/haiku"):
        persona, task = cell.split("/")
        ours = results.closure_oracle.isel(model=0).sel(persona=persona, task=task)
        theirs = found.closure.isel(model=0).sel(cell=cell, source="oracle")
        assert ours.layer_set.values.tolist() == theirs.layer_set.values.tolist()
        close(ours, theirs)


def test_a_finished_cartridge_is_not_trained_again(
    results: xr.Dataset, model: TransformersModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persona_nns.traits.cartridges.SlotTrainer.train", None)
    asked = {**SMALL, "personas": "yoda", "slots": "2"}
    store, output = folder / "again.zarr", str(folder / "out")
    again = pn.run("persona_cartridge", model, store=store, output=output, **asked)
    assert "closure_control" not in again  # there is no other persona
    whole = results.sel(persona=["yoda"], slots=[2])
    for name in ("closure", "kl", "loss", "closure_untrained"):
        close(again[name], whole[name])
    (verdict,) = verify_store(store)
    assert (verdict.state, verdict.n_recomputed) == ("not checked", 0)


def test_training_that_was_killed_goes_on_to_the_same(
    results: xr.Dataset,
    model: TransformersModel,
    experiment: ModuleType,  # noqa: F811
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("persona_nns.traits.cartridges._SAVE_EVERY", 4)
    score, passes = experiment.score, []

    def counted(*args: Any) -> Any:
        passes.append(1)
        if len(passes) == stop:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(experiment, "score", counted)
    one = {"personas": "yoda", "slots": "2"}
    asked = {**SMALL, **one, "store": tmp_path / "s.zarr", "output": str(tmp_path / "out")}
    stop = 11  # in the eleventh step of the first cartridge
    with pytest.raises(KeyboardInterrupt):
        pn.run("persona_cartridge", model, **asked)
    (saved,) = (tmp_path / "out").rglob("checkpoint-*")
    assert saved.name == "checkpoint-8"
    # Another one that was cut off while it was written.
    shutil.copytree(saved, saved.with_name("checkpoint-12"))
    (saved.with_name("checkpoint-12") / "trainer_state.json").unlink()
    stop, passes = 0, []
    again = pn.run("persona_cartridge", model, **asked)
    assert len(passes) == 2 * 12 - 8 + 2 * 2  # two trainings but eight steps, and measured
    whole = results.loss.sel(persona=["yoda"], slots=[2])
    np.testing.assert_allclose(again.loss, whole, rtol=1e-6)
    for key, file in files_of(tmp_path).items():
        ours, theirs = (load_cartridge(each) for each in (file, files_of(folder)[key]))
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-5, atol=1e-6)
        assert file.name == files_of(folder)[key].name
    assert not list((tmp_path / "out").rglob("checkpoint-*"))


def test_the_learning_rate_climbs_and_falls_to_a_tenth() -> None:
    training = CartridgeTraining()
    rates = [training.rate(step) for step in range(training.steps)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[9:], np.linspace(1, 0.1, 91))
    assert (training.steps, training.learning_rate) == (100, 0.02)


def test_slots_are_trained_by_adam(tmp_path: Path) -> None:
    """Against the loop written out."""
    begun = torch.arange(12.0).reshape(1, 2, 2, 3) / 10, torch.ones(1, 2, 2, 3)

    def loss(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return (keys - 3).pow(2).mean() + 40 * (values * keys.detach()).pow(2).mean()

    training, slots = CartridgeTraining(steps=14, learning_rate=0.05), Slots(*begun)
    device = torch.device("cpu")
    losses = train_slots(slots, loss, training, tmp_path, device=device)
    plain = [each.clone().requires_grad_() for each in begun]
    adam, expected = torch.optim.Adam(plain), []
    for step in range(14):
        rate = (step + 1) / 10 if step < 10 else 1 - 0.9 * (step - 9) / 4
        adam.param_groups[0]["lr"] = 0.05 * rate
        now = loss(*plain)
        expected.append(now.item())
        adam.zero_grad()
        now.backward()
        adam.step()
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    for ours, theirs in zip((slots.keys, slots.values), plain, strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach())


def test_a_grafted_file_is_known_by_what_it_holds(
    results: xr.Dataset, model: TransformersModel, folder: Path, tmp_path: Path
) -> None:
    files = files_of(folder)
    first, other = files["yoda", "graft", 2], files["marx", "prefix", 3]
    elsewhere = Path(shutil.copy(first, tmp_path / "mine.safetensors"))
    asked: dict[str, Any] = {
        "grafts": "none,persona",
        "bands": "all",
        "n_tokens": 1,
        "progress": False,
    }

    def identity(*cartridges: Path) -> str:
        options = dict(asked)
        if cartridges:
            options["cartridge"] = [*map(str, cartridges)]
        planned = plan_run("kv_graft", model, "short", store=tmp_path / "k.zarr", **options)
        return planned.request.block.attrs["identity"]

    assert identity(first, other) == identity(other, elsewhere)
    assert len({identity(), identity(first), identity(first, other)}) == 3
    plain = plan_run("kv_graft", model, "short", store=tmp_path / "k.zarr", **asked)
    assert "cartridge" not in str(plain.request.block.attrs)

    cells, given = "yoda/haiku,yoda/recommend,marx/recommend", [str(first), str(other)]
    store = tmp_path / "k.zarr"
    found = pn.run("kv_graft", model, "short", store=store, cells=cells, cartridge=given, **asked)
    assert found.graft.values.tolist() == ["none", "persona", "cartridge"]
    kl = found.kl.isel(model=0).sel(graft="cartridge", layer_band="all")
    ours = results.kl.isel(model=0)
    for cell, form, slots in (("yoda/recommend", "graft", 2), ("marx/recommend", "prefix", 3)):
        persona, task = cell.split("/")
        at = {"persona": persona, "task": task, "form": form, "slots": slots, "split": "held_out"}
        close(kl.sel(cell=cell), ours.sel(at))
    assert set(draw(found, "kv_graft")) >= {"closure_heatmap", "closure_by_graft"}
    (verdict,) = verify_store(store)
    assert (verdict.state, verdict.n_recomputed) == ("right", 2)


@pytest.mark.usefixtures("results")
def test_a_cartridge_comes_back_from_its_file(folder: Path) -> None:
    first = load_cartridge(files_of(folder)["yoda", "graft", 2])
    save_cartridge(first, folder / "new" / "c.safetensors")
    again = load_cartridge(folder / "new" / "c.safetensors")
    for name, value in vars(first).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(again, name), value)
        else:
            assert getattr(again, name) == value
    row = again.row()
    assert row.position_ids.tolist() == [[again.start, again.start + 1]]
    assert torch.equal(row.keys[1][0], again.keys[1])


def test_a_cartridge_has_the_precision_of_its_model(
    random_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load_model(random_folder("qwen2"), dtype="bfloat16")
    one = {**SMALL, "personas": "yoda", "slots": "2", "store": tmp_path / "s.zarr"}
    ds = pn.run("persona_cartridge", model, output=str(tmp_path / "out"), **one)
    given = load_cartridge(files_of(tmp_path)["yoda", "graft", 2], record_of(model))
    assert given.keys.dtype == given.values.dtype == torch.bfloat16
    assert int(ds.cache_bytes.squeeze()) == given.n_bytes == 2 * 5 * 2 * 2 * 8 * 2
    assert (ds.loss.isel(step=-1) < ds.loss.isel(step=0)).all()
    assert ds.closure.sel(split="held_out", task="recommend").notnull().all()


def test_a_trace_of_ones_own_goes_on_from_a_cartridge(
    results: xr.Dataset, model: TransformersModel, folder: Path
) -> None:
    given = load_cartridge(files_of(folder)["yoda", "prefix", 3], record_of(model))
    (cell,) = load_grid("short").select_cells("yoda/recommend")
    host = render_cell(model.tokenizer, cell)["BY"]
    n, behind = host.spans["persona"].start, list(host.ids[host.spans["persona"].stop :])
    before = Piece(fill_cache(model, [host.ids[:n]]), [range(n)])
    slots = Piece(given.row(), [range(given.slots)])
    held = splice([before, slots], read_rotation(model, reach=50))
    clean = say(model, Prefilled([render_cell(model.tokenizer, cell)["XY"].ids], None), 10)
    tokens = torch.tensor([[*behind, *clean.ids[0, :-1].tolist()]])
    position = n + given.slots + torch.arange(tokens.shape[1])[None]
    with model.trace(
        {"input_ids": tokens}, position_ids=position, past_key_values=held.cache(), use_cache=True
    ):
        logits = save(model.output.logits[:, -10:])
    xy = [*render_cell(model.tokenizer, cell)["XY"].ids, *clean.ids[0, :-1].tolist()]
    with torch.no_grad():
        expected = model._module(torch.tensor([xy])).logits[:, -10:].log_softmax(-1)
    kl = summed_kl(expected, logits.log_softmax(-1), clean.scored("p_last", 10))
    at = {"persona": "yoda", "task": "recommend", "form": "prefix", "slots": 3}
    close(kl, results.kl.sel({**at, "split": "held_out"}))


@pytest.mark.usefixtures("results")
def test_files_that_are_no_cartridge_for_the_model_are_refused(
    model: TransformersModel, folder: Path, tmp_path: Path
) -> None:
    record, file = record_of(model), tmp_path / "c.safetensors"
    good = load_cartridge(files_of(folder)["yoda", "graft", 2], record)

    def refused(changed: Any, match: str) -> None:
        save_cartridge(changed, file)
        with pytest.raises(UsageError, match=match) as caught:
            load_cartridge(file, record)
        assert str(caught.value).endswith(".")
        assert "\n" not in str(caught.value)

    refused(replace(good, model_version="0" * 64), "is for the model 'qwen2' in float32, not for")
    refused(replace(good, precision="bfloat16"), "in bfloat16, not for 'qwen2' in float32")
    refused(replace(good, form="suffix"), "unknown form 'suffix'; forms are graft, prefix")
    refused(replace(good, values=good.values[:, :1]), "values of shape")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UsageError, match="cannot be read"):
        load_cartridge(file)
    save_file({"keys": good.keys, "values": good.values}, file)
    with pytest.raises(UsageError, match="is not a cartridge: it says nothing of 'model'"):
        load_cartridge(file)
    with pytest.raises(UsageError, match="does not exist"):
        load_cartridge(tmp_path / "none.safetensors")
    asked = {"store": tmp_path / "k.zarr", "grafts": "none", "progress": False}
    two = [str(files_of(folder)["yoda", form, 2]) for form in FORMS]
    with pytest.raises(UsageError, match="are both of the persona 'yoda'; give one of them"):
        pn.run("kv_graft", model, "short", cartridge=two, **asked)
    narrow = replace(good, keys=good.keys[:4], values=good.values[:4])
    save_cartridge(narrow, file)
    with pytest.raises(UsageError, match=r"are \(4, 2, 8, 8\), the model's \(5, 2, 8, 8\)"):
        pn.run("kv_graft", model, "short", cartridge=[str(file)], **asked)


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"personas": "yoda,bach"}, r"--personas cannot be 'bach'; use some of buffett, marx"),
        ({"train_tasks": "arch"}, r"--train-tasks cannot be 'arch'; use some of policy, haiku"),
        ({"forms": ""}, r"--forms cannot be ''; use some of graft, prefix"),
        ({"slots": "2,0"}, r"numbers of slots '2,0' are not numbers such as 1,2,4"),
        ({"steps": 0}, "'steps' cannot be 0"),
    ],
)
def test_what_there_is_not_is_refused(
    model: TransformersModel, tmp_path: Path, asked: dict[str, Any], match: str
) -> None:
    with pytest.raises(UsageError, match=match):
        plan_run("persona_cartridge", model, store=tmp_path / "s.zarr", **{**SMALL, **asked})


def test_models_that_cannot_have_one_are_refused(
    random_model: Callable[[str], TransformersModel], tmp_path: Path
) -> None:
    asked = {**SMALL, "store": tmp_path / "s.zarr", "output": str(tmp_path / "out")}
    with pytest.raises(PersonaError, match=r"gpt2 model cannot be moved"):
        pn.run("persona_cartridge", random_model("gpt2"), **asked)
    with pytest.raises(UsageError, match=r"see no more than the last \d+: what is grafted there"):
        pn.run("persona_cartridge", random_model("mistral"), **asked)
    assert not (tmp_path / "out").exists()


def test_attention_may_be_computed_another_way(
    random_folder: Callable[[str], Path], results: xr.Dataset, tmp_path: Path
) -> None:
    """sdpa tells no weights: they are computed once more, so slots begin as the same tokens."""
    fast = load_model(random_folder("qwen2"), attention="sdpa")
    asked = {**SMALL, "personas": "yoda", "steps": 1, "store": tmp_path / "s.zarr"}
    found = pn.run("persona_cartridge", fast, **asked, output=str(tmp_path / "out"))
    expected = results.sel(persona=["yoda"]).closure_untrained.values
    np.testing.assert_allclose(found.closure_untrained.values, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        found.loss.sel(step=1).values,
        results.sel(persona=["yoda"]).loss.sel(step=1).values,
        rtol=1e-4,
    )


def test_its_figures_show_medians(results: xr.Dataset) -> None:
    drawn = draw(results, "persona_cartridge")
    assert set(drawn) == {"closure", "losses"}
    panels = drawn["closure"].axes
    for form, panel in zip(FORMS, panels, strict=True):
        lines = {str(line.get_label()): line.get_ydata() for line in panel.lines}
        of_form = results.isel(model=0).sel(form=form)
        for label, name, split in (
            ("held-out tasks", "closure", "held_out"),
            ("trained tasks", "closure", "train"),
            ("untrained, held-out tasks", "closure_untrained", "held_out"),
            ("another persona's, held-out tasks", "closure_control", "held_out"),
        ):
            close(lines[label], of_form[name].sel(split=split).median(("persona", "task")))
        held_out = results.closure_full_graft.isel(model=0).sel(task="recommend").median()
        (whole,) = (each for each in lines if each.startswith("the whole persona"))
        close(lines[whole], [held_out] * 2)
        losses = drawn["losses"].axes[FORMS.index(form)].lines
        close(losses[0].get_ydata(), of_form.loss.sel(slots=2).median("persona"))
    alone = results.sel(persona=["yoda"]).drop_vars("closure_control")
    assert len(draw(alone, "persona_cartridge")) == 2
