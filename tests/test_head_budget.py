"""Heads patched into a host, against plain transformers with hooks: a forward a patch."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from nnsight import TransformersModel, save
from plain_hooks import blocks_of, greedy, summed_kl
from random_models import ARCHITECTURES, crossed
from sandboxed import sandboxed
from torch import Tensor
from transformers import AddedToken, AutoModelForCausalLM

import persona_nns as pn
from persona_nns.declarations.budgets import agreement, random_scores
from persona_nns.declarations.catalog import load_experiment
from persona_nns.errors import UsageError
from persona_nns.prompts.grids import Cell, Grid
from persona_nns.prompts.render import render_cell
from persona_nns.tracing.patch_speed import finish_last_columns

ROTARY = [name for name in ARCHITECTURES if name != "gpt2"]
N_EVAL = 4
BUDGETS = {"0": 0, "1": 1, "2": 2, "4": 4, "8": 8, "16": 16, "all": 20}
RANKINGS = "effect,attribution,attention,transfer,random"


@pytest.fixture(scope="module", params=crossed("gemma2", "gpt_neox", "olmo2", among=ROTARY))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def grid(small_grid: Grid) -> Grid:
    personas = {name: small_grid.personas[name] for name in ("baseline", "chef")}
    return replace(small_grid, personas=personas)


@pytest.fixture(scope="module")
def results(
    random_model: Callable[[str], TransformersModel],
    grid: Grid,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], xr.Dataset]:
    """Architecture → what the experiment measures on its random model, all cells at once."""

    @cache
    def measured(architecture: str) -> xr.Dataset:
        store = tmp_path_factory.mktemp(architecture) / "s.zarr"
        return measure(random_model(architecture), grid, store).isel(model=0)

    return measured


def measure(model: TransformersModel, grid: Grid, store: Path, **options: Any) -> xr.Dataset:
    return pn.run("head_budget", model, grid, store=store, progress=False, n_eval=N_EVAL, **options)


def projections_of(plain: Any) -> list[Any]:
    if hasattr(plain, "gpt_neox"):
        return [block.attention.dense for block in blocks_of(plain)]
    return [block.self_attn.o_proj for block in blocks_of(plain)]


Change = Callable[[int, Tensor], Tensor]  # of a layer's projection input, [column, head, d_head]


class Oracle:
    """One cell of one model: prompts followed by what is said to XY, one row, no cache."""

    def __init__(self, plain: Any, tokenizer: Any, cell: Cell) -> None:
        self.plain = plain
        prompts = render_cell(tokenizer, cell)
        clean, host = (list(prompts[name].ids) for name in ("XY", "BY"))
        said = greedy(plain, clean, N_EVAL, 2)
        self.n_scored = len(said)
        self.persona = prompts["XY"].spans["persona"]
        self.n_places = len(clean) - self.persona.stop + len(said) - 1
        self.ids = {"XY": [*clean, *said[:-1]], "BY": [*host, *said[:-1]]}
        self.heads: dict[str, list[Tensor]] = {"XY": [], "BY": []}
        for name, kept in self.heads.items():
            self.run(name, lambda _, own, kept=kept: kept.append(own) or own)
        self.clean = self.run("XY", lambda _, own: own)
        self.none = self.kl(lambda _, own: own)

    @contextmanager
    def changed(self, change: Change) -> Iterator[None]:
        def hook_of(layer: int) -> Any:
            def hook(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
                return (change(layer, args[0][0].unflatten(-1, (4, -1))).flatten(-2)[None],)

            return hook

        modules = enumerate(projections_of(self.plain))
        handles = [each.register_forward_pre_hook(hook_of(layer)) for layer, each in modules]
        yield
        for handle in handles:
            handle.remove()

    def run(self, name: str, change: Change) -> Tensor:
        with self.changed(change):
            logits = self.plain(torch.tensor([self.ids[name]]), use_cache=False).logits
        return logits[0, -self.n_scored :]

    def kl(self, change: Change) -> float:
        return summed_kl(self.clean, self.run("BY", change))

    def patched(self, heads: set[tuple[int, int]]) -> float:
        def change(layer: int, own: Tensor) -> Tensor:
            own = own.clone()
            for head in (head for at, head in heads if at == layer):
                clean = self.heads["XY"][layer]
                own[-self.n_places :, head] = clean[-self.n_places :, head]
            return own

        return self.kl(change)

    def slope(self, layer: int, head: int) -> float:
        """d(−KL)/dt of the head moved by t of the way to the clean run, by central differences."""

        def moved(step: float) -> Change:
            def change(at: int, own: Tensor) -> Tensor:
                if at == layer:
                    own, n = own.clone(), self.n_places
                    way = self.heads["XY"][layer][-n:, head] - self.heads["BY"][layer][-n:, head]
                    own[-n:, head] += step * way
                return own

            return change

        # Norms compute in single precision whatever the model's: steps are large, and
        # extrapolated to none (Richardson).
        wide, narrow = (
            (self.kl(moved(-step)) - self.kl(moved(step))) / (2 * step) for step in (0.02, 0.01)
        )
        return (4 * narrow - wide) / 3

    def attention(self) -> np.ndarray:
        output = self.plain(torch.tensor([self.ids["XY"]]), use_cache=False, output_attentions=True)
        seen = torch.stack(output.attentions)[:, 0, :, -self.n_places :]
        return seen[..., self.persona.start : self.persona.stop].sum(-1).mean(-1).numpy()


@pytest.fixture(scope="module")
def oracle(
    random_folder: Callable[[str], Path], tokenizer: Any, grid: Grid
) -> Callable[[str, int], Oracle]:
    """Architecture, number of the cell → the cell in double precision."""

    @cache
    def load(architecture: str, number: int) -> Oracle:
        plain = AutoModelForCausalLM.from_pretrained(
            random_folder(architecture), dtype=torch.float64, attn_implementation="eager"
        )
        plain.eval().requires_grad_(requires_grad=False)
        return Oracle(plain, tokenizer, grid.cells[number])

    return load


def best(scores: Any, count: int) -> set[tuple[int, int]]:
    """The heads with the largest scores, ties by layer and head."""
    ranked = sorted(np.ndindex(scores.shape), key=lambda at: (-scores[at], at))
    return set(ranked[:count])


def test_heads_and_budgets_against_plain_hooks(
    results: Callable[[str], xr.Dataset],
    oracle: Callable[[str, int], Oracle],
    architecture: str,
    grid: Grid,
) -> None:
    measured, number = results(architecture), 1
    plain, label = oracle(architecture, number), grid.cells[number].label
    ours = measured.sel(cell=label)
    assert float(ours.n_eval) == plain.n_scored
    np.testing.assert_allclose(ours.kl_none, plain.none, rtol=1e-4, atol=1e-5)
    effects = [
        [plain.none - plain.patched({(layer, head)}) for head in range(4)] for layer in range(5)
    ]
    np.testing.assert_allclose(ours.effect, effects, rtol=1e-3, atol=2e-5)
    np.testing.assert_allclose(ours.attention, plain.attention(), rtol=1e-4, atol=1e-6)
    of_other = measured.attribution.sel(cell=grid.cells[0].label)  # the persona's other task
    scores = {
        "effect": ours.effect.values,
        "attribution": ours.attribution.values,
        "attention": ours.attention.values,
        "transfer": of_other.values,
        "random": random_scores(0, label, 20).reshape(5, 4),
    }
    assert list(ours.budget.values) == list(BUDGETS)
    assert list(ours.ranking.values) == list(scores)
    for ranking, of_heads in scores.items():
        curve = [plain.patched(best(of_heads, count)) for count in BUDGETS.values()]
        kl = ours.kl.sel(ranking=ranking)
        np.testing.assert_allclose(kl, curve, rtol=1e-3, atol=2e-5, err_msg=ranking)
        shares = 1 - np.array(curve) / plain.none
        closure = ours.closure.sel(ranking=ranking)
        np.testing.assert_allclose(closure, shares, rtol=1e-3, atol=1e-4, err_msg=ranking)
        expected = agreement(of_heads, ours.effect.values)
        assert float(ours.agreement.sel(ranking=ranking)) == pytest.approx(expected, abs=1e-6)
    assert list(ours["values"].values) == [count * 8 for count in BUDGETS.values()]


def test_attribution_is_the_slope_of_the_effect(
    results: Callable[[str], xr.Dataset],
    oracle: Callable[[str, int], Oracle],
    architecture: str,
    grid: Grid,
) -> None:
    ours = results(architecture).attribution.sel(cell=grid.cells[0].label).values
    plain = oracle(architecture, 0)
    sample = [*best(np.abs(ours), 3), *((layer, layer % 4) for layer in range(5))]
    for layer, head in sample:
        expected = plain.slope(layer, head)
        assert float(ours[layer, head]) == pytest.approx(expected, rel=2e-3, abs=2e-5)


def test_all_heads_are_the_clean_run_in_every_cell(
    results: Callable[[str], xr.Dataset], architecture: str
) -> None:
    measured = results(architecture)
    assert float(np.abs(measured.kl.sel(budget="all")).max()) < 1e-6
    assert float(measured.kl_none.min()) > 0.01
    none = measured.kl.sel(budget="0").values
    np.testing.assert_array_equal(none, np.repeat(measured.kl_none.values[:, None], 5, axis=1))
    assert (measured.closure.sel(budget="0") == 0).all()


def test_nothing_patched_is_the_none_of_kv_graft(
    results: Callable[[str], xr.Dataset],
    random_model: Callable[[str], TransformersModel],
    grid: Grid,
    tmp_path: Path,
) -> None:
    grafted = pn.run(
        "kv_graft",
        random_model("gemma2"),
        replace(grid, markers=dict.fromkeys(grid.personas, ("the",))),
        grafts="none",
        bands="all",
        n_eval=N_EVAL,
        n_tokens=1,
        store=tmp_path / "s.zarr",
        progress=False,
    )
    none = grafted.kl.sel(graft="none", layer_band="all").isel(model=0)
    np.testing.assert_allclose(results("gemma2").kl_none, none, rtol=1e-5, atol=1e-6)


def test_without_reuse_the_same_numbers(
    results: Callable[[str], xr.Dataset],
    random_model: Callable[[str], TransformersModel],
    architecture: str,
    grid: Grid,
    tmp_path: Path,
) -> None:
    whole = measure(random_model(architecture), grid, tmp_path / "s.zarr", reuse=False)
    assert_same(whole.isel(model=0), results(architecture))


def assert_same(one: xr.Dataset, other: xr.Dataset, atol: float = 2e-5) -> None:
    for name in set(other.data_vars) - {"seconds"}:
        ours, theirs = one[name].values.astype(float), other[name].values.astype(float)
        if name != "agreement":  # scores that are close may change places
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=atol, err_msg=str(name))


def test_numbers_do_not_depend_on_the_cells_asked_for(
    results: Callable[[str], xr.Dataset],
    random_model: Callable[[str], TransformersModel],
    grid: Grid,
    tmp_path: Path,
) -> None:
    store, labels = tmp_path / "s.zarr", [cell.label for cell in grid.cells]
    first = measure(random_model("gemma2"), grid, store, cells=labels[1])
    assert first.completed.values.ravel().tolist() == [False, True]
    whole = measure(random_model("gemma2"), grid, store).isel(model=0)
    assert set(whole.transfer_tasks.values) == {1}
    assert_same(whole, results("gemma2"))


def test_another_grid_with_the_same_cell_has_a_transfer_of_its_own(
    random_model: Callable[[str], TransformersModel], grid: Grid, tmp_path: Path
) -> None:
    more = replace(grid, tasks={**grid.tasks, "plan": "Plan a day by the sea."})
    store, model, label = tmp_path / "s.zarr", random_model("llama"), grid.cells[0].label
    for of, number in ((grid, 1), (more, 2)):
        ours = measure(model, of, store, cells=label, rankings="transfer,random")
        assert ours.transfer_tasks.sel(cell=label).item() == number


def test_sdpa_gives_the_attention_of_eager(
    random_folder: Callable[[str], Path],
    results: Callable[[str], xr.Dataset],
    grid: Grid,
    tmp_path: Path,
) -> None:
    model = pn.load_model(random_folder("llama"), attention="sdpa")
    ours = measure(model, grid, tmp_path / "s.zarr", rankings="attention").isel(model=0)
    np.testing.assert_allclose(ours.attention, results("llama").attention, rtol=1e-4, atol=1e-6)


def test_only_what_is_asked_for_is_measured_and_stored(
    random_model: Callable[[str], TransformersModel],
    grid: Grid,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = sys.modules[load_experiment("head_budget").measure.__module__]
    monkeypatch.delattr(module, "patch_each")
    monkeypatch.delattr(module, "attribute_heads")
    ours = measure(random_model("llama"), grid, tmp_path / "s.zarr", rankings="random, attention")
    assert list(ours.ranking.values) == ["attention", "random"]
    absent = {"effect", "agreement", "attribution", "transfer_tasks"}
    assert not absent & set(ours.data_vars)
    assert bool(ours.kl.notnull().all())


def test_an_unknown_ranking_is_one_sentence(
    random_model: Callable[[str], TransformersModel], grid: Grid, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="there is no ranking best; use effect, attribution"):
        measure(random_model("llama"), grid, tmp_path / "s.zarr", rankings="best,effect")


def test_other_tokens_behind_the_persona_are_nan_and_named(
    make_folder: Callable[..., Path], grid: Grid, tmp_path: Path
) -> None:
    model = pn.load_model(make_folder("llama", vocab_size=1025))
    # With the comma behind it, the mark is one token: the task begins a token later.
    model.tokenizer.add_tokens([AddedToken("),", normalized=False)])
    odd = replace(grid, personas={**grid.personas, "odd": "a chef (of old)"})
    store = tmp_path / "s.zarr"
    with pytest.warns(UserWarning, match=r"NaN in odd/haiku, odd/policy\."):
        ours = measure(model, odd, store, rankings="attention,transfer")
    ours = ours.isel(model=0)
    assert bool(ours.completed.all())
    lost = ours.sel(cell=["odd/haiku", "odd/policy"])
    for name in ("kl", "closure", "kl_none", "attribution", "attention", "values", "n_eval"):
        assert bool(lost[name].isnull().all()), name
        assert bool(ours[name].sel(cell="chef/haiku").notnull().all()), name
    assert bool(lost.transfer_tasks.isnull().all())


def test_learned_positions_are_refused(
    random_model: Callable[[str], TransformersModel], grid: Grid, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="heads of a gpt2 model cannot be patched from a prompt"):
        measure(random_model("gpt2"), grid, tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()


def test_gradients_are_asked_of_no_server(
    random_folder: Callable[[str], Path], grid: Grid, tmp_path: Path
) -> None:
    model = pn.load_model(random_folder("llama"))
    said = "the other rankings run there: --rankings effect,attention,random"
    with sandboxed(model), pytest.raises(UsageError, match=said):
        measure(model, grid, tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize("architecture", crossed("gemma2", "gpt_neox"))
def test_the_last_block_may_work_on_the_last_columns_alone(
    architecture: str, random_model: Callable[[str], TransformersModel]
) -> None:
    model, ids = random_model(architecture), torch.arange(40).view(2, 20)
    with model.trace(ids, use_cache=False, logits_to_keep=3):
        whole = save(model.output.logits)
    with model.trace(ids, use_cache=False, logits_to_keep=3):
        finish_last_columns(model, 3, attention_too=True)
        last = save(model.output.logits)
    torch.testing.assert_close(last, whole, rtol=1e-5, atol=1e-5)
