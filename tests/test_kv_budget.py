"""Parts of a grafted persona against plain transformers (`plain_grafts`), and what is stored."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from nnsight import TransformersModel
from plain_grafts import Oracle, Place
from random_models import crossed
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoModelForCausalLM

import persona_nns as pn
from persona_nns.declarations.catalog import load_experiment
from persona_nns.errors import PersonaError, UsageError
from persona_nns.prompts.grids import Grid
from persona_nns.runs.grid_plan import plan_grid
from persona_nns.tracing import spend

pytestmark = pytest.mark.filterwarnings("ignore:The grid has no markers")

ROTARY = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "olmo2", "gpt_neox")
SLIDING = ("gemma2", "gemma3", "mistral")
N_LAYERS = 5
EVERY = {"units": "layer_head,token", "rankings": "effect,attention,attention_value,random"}


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    return sys.modules[load_experiment("kv_budget").measure.__module__]


@pytest.fixture(scope="module")
def kv_graft() -> ModuleType:
    return sys.modules[load_experiment("kv_graft").measure.__module__]


@pytest.fixture(scope="module")
def folder(
    random_folder: Callable[[str], Path], make_folder: Callable[..., Path]
) -> Callable[[str], Path]:
    """Name of an architecture → a random model that sees whole prompts in every layer."""

    @cache
    def make(name: str) -> Path:
        return make_folder(name, sliding_window=256) if name in SLIDING else random_folder(name)

    return make


@pytest.fixture(scope="module")
def loaded(folder: Callable[[str], Path]) -> Callable[[str], TransformersModel]:
    return cache(lambda name: pn.load_model(folder(name)))


@pytest.fixture(scope="module")
def plain(folder: Callable[[str], Path]) -> Callable[[str], Any]:
    """The same weights in plain transformers."""

    @cache
    def load(name: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(
            folder(name), dtype=torch.float32, attn_implementation="eager"
        )
        return model.eval().requires_grad_(False)

    return load


@pytest.fixture(scope="module")
def odd(small_grid: Grid) -> Grid:
    """Personas that are longer than the baseline's, and one that is shorter."""
    return replace(small_grid, personas={**small_grid.personas, "you": "you"})


def measured(
    experiment: ModuleType, model: TransformersModel, grid: Grid, cells: str, **options: Any
) -> dict[str, Any]:
    """What the experiment gives of some cells of a grid, as one batch."""
    asked = {**EVERY, **options}
    choice = {name: asked[name] for name in EVERY}
    plan = plan_grid(model.tokenizer, grid, [])
    plan = experiment.arrange(model.tokenizer, plan, grid.cells, **choice)
    units = [unit for unit in plan.units if unit.label in cells.split(",")]
    found = experiment.measure(model, units, **asked)
    found = experiment.finish(model.tokenizer, units, found, **choice)
    assert set(found) == set(plan.variables)
    return found


class Parts:
    """Some of a persona's keys and values in the host, as PROTOCOLS 14 says, of one cell."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle
        config = oracle.plain.config
        self.n_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.tokens = [oracle.prompts["XY"].ids[k] for k in oracle.spans["XY"]["persona"]]
        self.none = oracle.kl(oracle.uncached("BY"))
        self.all = oracle.graft("persona")

    def _after(self) -> list[Place]:
        spans = self.oracle.spans["BY"]
        return [("BY", token) for span in ("task", "tail") for token in spans[span]]

    def heads(self, chosen: Sequence[int]) -> float:
        """KL with these (layer, head) pairs, numbered layer by layer, from the clean run."""
        spans = self.oracle.spans
        slot = max(len(spans[name]["persona"]) for name in ("XY", "BY"))
        layout: list[list[list[Place]]] = []
        for layer in range(N_LAYERS):
            layout.append([])
            for head in range(self.n_heads):
                name = "XY" if layer * self.n_heads + head in chosen else "BY"
                before: list[Place] = [("BY", token) for token in spans["BY"]["prefix"]]
                persona: list[Place] = [(name, token) for token in spans[name]["persona"]]
                spare: list[Place] = [None] * (slot - len(persona))
                layout[-1].append([*spare, *before, *persona, *self._after()])
        return self.oracle.kl_of(layout)

    def seen(self, chosen: Sequence[int]) -> float:
        """KL with these of the persona's tokens visible, and the others hidden where they stand."""
        spans = self.oracle.spans
        before: list[Place] = [("BY", token) for token in spans["BY"]["prefix"]]
        persona: list[Place] = [
            ("XY", token) if k in chosen else None for k, token in enumerate(spans["XY"]["persona"])
        ]
        return self.oracle.kl_of([[*before, *persona, *self._after()]] * N_LAYERS)

    def weights(self, n_forced: int = 9) -> Tensor:
        """Weights of p_last and forced tokens to the persona in XY, [layer, head, query, token]."""
        xy = self.oracle.prompts["XY"].ids
        ids = torch.tensor([[*xy, *self.oracle.said[:n_forced]]])
        attentions = self.oracle.plain(ids, output_attentions=True, use_cache=False).attentions
        persona = list(self.oracle.spans["XY"]["persona"])
        return torch.stack([of[0, :, len(xy) - 1 :, persona] for of in attentions])

    def norms(self) -> Tensor:
        """Norms of the persona's values in XY, [layer, kv_head, token]."""
        persona = list(self.oracle.spans["XY"]["persona"])
        return torch.stack(
            [of.values[0][:, persona].norm(dim=-1) for of in self.oracle.caches["XY"]]
        )


