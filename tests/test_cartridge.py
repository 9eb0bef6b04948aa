"""Cartridges in hosts, against plain transformers: one cell at a time, caches edited in loops."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from nnsight import TransformersModel
from plain_grafts import Oracle, Place, rotated, run_on
from random_models import crossed
from test_kv_graft import ROTARY, close, odd
from torch import Tensor
from transformers import PreTrainedModel

from persona_nns.declarations.catalog import load_experiment
from persona_nns.models.cartridges import save_cartridge
from persona_nns.models.load import record_of
from persona_nns.prompts.grids import Cell, Grid
from persona_nns.tracing import (
    Cartridge,
    Form,
    HostGap,
    initial_slots,
    open_slots,
)

pytestmark = pytest.mark.filterwarnings("ignore:The grid has no markers")
SLOTS = 3


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    return sys.modules[load_experiment("persona_cartridge").measure.__module__]


@pytest.fixture(scope="module")
def grafting() -> ModuleType:
    return sys.modules[load_experiment("kv_graft").measure.__module__]


def cartridge_of(
    model: TransformersModel, cell: Cell, keys: Tensor, values: Tensor, start: int, form: Form
) -> Cartridge:
    record = record_of(model)
    return Cartridge(
        keys=keys,
        values=values,
        model=record.label,
        model_version=record.version,
        precision=record.precision,
        persona=cell.persona,
        persona_text=cell.persona_text,
        form=form,
        start=start,
        tasks=("haiku",),
        seed=4,
        losses=(0.5, 0.25),
    )


def plain_kl(oracle: Oracle, cartridge: Cartridge) -> float:
    """KL with a cartridge in the host, at the positions that its keys stand at."""
    start, slots = cartridge.start, cartridge.slots
    prompt, spans = oracle.prompts["BY"], oracle.spans["BY"]
    assert len(spans["prefix"]) == start
    # Token start + i of the cartridge's cache is its slot i: no key of it moves.
    held = [
        SimpleNamespace(
            keys=torch.nn.functional.pad(keys, (0, 0, start, 0))[None],
            values=torch.nn.functional.pad(values, (0, 0, start, 0))[None],
        )
        for keys, values in zip(cartridge.keys, cartridge.values, strict=True)
    ]
    places: list[Place] = [("BY", token) for token in spans["prefix"]]
    places += [("slots", start + k) for k in range(slots)]
    behind = [*spans["task"], *spans["tail"]]
    if cartridge.form == "graft":
        places += [("BY", token) for token in behind]
        behind = []
    caches = {**oracle.caches, "slots": held}
    forced = [*(prompt.ids[k] for k in behind), prompt.ids[-1], *oracle.said[:-1]]
    said = run_on(oracle.plain, [places] * len(held), caches, forced)
    return oracle.kl(said[-10:])


def drawn(like: HostGap, slots: int) -> tuple[Tensor, Tensor]:
    """Random keys and values of the size that a model's are."""
    cache = like.sources.caches["BY"]
    draw = torch.Generator().manual_seed(3)
    keys, values = (
        torch.stack(
            [
                torch.randn(each.shape[1], slots, each.shape[3], generator=draw) * each.std()
                for each in held
            ]
        )
        for held in (cache.keys, cache.values)
    )
    return keys, values


# All layers of the random mistral have a window that ends before the slots; a run is refused there.
SEEING = [name for name in ROTARY if name != "mistral"]


