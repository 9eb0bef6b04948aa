"""Receipts of steering, and addition that preserves norms, against plain transformers."""

import json
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from nnsight import TransformersModel
from plain_hooks import blocks_of
from random_models import architectures
from torch import Tensor

import persona_nns as pn
from persona_nns.declarations.catalog import load_experiment
from persona_nns.figures.drawing import draw
from persona_nns.tracing import NucleusSampling, steer, steer_on_sphere
from persona_nns.traits import NEUTRAL_QUESTIONS, Steered, moves_against
from persona_nns.traits.receipts import random_like, strength_of

ROWS = [
    ("pos", "How do I wait?", "Wait, and be still."),
    ("neg", "How do I wait?", "Oh no, it never ends! Ever."),
    ("pos", "What is rain to me on a Monday?", "Water."),
    ("neg", "What is rain?", "Rain is the ruin of every single plan that I have made."),
]
ALPHAS, SETS, LAYERS = (-1.5, 0.0, 2.0), ("prompt", "response"), (1, 3)
architecture = architectures("qwen2", "gemma3", "gpt2")

Edit = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def model(random_model: Callable[[str], TransformersModel], architecture: str) -> TransformersModel:
    return random_model(architecture)


@pytest.fixture(scope="module")
def plain(plain_model: Callable[[str], Any], architecture: str) -> Any:
    return plain_model(architecture)