def close(ours: Any, theirs: Any, *, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-3, atol=atol)


def first(scores: Any, count: int) -> list[int]:
    """The parts with the largest scores, equal ones in order."""
    return sorted(range(len(scores)), key=lambda k: (-float(scores[k]), k))[:count]


@pytest.mark.parametrize("name", crossed("qwen2", "gemma3", "gpt_neox", among=ROTARY))
def test_parts_equal_plain_transformers(
    loaded: Callable[[str], TransformersModel],
    plain: Callable[[str], Any],
    experiment: ModuleType,
    odd: Grid,
    name: str,
) -> None:
    model, cells = loaded(name), "chef/haiku,you/policy"
    found = measured(experiment, model, odd, cells, seed=3)
    grid_cells = list(odd.select_cells(cells))
    parts = [Parts(Oracle(plain(name), model.tokenizer, cell)) for cell in grid_cells]
    lengths = [[len(p.oracle.spans[of]["persona"]) for of in ("XY", "BY")] for p in parts]
    assert lengths[0][0] > lengths[0][1]
    assert lengths[1][0] < lengths[1][1]
    assert found["effect"].shape == (2, N_LAYERS, parts[0].n_heads)
    for c, (of, cell) in enumerate(zip(parts, grid_cells, strict=True)):
        n_pairs, n_tokens, kl = N_LAYERS * of.n_heads, len(of.tokens), found["kl"][c]
        close(found["kl_none"][c], of.none)
        close(kl[0, :, 0], [of.none] * 4)
        close(kl[:, :, -1], [[of.all] * 4] * 2)
        close(kl[1, :, 0], [of.seen([])] * 4)
        close(found["closure"][c], 1 - np.asarray(kl) / of.none, atol=1e-4)
        # Every part alone.
        effect, token_effect = found["effect"][c].flatten(), found["token_effect"][c]
        close(effect, [of.none - of.heads([k]) for k in range(n_pairs)])
        every = range(n_tokens)
        close(token_effect[:n_tokens], [of.seen([*{*every} - {k}]) - of.all for k in every])
        assert token_effect[n_tokens:].isnan().all()
        assert effect.unique().numel() > n_pairs // 2
        # Where the clean run looks.
        weights, norms = of.weights(), of.norms()
        shared = weights.mean(2).unflatten(1, (of.n_heads, -1)).mean(2)
        close(found["attention"][c], shared.sum(-1))
        close(found["attention_value"][c], (shared * norms).sum(-1))
        close(found["token_attention"][c, :n_tokens], weights.mean((0, 1, 2)))
        close(found["token_attention_value"][c, :n_tokens], (shared * norms).mean((0, 1)))
        # Budgets, by every ranking.
        order = [
            list(np.random.default_rng([3, *cell.label.encode()]).permutation(count))
            for count in (n_pairs, n_tokens)
        ]
        rankings = ("effect", "attention", "attention_value")
        heads = [first(found[r][c].flatten(), n_pairs) for r in rankings] + [order[0]]
        tokens = [first(found[f"token_{r}"][c, :n_tokens], n_tokens) for r in rankings]
        tokens += [order[1]]
        most = max(n_pairs, max(len(of.tokens) for of in parts))
        labels = ["0", *(str(2**k) for k in range(9) if 2**k < most), "all"]
        assert kl.shape == (2, 4, len(labels))
        for r in (0, 1, 3):
            for b in (2, 3):
                close(kl[0, r, b], of.heads(heads[r][: int(labels[b])]))
                close(kl[1, r, b], of.seen(tokens[r][: int(labels[b])]))
        texts = [model.tokenizer.decode(of.tokens[k]) for k in tokens[0]]
        assert found["top_tokens"][c][0] == [*texts, *[""] * 10][:10]
        assert found["token_text"][c][:n_tokens] == [model.tokenizer.decode(t) for t in of.tokens]
        # Bytes: key and value, numbers of 4 bytes.
        d_head = of.oracle.caches["XY"][0].keys.shape[-1]
        counts = [int(label) if label != "all" else most for label in labels]
        assert found["cache_bytes"][c].tolist() == [
            [min(k, n_pairs) * n_tokens * 2 * d_head * 4 for k in counts],
            [min(k, n_tokens) * N_LAYERS * of.n_heads * 2 * d_head * 4 for k in counts],
        ]
        ranks: Any = spearmanr(found["attention"][c].flatten(), effect)
        close(found["agreement"][c, 0, :2], [1, ranks.statistic])


