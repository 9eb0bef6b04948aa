"""Attention by sdpa gives the numbers of eager attention: masks, weights, and what reads them."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nnsight import TransformersModel, save
from random_models import ARCHITECTURES, crossed
from torch import Tensor

import persona_nns as pn
from persona_nns.cli.commands import main
from persona_nns.declarations.catalog import load_experiment
from persona_nns.prompts.grids import Grid
from persona_nns.prompts.identities import PERSONA, Pair, ask
from persona_nns.prompts.questions import load_questions
from persona_nns.results.reading import list_runs
from persona_nns.runs.verify import verify_store
from persona_nns.tracing import attention as attentions
from persona_nns.tracing.attention import compute_weights, look_at, read_mask
from persona_nns.tracing.batches import left_pad
from persona_nns.tracing.knockout import block_keys
from persona_nns.tracing.prefixes import fill_cache
from persona_nns.tracing.window import Window, open_batch

N_LAYERS = 5
TAKES_SDPA = [name for name in ARCHITECTURES if name != "gemma2"]
LONG, SHORT = list(range(20, 60)), list(range(30, 42))  # beyond a sliding window, and within

# What changes masks, reads weights, or resumes; on the grid's cells but for the last one.
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "localized_positions": {"layers": [0, 3], "positions": ["p_last", "g1"]},
    "host_injection": {"layer_sets": [[0], [1, 3]], "n_tokens": 4},
    "kv_graft": {"n_tokens": 4},
    "attention_knockout": {"n_tokens": 4},
    "persona_patching": {"layers": [0, 3]},
}


@pytest.fixture(scope="module")
def by_sdpa(random_folder: Callable[[str], Path]) -> Callable[[str], TransformersModel]:
    """Name of an architecture → its random model with attention by sdpa."""
    return cache(lambda name: pn.load_model(random_folder(name), attention="sdpa"))


@pytest.fixture(scope="module")
def pair(tokenizer: Any) -> Pair:
    """Two questions of different length; the identities differ in their number of tokens."""
    questions = load_questions("bundled")
    chosen = [replace(questions[0], question="Paris?"), questions[3]]
    names = ("thoroughly careful", "red", "average")
    asked = [
        tuple(ask(tokenizer, PERSONA, name, question) for question in chosen) for name in names
    ]
    return Pair(*names[:2], *asked)


def windows(model: TransformersModel) -> dict[str, Window]:
    """Passes that differ in what transformers makes of their mask."""
    behind = fill_cache(model, [LONG[:30]])
    short = fill_cache(model, [SHORT[:-1]])
    return {
        "short": open_batch(left_pad([SHORT]), None),
        "long": open_batch(left_pad([LONG]), None),
        "padded": open_batch(left_pad([LONG, SHORT]), None),
        "behind a cache": open_batch(left_pad([LONG]), behind),
        "one token": open_batch(left_pad([SHORT]), short),
    }


def masks(model: TransformersModel, window: Window) -> tuple[list[Tensor], list[bool]]:
    """Where queries see keys, and whether no mask was given, of each layer."""
    with model.trace(window.inputs(cached=True)):
        read, absent = save([]), save([])
        for block in model.layers:
            inputs = block.attn.inputs
            read.append(read_mask(block.attn, inputs))
            absent.append(inputs[1]["attention_mask"] is None)
    return [mask if mask.dtype is torch.bool else mask == 0 for mask in read], absent


@pytest.mark.parametrize("architecture", crossed("qwen2", "gemma3", "gpt_neox", among=TAKES_SDPA))
def test_a_mask_that_is_boolean_or_not_given_is_the_additive_one(
    architecture: str,
    random_model: Callable[[str], TransformersModel],
    by_sdpa: Callable[[str], TransformersModel],
) -> None:
    given: dict[str, bool] = {}
    for name, window in windows(random_model(architecture)).items():
        expected, absent_there = masks(random_model(architecture), window)
        found, absent = masks(by_sdpa(architecture), window)
        given[name] = not all(absent)
        assert not any(absent_there)
        n_columns = window.input_ids.shape[1]
        is_token = window.attention_mask[:, None, -n_columns:, None] > 0
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours & is_token, theirs & is_token), name
    slides = architecture in ("gemma3", "mistral")
    padded = {"padded": True, "behind a cache": True}
    assert given == {"short": False, "one token": False, "long": slides, **padded}


@pytest.mark.parametrize("architecture", crossed("qwen2", "gemma3", "gpt2", among=TAKES_SDPA))
@pytest.mark.parametrize("name", ["short", "long", "padded", "behind a cache", "one token"])
def test_keys_are_blocked_as_they_are_with_an_additive_mask(
    name: str,
    architecture: str,
    random_model: Callable[[str], TransformersModel],
    by_sdpa: Callable[[str], TransformersModel],
) -> None:
    window = windows(random_model(architecture))[name]
    width = window.attention_mask.shape[1]
    column = torch.arange(width)[None]
    keys = ((column > width - 8) & (column < width - 3)).expand(len(window.input_ids), -1)
    logits: list[Tensor] = []
    for model in (random_model(architecture), by_sdpa(architecture)):
        with model.trace(window.inputs()):
            for layer in (1, 2):
                block_keys(model.layers[layer].attn, column >= width - 3, keys)
            logits.append(save(model.output.logits[:, -1]))
    with by_sdpa(architecture).trace(window.inputs()):
        clean = save(by_sdpa(architecture).output.logits[:, -1])
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)
    assert float((logits[1] - clean).abs().amax(-1).min()) > 1e-3


@pytest.mark.filterwarnings("ignore:Continuations that end before")
@pytest.mark.filterwarnings("ignore:.*no marker")
@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("architecture", crossed("qwen2", "gemma3", "gpt_neox", among=TAKES_SDPA))
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_gives_the_numbers_of_eager_attention(
    name: str,
    architecture: str,
    reuse: bool,
    random_model: Callable[[str], TransformersModel],
    by_sdpa: Callable[[str], TransformersModel],
    small_grid: Grid,
    pair: Pair,
) -> None:
    measure, options = load_experiment(name).measure, {**EXPERIMENTS[name], "reuse": reuse}
    if (name, architecture) == ("kv_graft", "gpt2"):  # no key of it can be moved
        options["grafts"] = "none,all"
    units: Sequence[Any] = small_grid.cells
    # One unit alone has no padding: there is no mask in some of its passes.
    alone: Any = units[1]
    if name == "persona_patching":
        units, alone = [pair], pair.only([1])
    for batch in (list(units), [alone]):
        expected = measure(random_model(architecture), batch, **options)
        found = measure(by_sdpa(architecture), batch, **options)
        assert set(found) == set(expected)
        for each, values in expected.items():
            assert_same(each, found[each], values)


def assert_same(name: str, found: Any, expected: Any) -> None:
    """Within rounding; what a sliding window lets reach a layer as rounding has no direction."""
    if not isinstance(expected, Tensor):
        assert found == expected, name
        return
    if name.startswith("cos_") or name.endswith("ratio"):
        found, expected = found[:, 3:], expected[:, 3:]
    torch.testing.assert_close(
        found, expected, rtol=1e-4, atol=2e-5, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )


def weights_of_last(
    model: TransformersModel, rows: list[list[int]]
) -> tuple[list[Tensor], list[Tensor | None], Tensor]:
    """Weights of each layer that are computed, and those that the module returns.

    Of the last three tokens, [row, head, query, key].
    """
    batch = left_pad(rows)
    last = torch.arange(batch.width - 3, batch.width).expand(len(rows), -1)
    window = open_batch(batch, None)
    with model.trace(window.inputs(cached=True)):
        looks = [look_at(block.attn, last)[0] for block in model.layers]
        each = zip(model.layers, looks, model.output.past_key_values.layers, strict=True)
        computed = save([compute_weights(block.attn, look, held) for block, look, held in each])
        returned = save([look.weights for look in looks])
    return computed, returned, batch.attention_mask


@pytest.mark.parametrize("architecture", crossed("olmo2", "gemma2", "gpt_neox", "phi3", "gpt2"))
def test_computed_weights_are_those_that_eager_attention_returns(
    architecture: str,
    random_model: Callable[[str], TransformersModel],
    by_sdpa: Callable[[str], TransformersModel],
) -> None:
    for rows in ([LONG, SHORT], [SHORT]):
        computed, returned, _ = weights_of_last(random_model(architecture), rows)
        for ours, theirs in zip(computed, returned, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        if architecture in TAKES_SDPA:
            again, none, _ = weights_of_last(by_sdpa(architecture), rows)
            assert none == [None] * N_LAYERS
            for ours, theirs in zip(again, returned, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_cap_of_the_logits_is_in_the_weights(make_folder: Callable[..., Path]) -> None:
    model = pn.load_model(make_folder("gemma2", attn_logit_softcapping=0.5))
    computed, returned, _ = weights_of_last(model, [LONG])
    for ours, theirs in zip(computed, returned, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", crossed("qwen3", among=TAKES_SDPA))
def test_computed_weights_are_right_within_the_rounding_of_bfloat16(
    architecture: str, random_folder: Callable[[str], Path]
) -> None:
    eager, sdpa = (
        pn.load_model(random_folder(architecture), dtype="bfloat16", attention=attention)
        for attention in ("eager", "sdpa")
    )
    _, returned, _ = weights_of_last(eager, [LONG, SHORT])
    computed, _, is_token = weights_of_last(sdpa, [LONG, SHORT])
    # From the second layer on, the residuals differ by their own rounding too.
    torch.testing.assert_close(computed[0], returned[0], rtol=0.02, atol=2e-3)
    for weights in computed:
        total = weights.float().sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=0.02)
        assert not (weights * (is_token == 0)[:, None, None]).any()


@pytest.mark.parametrize("wrong", [{"scaling": 0.2}, {"attn_logit_softcapping": 0.5}])
def test_weights_that_do_not_mix_the_values_as_the_module_did_are_nan(
    wrong: dict[str, float],
    by_sdpa: Callable[[str], TransformersModel],
) -> None:
    """Another scaling or cap than the module computed with, as in one of an unknown make."""
    model = by_sdpa("qwen2")
    batch = left_pad([LONG, SHORT])
    last = torch.full((2, 1), batch.width - 1)
    with model.trace(open_batch(batch, None).inputs(cached=True)):
        module = model.layers[2].attn
        look, _, _ = look_at(module, last)
        held = model.output.past_key_values.layers[2]
        right = save(compute_weights(module, look, held))
        known = {"config": module.config, "scaling": module.scaling}
        off = save(compute_weights(SimpleNamespace(**{**known, **wrong}), look, held))
    assert right is not None
    assert not right.isnan().any()
    assert off.isnan().all()


@pytest.mark.filterwarnings("ignore:.*of one persona")
def test_attention_of_an_unknown_make_is_nan_with_one_warning(
    by_sdpa: Callable[[str], TransformersModel],
    random_model: Callable[[str], TransformersModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    identities = tmp_path / "identities.txt"
    identities.write_text("good\nbad\n")
    options = {"identities": str(identities), "n_questions": 2, "layers": "1", "progress": False}
    monkeypatch.setattr(attentions, "_PROJECTIONS", ())
    with pytest.warns(UserWarning, match="attention.*NaN in every") as said:
        results = pn.run("persona_patching", by_sdpa("qwen2"), store=tmp_path / "s.zarr", **options)
    assert len(said) == 1
    looks = [name for name in results.data_vars if str(name).startswith("attention")]
    assert len(looks) == 5
    assert all(bool(results[name].isnull().all()) for name in looks)
    eager = pn.run("persona_patching", random_model("qwen2"), store=tmp_path / "e.zarr", **options)
    for name in ("logits_patched", "head_recovery"):
        ours, theirs = (torch.tensor(each[name].values) for each in (results, eager))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_attention_that_takes_no_mask_cannot_be_knocked_out() -> None:
    flash = SimpleNamespace(
        config=SimpleNamespace(_attn_implementation="flash_attention_2"),
        inputs=((torch.zeros(1, 3, 8),), {"attention_mask": None}),
    )
    with pytest.raises(pn.PersonaError, match="attention by 'flash_attention_2', which takes no"):
        block_keys(flash, None, torch.ones(1, 3).bool())


def test_attention_that_a_model_cannot_have_is_refused(
    random_folder: Callable[[str], Path],
) -> None:
    with pytest.raises(pn.UsageError, match="caps its attention logits, which sdpa cannot"):
        pn.load_model(random_folder("gemma2"), attention="sdpa")
    with pytest.raises(pn.UsageError, match="Unknown attention 'flash'; use eager or sdpa"):
        pn.load_model(random_folder("qwen2"), attention="flash")
    with pytest.raises(pn.UsageError, match="leave out --attention with the backend 'simulate'"):
        pn.load_model(random_folder("qwen2"), attention="sdpa", backend="simulate")


def test_runs_of_both_kinds_stand_beside_each_other_and_are_verified(
    random_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = str(tmp_path / "s.zarr")
    for attention in ([], ["--attention", "sdpa"]):
        command = ["run", "localized_positions", "--model", str(random_folder("qwen2"))]
        chosen = ["--grid", "short", "--cells", "yoda/haiku", "--layers", "1", "--store", store]
        monkeypatch.setattr(sys, "argv", ["persona-nns", *command, *chosen, *attention])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
    runs = list_runs(store)
    assert {info.attrs["attn_implementation"] for info in runs} == {"eager", "sdpa"}
    assert len({info.attrs["identity"] for info in runs}) == 2
    assert sorted(info.computing for info in runs) == ["float32", "float32 sdpa"]
    for verdict in verify_store(store):
        assert (verdict.state, verdict.n_recomputed) == ("right", 1)
    monkeypatch.setattr(sys, "argv", ["persona-nns", "ls", store])
    with pytest.raises(SystemExit):
        main()
    assert "float32 sdpa" in capsys.readouterr().out