@pytest.mark.parametrize("name", crossed("qwen2", "gemma3", "gpt_neox", among=SEEING))
def test_a_host_with_a_cartridge_equals_plain_transformers(
    random_model: Callable[[str], TransformersModel],
    plain_model: Callable[[str], PreTrainedModel],
    experiment: ModuleType,
    grafting: ModuleType,
    small_grid: Grid,
    tmp_path: Path,
    name: str,
) -> None:
    model, cells = random_model(name), list(small_grid.select_cells("chef/haiku,chef/policy"))
    gap = experiment.read_gap(model, cells, 10)
    oracles = [Oracle(plain_model(name), model.tokenizer, cell) for cell in cells]
    keys, values = drawn(gap, SLOTS)
    for form in ("graft", "prefix"):
        given = cartridge_of(model, cells[0], keys, values, gap.start, form)
        expected = [plain_kl(oracle, given) for oracle in oracles]
        hosts = open_slots(gap.sources, gap.forced, SLOTS, form)
        window = hosts.with_cartridge(given)
        close(experiment.score(model, gap, window, hosts.predicting), expected)
        # The other persona has none; a graft of the same file is the same.
        save_cartridge(given, tmp_path / "c.safetensors")
        asked = {"grafts": "none", "bands": "all", "n_tokens": 1}
        file = str(tmp_path / "c.safetensors")
        kl = grafting.measure(model, [*cells, *odd(small_grid)[1:]], cartridge=[file], **asked)[
            "kl"
        ]
        close(kl[:2, 1, 0], expected)
        assert kl[2, 1, 0].isnan()
        assert abs(expected[0] - float(kl[0, 0, 0])) > 1e-3
        # From another place its keys are turned.
        there = torch.stack(
            [
                torch.stack(
                    [rotated(oracles[0].plain, layer[:, s], 5, k) for s in range(SLOTS)], dim=1
                )
                for k, layer in enumerate(keys)
            ]
        )
        moved = replace(given, keys=there, start=gap.start + 5)
        window = hosts.with_cartridge(moved)
        close(experiment.score(model, gap, window, hosts.predicting), expected)


