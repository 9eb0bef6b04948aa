"""Persona patching against plain forward hooks, and what has to hold on every architecture."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from nnsight import TransformersModel
from random_models import architectures
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import persona_nns as pn
from persona_nns.declarations.catalog import load_experiment
from persona_nns.figures.drawing import draw
from persona_nns.figures.patching import rank_heads
from persona_nns.prompts.identities import PERSONA, AskedQuestion, Pair, ask
from persona_nns.prompts.questions import load_questions
from persona_nns.tracing import patching as patches

N_LAYERS, N_HEADS = 5, 4
LAYERS = list(range(N_LAYERS))
architecture = architectures("qwen2", "gemma3", "gpt2", "gpt_neox")
CLEAN, CORRUPT = "thoroughly careful", "red"


@pytest.fixture(scope="module")
def patching() -> ModuleType:
    return sys.modules[load_experiment("persona_patching").measure.__module__]


@pytest.fixture(scope="module")
def pair(tokenizer: Any) -> Pair:
    """Two questions of different length; the identities differ in their number of tokens."""
    return make_pair(tokenizer, CLEAN, CORRUPT)


def make_pair(tokenizer: Any, clean: str, corrupt: str) -> Pair:
    questions = load_questions("bundled")
    chosen = [replace(questions[0], question="Paris?"), questions[3]]
    asked = [
        tuple(ask(tokenizer, PERSONA, identity, question) for question in chosen)
        for identity in (clean, corrupt, "average")
    ]
    return Pair(clean, corrupt, *asked)


@pytest.fixture(scope="module")
def measured(
    patching: ModuleType,
    random_model: Callable[[str], TransformersModel],
    architecture: str,
    pair: Pair,
) -> dict[str, Tensor]:
    results = patching.measure(random_model(architecture), [pair], layers=LAYERS)
    return {name: values[0] for name, values in results.items()}


def parts(plain: Any) -> list[tuple[Any, Any]]:
    """The output projection and the MLP of every block."""
    if hasattr(plain, "gpt_neox"):
        return [(block.attention.dense, block.mlp) for block in plain.gpt_neox.layers]
    if hasattr(plain, "transformer"):
        return [(block.attn.c_proj, block.mlp) for block in plain.transformer.h]
    return [(block.self_attn.o_proj, block.mlp) for block in plain.model.layers]


class Run:
    """One row through plain transformers, with some values overwritten by forward hooks.

    ``overwrite`` holds (layer, site, tokens, features, value) with site ``mlp``, ``attn`` or
    ``head``; ``value`` is [token, feature].
    """

    def __init__(
        self, plain: Any, asked: AskedQuestion, overwrite: Sequence[tuple[Any, ...]] = ()
    ) -> None:
        self.kept: dict[tuple[int, str], Tensor] = {}
        handles = []
        for layer, (projection, mlp) in enumerate(parts(plain)):
            for site, module in (("head", projection), ("attn", projection), ("mlp", mlp)):
                mine = [what for what in overwrite if what[:2] == (layer, site)]
                handles.append(self._hook(module, (layer, site), mine))
        cache = DynamicCache()
        output = plain(
            input_ids=torch.tensor([asked.ids]),
            past_key_values=cache,
            use_cache=True,
            output_attentions=True,
        )
        for handle in handles:
            handle.remove()
        self.letters = output.logits[0, -1, list(asked.letters)]
        identity = list(asked.identity)
        self.attention = torch.stack([a[0, :, -1, identity].sum(-1) for a in output.attentions])
        cached: Any = cache.layers
        self.value = torch.stack(
            [
                self._written(a[0, :, -1, identity], values[0], identity, projection)
                for a, values, (projection, _) in zip(
                    output.attentions, [kept.values for kept in cached], parts(plain), strict=True
                )
            ]
        )

    def _hook(self, module: Any, key: tuple[int, str], mine: Sequence[tuple[Any, ...]]) -> Any:
        def change(tensor: Tensor) -> Tensor:
            tensor = tensor.clone()
            for _, _, tokens, features, value in mine:
                tensor[0, tokens, features] = value
            self.kept[key] = tensor[0]
            return tensor

        if key[1] == "head":
            return module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
        return module.register_forward_hook(lambda _, __, output: change(output))

    @staticmethod
    def _written(weights: Tensor, values: Tensor, identity: list[int], projection: Any) -> Tensor:
        matrix = projection.weight if hasattr(projection, "nf") else projection.weight.T
        width, norms = values.shape[-1], []
        for head in range(N_HEADS):
            own = values[head // (N_HEADS // len(values)), identity]
            norms.append(((weights[head] @ own) @ matrix[head * width : (head + 1) * width]).norm())
        return torch.stack(norms)


def partner_tokens(
    clean: AskedQuestion, corrupt: AskedQuestion, position_set: str
) -> tuple[list[int], list[int]]:
    """Tokens of the corrupt prompt that are overwritten, and of the clean one they come from."""
    same = min(len(clean.identity), len(corrupt.identity))
    to = list(range(corrupt.identity.stop - same, corrupt.identity.stop))
    source = list(range(clean.identity.stop - same, clean.identity.stop))
    if position_set == "identity":
        return to, source
    before = list(range(corrupt.identity.start))
    n_after = len(corrupt.ids) - corrupt.identity.stop
    to = [*before, *to, *range(len(corrupt.ids) - n_after, len(corrupt.ids))]
    return to, [*before, *source, *range(len(clean.ids) - n_after, len(clean.ids))]


def head_features(width: int, head: int) -> slice:
    return slice(head * width // N_HEADS, (head + 1) * width // N_HEADS)


def test_every_number_agrees_with_plain_forward_hooks(
    plain_model: Callable[[str], PreTrainedModel],
    architecture: str,
    pair: Pair,
    measured: dict[str, Tensor],
) -> None:
    plain = plain_model(architecture)
    compared = ("logits", "logits_patched", "head_logits_patched", "attention")
    attended = ("attention_value", "attention_patched", "attention_value_patched")
    expected = {name: torch.full_like(measured[name], torch.nan) for name in compared + attended}
    corrupt_letters = []
    for k, (clean, corrupt) in enumerate(zip(pair.asked_clean, pair.asked_corrupt, strict=True)):
        source = Run(plain, clean)
        expected["logits"][k] = source.letters
        expected["attention"][k], expected["attention_value"][k] = source.attention, source.value
        corrupt_letters.append(Run(plain, corrupt).letters)
        for s, position_set in enumerate(("all", "identity")):
            to, take_from = partner_tokens(clean, corrupt, position_set)
            for layer in LAYERS:
                for c, site in enumerate(("mlp", "attn")):
                    value = source.kept[layer, site][take_from]
                    run = Run(plain, corrupt, [(layer, site, to, slice(None), value)])
                    expected["logits_patched"][k, c, layer, s] = run.letters
                    expected["attention_patched"][k, c, layer, s] = run.attention
                    expected["attention_value_patched"][k, c, layer, s] = run.value
                heads = source.kept[layer, "head"]
                for head in range(N_HEADS):
                    own = head_features(heads.shape[-1], head)
                    run = Run(plain, corrupt, [(layer, "head", to, own, heads[take_from, own])])
                    expected["head_logits_patched"][k, layer, head, s] = run.letters
    for name in compared:
        torch.testing.assert_close(measured[name], expected[name], rtol=1e-5, atol=1e-4)
    for name in attended:
        torch.testing.assert_close(measured[name], expected[name], rtol=1e-4, atol=1e-5)

    def ld(letters: Tensor, answer: int) -> Tensor:
        others = [k for k in range(4) if k != answer]
        return letters[..., answer] - letters[..., others].mean(-1)

    for k, asked in enumerate(pair.asked_clean):
        clean_ld = ld(expected["logits"][k], asked.answer)
        corrupt_ld = ld(corrupt_letters[k], asked.answer)
        if abs(float(clean_ld - corrupt_ld)) < 0.05:
            assert architecture == "mistral"  # its windows of 16 tokens hardly reach back so far
            assert measured["recovery"][k].isnan().all()
            continue
        torch.testing.assert_close(measured["ld"][k], clean_ld, rtol=1e-5, atol=1e-4)
        for name, logits in (
            ("recovery", "logits_patched"),
            ("head_recovery", "head_logits_patched"),
        ):
            moved = (ld(expected[logits][k], asked.answer) - corrupt_ld) / (clean_ld - corrupt_ld)
            torch.testing.assert_close(measured[name][k], moved, rtol=1e-3, atol=2e-3)


def test_whole_sequences_give_the_same_numbers(
    patching: ModuleType,
    random_model: Callable[[str], TransformersModel],
    architecture: str,
    pair: Pair,
    measured: dict[str, Tensor],
) -> None:
    whole = patching.measure(random_model(architecture), [pair], layers=LAYERS, reuse=False)
    for name, values in measured.items():
        torch.testing.assert_close(values, whole[name][0], rtol=1e-3, atol=1e-4, equal_nan=True)


def test_a_run_patched_with_its_own_activations_is_unchanged(
    patching: ModuleType,
    random_model: Callable[[str], TransformersModel],
    architecture: str,
    tokenizer: Any,
) -> None:
    own = make_pair(tokenizer, CLEAN, CLEAN)
    results = patching.measure(random_model(architecture), [own], layers=LAYERS)
    logits = results["logits"][0]
    for name in ("logits_patched", "head_logits_patched"):
        patched = results[name][0]
        same = logits.view(2, *[1] * (patched.dim() - 2), 4).expand_as(patched)
        torch.testing.assert_close(patched, same, rtol=0, atol=1e-5 * float(logits.abs().max()))
    before = results["attention"][0][:, None, None, None].expand_as(results["attention_patched"][0])
    torch.testing.assert_close(results["attention_patched"][0], before, rtol=0, atol=1e-5)
    assert results["recovery"].isnan().all()
    assert results["head_recovery"].isnan().all()
    assert results["attention_control"].isfinite().all()


def test_patching_every_component_everywhere_gives_the_clean_answer(
    patching: ModuleType,
    random_model: Callable[[str], TransformersModel],
    plain_model: Callable[[str], PreTrainedModel],
    architecture: str,
    tokenizer: Any,
) -> None:
    # Equally many tokens, as a learned position (GPT-2) is part of what no component writes.
    pair = make_pair(tokenizer, "bad", "red")
    assert len({len(asked.identity) for asked in pair.rows}) == 1
    run = patching.run_unpatched(random_model(architecture), pair, reuse=True)
    for k, asked in enumerate(pair.asked_corrupt):
        column = run.rows.patched[0, k].nonzero()[:, 0]
        to = (column + run.rows.window.start).tolist()
        everything = [
            (layer, site, to, slice(None), values[layer][k, run.rows.source[k, column]])
            for layer in LAYERS
            for site, values in (("mlp", run.mlp), ("attn", run.attn))
        ]
        letters = Run(plain_model(architecture), asked, everything).letters
        torch.testing.assert_close(letters, run.logits[k], rtol=0, atol=1e-4)
        gap = (run.logits[k] - run.logits[2 + k]).abs().max()
        assert float(gap) > 0.05 or architecture == "mistral"


def test_all_heads_together_are_the_attention_output(
    plain_model: Callable[[str], PreTrainedModel],
    architecture: str,
    pair: Pair,
    measured: dict[str, Tensor],
) -> None:
    plain = plain_model(architecture)
    for k, (clean, corrupt) in enumerate(zip(pair.asked_clean, pair.asked_corrupt, strict=True)):
        source = Run(plain, clean)
        for s, position_set in enumerate(("all", "identity")):
            to, take_from = partner_tokens(clean, corrupt, position_set)
            for layer in LAYERS:
                heads = source.kept[layer, "head"]
                together = [
                    (layer, "head", to, own, heads[take_from, own])
                    for own in (head_features(heads.shape[-1], h) for h in range(N_HEADS))
                ]
                letters = Run(plain, corrupt, together).letters
                ours = measured["logits_patched"][k, 1, layer, s]
                scale = float(ours.abs().max())
                torch.testing.assert_close(ours, letters, rtol=0, atol=1e-5 * max(1.0, scale))


def test_attention_probabilities_sum_to_one(
    patching: ModuleType,
    random_model: Callable[[str], TransformersModel],
    architecture: str,
    pair: Pair,
) -> None:
    rows = tuple(replace(asked, identity=range(len(asked.ids))) for asked in pair.asked_clean)
    whole = replace(pair, asked_clean=rows, asked_corrupt=rows)
    run = patching.run_unpatched(random_model(architecture), whole, reuse=True)
    torch.testing.assert_close(run.attention, torch.ones_like(run.attention), rtol=0, atol=1e-5)


def test_how_the_work_is_cut_does_not_change_the_numbers(
    patching: ModuleType,
    random_model: Callable[[str], TransformersModel],
    tokenizer: Any,
    pair: Pair,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_model("gemma2")
    pairs = [pair, make_pair(tokenizer, "red", "red")]
    together = patching.measure(model, pairs, layers=[0, 3])
    monkeypatch.setattr(patches, "_PASS_TOKENS", {"cpu": 1})
    monkeypatch.setattr(patches, "_HELD_BYTES", 1)
    for k, one in enumerate(pairs):
        alone = patching.measure(model, [one], layers=[0, 3])
        for name, values in alone.items():
            torch.testing.assert_close(
                values[0], together[name][k], rtol=1e-4, atol=2e-5, equal_nan=True
            )


def test_recovery_is_only_defined_where_the_runs_differ_enough(
    patching: ModuleType, random_model: Callable[[str], TransformersModel], pair: Pair
) -> None:
    model = random_model("qwen2")
    small = patching.measure(model, [pair], layers=[0], threshold=0.0)
    large = patching.measure(model, [pair], layers=[0], threshold=1e6)
    assert small["recovery"].isfinite().all()
    assert large["recovery"].isnan().all()
    assert large["head_recovery"].isnan().all()
    torch.testing.assert_close(small["logits_patched"], large["logits_patched"])


def test_logit_difference_is_right_minus_mean_of_the_others() -> None:
    logits = torch.tensor([[[4.0, 1.0, 2.0, 3.0]], [[0.0, 9.0, 3.0, 6.0]]])
    ld = patches.logit_difference(logits, torch.tensor([0, 2]))
    assert ld.tolist() == [[2.0], [-2.0]]


def test_a_run_from_files_to_figures(
    tmp_path: Path, random_model: Callable[[str], TransformersModel]
) -> None:
    identities = tmp_path / "identities.txt"
    identities.write_text("# words\ngood\nthoroughly bad  # two words\nred\n")
    model = random_model("llama")
    settings: dict[str, Any] = {
        "n_questions": 2,
        "identities": str(identities),
        "layers": "0,2",
        "store": tmp_path / "s.zarr",
    }
    ds = pn.run("persona_patching", model, **settings)
    names = ["good", "thoroughly bad", "red"]
    assert ds.recovery.dims == (
        *("model", "clean_persona", "corrupt_persona", "question"),
        *("component", "layer", "position_set"),
    )
    assert ds.head_logits_patched.dims[4:] == ("layer", "head", "position_set", "letter")
    assert ds.attention_patched.dims[4:] == (
        *("component", "layer", "position_set", "attention_layer", "attention_head"),
    )
    assert ds.attention_patched.sizes["attention_layer"] == N_LAYERS
    assert ds.logits.dims == ("model", "persona", "question", "letter")
    assert ds.persona.values.tolist() == ds.clean_persona.values.tolist() == names
    assert ds.question.values.tolist() == [0, 1]
    assert ds.component.values.tolist() == ["mlp", "attn"]
    assert ds.position_set.values.tolist() == ["all", "identity"]
    assert ds.letter.values.tolist() == ["A", "B", "C", "D"]
    assert ds.layer.values.tolist() == [0, 2]
    assert (ds.identity_tokens > 0).all()
    assert ds.identity_tokens.sel(persona="thoroughly bad") > ds.identity_tokens.sel(persona="red")
    assert ds.completed.dims == ("model", "clean_persona", "corrupt_persona")
    assert bool(ds.completed.all())
    diagonal = ds.recovery.sel(clean_persona="red", corrupt_persona="red")
    assert np.isnan(diagonal).all()
    right = ds.logits.argmax("letter") == ds.answer
    np.testing.assert_allclose(ds.accuracy, right.mean("question"))
    assert (ds.accuracy_interval.sel(bound="low") <= ds.accuracy).all()
    ranking = rank_heads(ds)
    assert len(ranking) == 2 * N_HEADS
    assert ranking.difference.is_monotonic_decreasing
    drawn = draw(ds, "persona_patching")
    assert {*drawn, "attribution"} == set(load_experiment("persona_patching").figures)

    moved = identities.rename(tmp_path / "elsewhere.txt")
    again = pn.run("persona_patching", model, **{**settings, "identities": str(moved)})
    assert again.attrs["identity"] == ds.attrs["identity"]


def test_only_what_a_patch_does_to_every_question_is_run_once(
    patching: ModuleType, random_model: Callable[[str], TransformersModel], pair: Pair
) -> None:
    rows = patching.run_unpatched(random_model("llama"), pair, reuse=True).rows
    ids = [asked.ids[rows.window.start :] for asked in pair.asked_corrupt]
    same = next(k for k, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
    assert rows.common_columns() == same
    elsewhere = rows.source.clone()
    elsewhere[1, same - 2] = 0
    assert replace(rows, source=elsewhere).common_columns() == same - 2
    fewer = rows.patched.clone()
    fewer[0, 1, same - 3] = False
    assert replace(rows, patched=fewer).common_columns() == same - 3
    clean = rows.window.input_ids.clone()
    clean[1, rows.source[0, same - 4]] += 1
    other = replace(rows, window=replace(rows.window, input_ids=clean))
    assert other.common_columns() == same - 4