@pytest.mark.parametrize("name", crossed("qwen2", "gemma3", among=ROTARY))
def test_all_is_the_graft_and_reuse_changes_nothing(
    loaded: Callable[[str], TransformersModel],
    experiment: ModuleType,
    kv_graft: ModuleType,
    small_grid: Grid,
    name: str,
) -> None:
    model = loaded(name)
    labels = ",".join(cell.label for cell in small_grid.cells)
    found = measured(experiment, model, small_grid, labels)
    grafted = kv_graft.measure(
        model, list(small_grid.cells), n_tokens=1, grafts="none,persona", bands="all"
    )["kl"][:, :, 0]
    whole = found["kl"][..., -1].flatten(1)
    torch.testing.assert_close(whole, grafted[:, 1:].expand_as(whole), rtol=1e-4, atol=1e-6)
    nothing = found["kl"][:, 0, :, 0]
    torch.testing.assert_close(nothing, grafted[:, :1].expand_as(nothing), rtol=1e-4, atol=1e-6)
    again = measured(experiment, model, small_grid, labels, reuse=False)
    assert_same(again, found)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(found) == set(expected)
    for name, values in expected.items():
        if name in ("token_text", "top_tokens", "agreement"):
            continue  # of scores that differ by rounding
        torch.testing.assert_close(
            found[name],
            values,
            rtol=1e-3,
            atol=2e-5,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("name", crossed("qwen2", among=[n for n in ROTARY if n != "gemma2"]))
def test_sdpa_gives_the_numbers_of_eager_attention(
    loaded: Callable[[str], TransformersModel],
    folder: Callable[[str], Path],
    experiment: ModuleType,
    odd: Grid,
    name: str,
) -> None:
    by_sdpa = pn.load_model(folder(name), attention="sdpa")
    for cells in ("chef/haiku,you/policy", "you/policy"):
        expected = measured(experiment, loaded(name), odd, cells)
        assert_same(measured(experiment, by_sdpa, odd, cells), expected)


def test_where_attention_is_not_known_its_rankings_are_nan(
    folder: Callable[[str], Path],
    experiment: ModuleType,
    small_grid: Grid,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = pn.load_model(folder("qwen2"), attention="sdpa")
    monkeypatch.setattr("persona_nns.tracing.attention.compute_weights", lambda *_: None)
    found = measured(experiment, model, small_grid, "chef/haiku")
    assert found["kl"][:, :, 1:3].isnan().all()
    assert np.isnan(found["agreement"][..., 1:3]).all()
    assert found["token_attention"].isnan().all()
    assert not found["kl"][:, :, [0, 3]].isnan().any()
    assert found["top_tokens"][0][1] == [""] * 10
    assert found["top_tokens"][0][0][0]


def test_a_continuation_that_ends_early_has_fewer_queries(
    random_folder: Callable[[str], Path],
    plain: Callable[[str], Any],
    experiment: ModuleType,
    odd: Grid,
) -> None:
    model = pn.load_model(random_folder("qwen2"))
    cell = next(iter(odd.select_cells("chef/haiku")))
    of = Parts(Oracle(plain("qwen2"), model.tokenizer, cell))
    model._module.generation_config.eos_token_id = of.oracle.said[3]
    length = of.oracle.said.index(of.oracle.said[3]) + 1
    with pytest.warns(UserWarning, match="end before 10 tokens"):
        found = measured(experiment, model, odd, "chef/haiku", rankings="attention")
    assert found["n_eval"].tolist() == [length]
    close(found["token_attention"][0, : len(of.tokens)], of.weights(length - 1).mean((0, 1, 2)))


def test_what_is_not_asked_for_is_left_out_and_the_rest_resumed(
    loaded: Callable[[str], TransformersModel], small_grid: Grid, tmp_path: Path
) -> None:
    model, store = loaded("qwen2"), tmp_path / "s.zarr"
    asked: dict[str, Any] = {"units": "token", "rankings": "random,attention"}
    pn.run("kv_budget", model, small_grid, store=store, cells="chef/haiku", **asked)
    ds = pn.run("kv_budget", model, small_grid, store=store, **asked)
    assert bool(ds.completed.all())
    assert ds.kl.dims == ("model", "cell", "unit", "ranking", "budget")
    assert ds.unit.values.tolist() == ["token"]
    assert ds.ranking.values.tolist() == ["attention", "random"]
    assert set(ds.data_vars) & {"effect", "attention", "token_effect", "agreement"} == set()
    assert {"token_attention", "token_text", "top_tokens"} <= set(ds.data_vars)
    n_longest = int((ds.token_text != "").sum("token").max())
    assert ds.sizes["token"] == n_longest
    labels = ["0", *(str(2**k) for k in range(9) if 2**k < max(10, n_longest)), "all"]
    assert ds.budget.values.tolist() == labels
    # A budget beyond a persona's own tokens is all of them.
    yoda = ds.kl.sel(cell="yoda/haiku", ranking="random").squeeze().values
    n_own = int((ds.token_text.sel(cell="yoda/haiku") != "").sum())
    beyond = [b for b, label in enumerate(labels[:-1]) if int(label) >= n_own]
    assert n_own < n_longest
    assert beyond
    np.testing.assert_array_equal(yoda[beyond], yoda[-1])
    assert float(yoda[0]) != float(yoda[-1])
    others: dict[str, Any] = {"units": "layer_head", "rankings": "attention"}
    heads = pn.run("kv_budget", model, small_grid, store=store, **others)
    assert set(heads.data_vars) & {"effect", "token_attention", "top_tokens", "agreement"} == set()
    assert heads.attention.dims == ("model", "cell", "layer", "kv_head")
    np.testing.assert_allclose(heads.depth.values[0], np.arange(5) / 5)
    with pytest.raises(UsageError, match="there is no ranking 'value'; use effect, attention"):
        pn.run("kv_budget", model, small_grid, store=store, rankings="value")


def test_another_grid_takes_over_what_is_there(
    loaded: Callable[[str], TransformersModel], small_grid: Grid, tmp_path: Path
) -> None:
    model, store = loaded("qwen2"), tmp_path / "s.zarr"
    few = replace(small_grid, name="few", tasks=dict(list(small_grid.tasks.items())[:2]))
    asked: dict[str, Any] = {"units": "layer_head", "store": store}
    known = pn.run("kv_budget", model, few, **asked)
    whole = pn.run("kv_budget", model, small_grid, cells="chef/haiku", **asked)
    for name in ("effect", "kl"):
        own, taken = (of[name].sel(cell="chef/haiku").values for of in (known, whole))
        assert np.isfinite(taken).all()
        np.testing.assert_array_equal(taken, own)


def test_a_prompt_longer_than_a_sliding_window_is_refused(
    random_model: Callable[[str], TransformersModel], small_grid: Grid, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="see no more than the last 16"):
        pn.run("kv_budget", random_model("mistral"), small_grid, store=tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()


def test_keys_that_cannot_be_moved_are_refused(
    random_model: Callable[[str], TransformersModel], experiment: ModuleType, small_grid: Grid
) -> None:
    with pytest.raises(PersonaError, match="keys of a gpt2 model cannot be moved"):
        measured(experiment, random_model("gpt2"), small_grid, "chef/haiku")


def test_a_ranking_whose_scores_are_not_known_gives_nothing() -> None:
    scores = torch.tensor([[[3.0, 1.0, 2.0], [1.0, torch.nan, 2.0]], [[0.0, 5.0, 9.0], [1, 2, 3]]])
    exists = torch.tensor([[True, True, True], [True, True, False]])
    asked: list[Tensor] = []

    def measure(kept: Tensor) -> Tensor:
        asked.append(kept)
        return (kept * torch.tensor([1, 10, 100])).sum(-1)

    found = spend(measure, scores, exists, [[0, 1, 2, 3], [0, 1, 2, 2]])
    assert found[0, 0].tolist() == [0, 1, 101, 111]
    assert found[0, 1].isnan().all()
    assert found[1].tolist() == [[0, 10, 11, 11], [0, 10, 11, 11]]
    assert len(asked) == 1
    assert len(asked[0]) < 8  # the same choices once