@pytest.fixture(scope="module")
def measured(
    model: TransformersModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[xr.Dataset, xr.Dataset]:
    """Vectors of the rows, and what steering with them does; norms preserved."""
    folder = tmp_path_factory.mktemp("receipts")
    lines = [
        {"pair": k // 2, "question_id": k // 2, "label": label, "system": "", "question": question,
         "response": response}
        for k, (label, question, response) in enumerate(ROWS)
    ]  # fmt: skip
    file = folder / "stoic.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    given: dict[str, Any] = {"responses": str(file), "judge": "none", "store": folder / "s"}
    vectors = pn.run("trait_vectors", model, **given)
    steered = pn.run(
        "trait_steering",
        model,
        vector=str(folder / "s"),
        layers=",".join(map(str, LAYERS)),
        layer_sets="1,3",
        alphas=",".join(map(str, ALPHAS)),
        position_sets=",".join(SETS),
        operations="add,ablate,cap",
        taus="0.2",
        norm_preserving=True,
        receipts=True,
        **given,
    )
    return vectors.isel(model=0, trait=0), steered.isel(model=0, trait=0)


def ids_of(tokenizer: Any, question: str, response: str = "") -> tuple[list[int], list[int]]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return (
        tokenizer(text, add_special_tokens=False)["input_ids"],
        tokenizer(response, add_special_tokens=False)["input_ids"],
    )


@contextmanager
def edited(plain: Any, edits: dict[int, Edit]) -> Any:
    handles = []
    for layer, edit in edits.items():

        def hook(_: Any, args: Any, kwargs: Any, edit: Any = edit) -> Any:
            if args:
                return (edit(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

        handles.append(blocks_of(plain)[layer].register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logprobs(plain: Any, ids: list[int], edits: dict[int, Edit]) -> Tensor:
    with edited(plain, edits):
        return plain(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)


def plain_logp(plain: Any, prompt: list[int], said: list[int], edits: dict[int, Edit]) -> float:
    scored = logprobs(plain, prompt + said, edits)[len(prompt) - 1 : -1]
    return float(scored[range(len(said)), said].sum())


def on_sphere(vector: Tensor, alpha: float, tokens: str, n_prompt: int) -> Edit:
    def edit(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        span = slice(0, n_prompt) if tokens == "prompt" else slice(n_prompt - 1, None)
        before = hidden[:, span]
        after = before + alpha * vector
        hidden[:, span] = (
            after * before.norm(dim=-1, keepdim=True) / after.norm(dim=-1, keepdim=True)
        )
        return hidden

    return edit


def near(expected: float) -> Any:
    return pytest.approx(expected, abs=1e-3, rel=1e-5)


def test_norm_preserving_addition_and_its_control_equal_plain_hooks(
    model: TransformersModel, plain: Any, measured: tuple[xr.Dataset, xr.Dataset]
) -> None:
    vectors, steered = measured
    vector = torch.from_numpy(vectors["vector"].sel(average="response_avg").values)
    control = random_like(vector)
    torch.testing.assert_close(control.norm(dim=-1), vector.norm(dim=-1))
    for row, (_, question, response) in enumerate(ROWS):
        prompt, said = ids_of(model.tokenizer, question, response)
        untouched = plain_logp(plain, prompt, said, {})
        ours = steered.sel(row=row)
        assert float(ours.logp_none) == near(untouched)
        for alpha in ALPHAS:
            for tokens in SETS:
                here = ours.sel(alpha=alpha, position_set=tokens)
                for layer in LAYERS:
                    for name, of in (("logp", vector), ("logp_random", control)):
                        edits = {layer: on_sphere(of[layer], alpha, tokens, len(prompt))}
                        expected = plain_logp(plain, prompt, said, edits)
                        assert float(here[name].sel(layer=layer)) == near(expected)
                        if alpha == 0:
                            assert expected == pytest.approx(untouched, abs=1e-4)
                steps = [vector[0], *(vector[k] - vector[k - 1] for k in range(1, 5))]
                edits = {
                    k: on_sphere(step, alpha, tokens, len(prompt)) for k, step in enumerate(steps)
                }
                assert float(here.logp_all_layers) == near(plain_logp(plain, prompt, said, edits))


def test_the_kl_on_neutral_prompts_equals_plain_hooks(
    model: TransformersModel, plain: Any, measured: tuple[xr.Dataset, xr.Dataset]
) -> None:
    vectors, steered = measured
    vector = torch.from_numpy(vectors["vector"].sel(average="response_avg").values)
    units = vector / vector.norm(dim=-1, keepdim=True).clamp(min=1e-12)

    def kl(prompt: list[int], edits: dict[int, Edit]) -> float:
        p, q = logprobs(plain, prompt, {})[-1], logprobs(plain, prompt, edits)[-1]
        return float((p.exp() * (p - q)).sum())

    def capped(layer: int, span: slice) -> Edit:
        def edit(hidden: Tensor) -> Tensor:
            hidden = hidden.clone()
            over = (hidden[:, span] @ units[layer] - 0.2).clamp(min=0)
            hidden[:, span] -= over[..., None] * units[layer]
            return hidden

        return edit

    assert steered.neutral_text.values.tolist() == list(NEUTRAL_QUESTIONS)
    for number, question in list(enumerate(NEUTRAL_QUESTIONS))[::3]:
        prompt, _ = ids_of(model.tokenizer, question)
        ours = steered.sel(neutral=number)
        for tokens in SETS:
            for alpha, layer in ((2.0, 1), (-1.5, 3), (0.0, 3)):
                here = ours.sel(alpha=alpha, layer=layer, position_set=tokens)
                for name, of in (
                    ("kl_neutral", vector),
                    ("kl_neutral_random", random_like(vector)),
                ):
                    edits = {layer: on_sphere(of[layer], alpha, tokens, len(prompt))}
                    assert float(here[name]) == pytest.approx(kl(prompt, edits), abs=1e-4)
            span = slice(None) if tokens == "prompt" else slice(len(prompt) - 1, None)
            expected = kl(prompt, {layer: capped(layer, span) for layer in (1, 3)})
            here = ours.kl_neutral_cap.sel(layer_set="1,3", tau="0.2", position_set=tokens)
            assert float(here) == pytest.approx(expected, abs=1e-4)
        edits = {3: lambda h: h - (h @ units[3])[..., None] * units[3]}
        assert float(ours.kl_neutral_ablate.sel(layer=3)) == pytest.approx(
            kl(prompt, edits), abs=1e-4
        )


def test_which_answers_move_against_the_direction_follows_from_the_log_probabilities(
    measured: tuple[xr.Dataset, xr.Dataset],
) -> None:
    _, steered = measured
    for row, (label, *_) in enumerate(ROWS):
        for alpha in (-1.5, 2.0):
            here = steered.sel(row=row, alpha=alpha, layer=list(LAYERS))
            change = (here.logp - here.logp_none).values
            more_of_it = (change > 0) if label == "pos" else (change < 0)
            np.testing.assert_array_equal(here.against, ~more_of_it if alpha > 0 else more_of_it)
    assert bool(steered.against.sel(alpha=0).isnull().all())
    # A trait vector is the difference of the two means, so α is its strength in units of the gap.
    assert "strength" in steered
    for layer in LAYERS:
        np.testing.assert_allclose(steered.strength.sel(layer=layer), ALPHAS, rtol=1e-4, atol=1e-6)
    assert set(draw(steered.expand_dims(["model", "trait"]), "trait_steering")) >= {"receipts"}


def test_what_moves_against_is_its_definition() -> None:
    effect = torch.tensor([[[1.0], [-1.0]], [[1.0], [0.0]]])  # [row, α, position set]
    found = moves_against(effect, torch.tensor([1.0, -1.0]), torch.tensor([2.0, 0.0]))
    assert found[:, 0, 0].tolist() == [0, 1]
    assert bool(found[:, 1].isnan().all())
    assert moves_against(effect, torch.tensor([1.0, 1.0]), torch.tensor([-1.0, 1.0])).tolist() == [
        [[1.0], [1.0]],
        [[1.0], [0.0]],
    ]


def test_strength_is_in_units_of_the_gap() -> None:
    vectors = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 1.0]])
    gap = torch.tensor([10.0, 0.0, torch.nan])
    found = strength_of(vectors, gap, torch.tensor([1.0, -2.0]))
    assert found[0].tolist() == [0.5, -1.0]
    assert bool(found[1:].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_preserving_addition_keeps_norms_to_rounding(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    hidden = (10 * torch.randn(2, 50, 64, generator=generator)).to(dtype)
    vector = 5 * torch.randn(64, generator=generator)
    strength = torch.ones(2, 50)
    strength[0, :10] = 0
    moved = steer_on_sphere(hidden, vector, strength)
    assert moved.dtype == dtype
    assert torch.equal(moved[0, :10], hidden[0, :10])
    step = 2**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(
        moved.float().norm(dim=-1), hidden.float().norm(dim=-1), rtol=step, atol=0
    )
    assert not torch.equal(moved[1], hidden[1])
    plainly = steer(hidden.float(), vector, strength)
    cosine = torch.nn.functional.cosine_similarity(moved.float(), plainly, dim=-1)
    assert float(cosine.min()) > 1 - 1e-4
    nothing = torch.zeros(1, 1, 64)
    assert torch.equal(steer_on_sphere(nothing, torch.zeros(64), torch.ones(1, 1)), nothing)


def test_a_model_answers_under_norm_preserving_addition_as_plain_hooks_predict(
    model: TransformersModel, plain: Any
) -> None:
    shape = (model.config.num_hidden_layers + 1, model.config.hidden_size)
    vector = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    prompt = ids_of(model.tokenizer, ROWS[2][1])[0]
    unit = Steered(
        "stoic", 0, tuple(prompt), None, vector, (3.0,), SETS, ("add",), norm_preserving=True
    )
    greedy = NucleusSampling(max_new_tokens=6, temperature=0.0)
    measure = load_experiment("trait_steering").measure
    said = measure(model, [unit], layers=[2], sampling=greedy)["said"]
    for t, tokens in enumerate(SETS):
        ids = [token for token in said[0, 0, 0, t, 0].tolist() if token >= 0]
        assert ids
        edits = {2: on_sphere(vector[2], 3.0, tokens, len(prompt))}
        best = logprobs(plain, prompt + ids, edits)[len(prompt) - 1 : -1]
        chosen = best[range(len(ids)), ids]
        assert float((best.max(-1).values - chosen).max()) < 1e-4