@pytest.mark.parametrize("name", crossed("qwen2", "gemma3", "gpt_neox", among=ROTARY))
def test_the_whole_persona_as_a_cartridge_is_the_graft_of_it(
    random_model: Callable[[str], TransformersModel],
    experiment: ModuleType,
    grafting: ModuleType,
    small_grid: Grid,
    tmp_path: Path,
    name: str,
) -> None:
    model, cells = random_model(name), odd(small_grid)
    files: list[str] = []
    for cell in cells:
        gap = experiment.read_gap(model, [cell], 10)
        (tokens,) = gap.attention.shape[1:]
        whole = initial_slots(gap.sources, gap.attention[0], tokens, 0)
        given = cartridge_of(model, cell, *whole, gap.start, "graft")
        files.append(str(tmp_path / f"{cell.persona}.safetensors"))
        save_cartridge(given, files[-1])
        others = experiment.measure_others(model, gap, [[2]])
        assert int(others["cache_bytes_full_graft"]) == given.n_bytes
    asked = {"grafts": "none,persona", "bands": "all", "n_tokens": 1}
    found = grafting.measure(model, cells, cartridge=files, **asked)
    torch.testing.assert_close(found["kl"][:, 2], found["kl"][:, 1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found["closure"][:, 2], found["closure"][:, 1], rtol=1e-5, atol=1e-6)
    assert found["cache_bytes"][:, 2].tolist() == found["cache_bytes"][:, 1].tolist()
    assert [text[2] for text in found["text"]] == ["", ""]


@pytest.mark.parametrize("name", crossed("qwen2", "gemma3", "gpt_neox", among=ROTARY))
def test_slots_begin_as_the_tokens_that_are_looked_at_most(
    random_model: Callable[[str], TransformersModel],
    plain_model: Callable[[str], PreTrainedModel],
    experiment: ModuleType,
    small_grid: Grid,
    name: str,
) -> None:
    model, cells = random_model(name), list(small_grid.select_cells("chef/haiku,chef/policy"))
    plain = plain_model(name)
    gap = experiment.read_gap(model, cells, 10)
    looked: list[Tensor] = []
    oracles = [Oracle(plain, model.tokenizer, cell) for cell in cells]
    for oracle in oracles:
        ended = [k for k, token in enumerate(oracle.said) if token == 2]
        n_said = ended[0] + 1 if ended else 10
        ids = [*oracle.prompts["XY"].ids, *oracle.said[: n_said - 1]]
        shown = plain(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
        weights = torch.stack(shown)[:, 0, :, -n_said:]  # [layer, head, query, key]
        looked.append(weights.mean((0, 1, 2))[oracle.spans["XY"]["persona"]])
    expected = torch.stack(looked)
    close(gap.attention, expected)
    order = expected.mean(0).argsort(descending=True)
    best = sorted(order[:SLOTS].tolist())
    start = len(oracles[0].spans["BY"]["prefix"])
    keys, values = initial_slots(gap.sources, gap.attention.mean(0), SLOTS, 0)
    for layer in range(len(keys)):
        for slot, token in enumerate(best):
            at = oracles[0].spans["XY"]["persona"][token]
            held = [oracle.caches["XY"][layer] for oracle in oracles]
            key = torch.stack([each.keys[0, :, at] for each in held]).mean(0)
            value = torch.stack([each.values[0, :, at] for each in held]).mean(0)
            close(keys[layer][:, slot], rotated(plain, key, start + slot - at, layer))
            close(values[layer][:, slot], value)


def test_more_slots_than_tokens_hold_the_best_ones_twice(
    random_model: Callable[[str], TransformersModel], experiment: ModuleType, small_grid: Grid
) -> None:
    model, (cell,) = random_model("qwen2"), small_grid.select_cells("yoda/haiku")
    gap = experiment.read_gap(model, [cell], 10)
    weight = gap.attention[0]
    whole, more, other = (
        initial_slots(gap.sources, weight, n, seed)[1]
        for n, seed in ((len(weight), 0), (len(weight) + 1, 0), (len(weight) + 1, 1))
    )
    best = int(weight.argmax())
    again = best + 1
    torch.testing.assert_close(more[:, :, best], whole[:, :, best])
    rest = [k for k in range(len(weight) + 1) if k != again]
    torch.testing.assert_close(more[:, :, rest], whole)
    apart = (more[:, :, again] - whole[:, :, best]).std() / whole.std()
    assert 0.005 < float(apart) < 0.02
    assert not torch.equal(more[:, :, again], other[:, :, again])
    torch.testing.assert_close(more[:, :, rest], other[:, :, rest])


@pytest.mark.parametrize("form", ["graft", "prefix"])
@pytest.mark.parametrize("name", crossed("qwen2", "gemma3", among=SEEING))
def test_gradients_of_the_loss_are_those_of_finite_differences(
    random_model: Callable[[str], TransformersModel],
    experiment: ModuleType,
    small_grid: Grid,
    name: str,
    form: Form,
) -> None:
    model, cells = random_model(name), list(small_grid.select_cells("chef/haiku,chef/policy"))
    gap = experiment.read_gap(model, cells, 10)
    hosts = open_slots(gap.sources, gap.forced, SLOTS, form)

    def loss(keys: Tensor, values: Tensor) -> Tensor:
        window = hosts.holding(keys, values, gap.start)
        return experiment.score(model, gap, window, hosts.predicting).mean()

    begun = [each.clone().requires_grad_() for each in drawn(gap, SLOTS)]
    loss(*begun).backward()
    with torch.no_grad():
        for k, each in enumerate(begun):
            assert each.grad is not None
            for layer in (1, 3):  # all positions are seen there
                way = torch.zeros_like(each)
                way[layer] = each.grad[layer] / each.grad[layer].norm()
                step = 0.02 * float(each[layer].norm()) / each[layer].numel() ** 0.5
                ends = [
                    loss(*[other + sign * step * way if o == k else other
                           for o, other in enumerate(begun)])
                    for sign in (1, -1)
                ]  # fmt: skip
                slope = float(ends[0] - ends[1]) / (2 * step)
                assert slope == pytest.approx(float(each.grad[layer].norm()), rel=0.02)
    assert all(weight.grad is None for weight in model._module.parameters())
