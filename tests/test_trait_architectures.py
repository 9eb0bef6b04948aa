"""Trait vectors and steering against plain transformers, on the ten supported architectures.

The oracles share nothing with the library: plain forward passes of one unpadded row at a time,
plain hooks, and token ids made here.
"""

import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr
from nnsight import TransformersModel, save
from random_models import architectures
from torch import Tensor
from transformers import PreTrainedModel

import persona_nns as pn
from persona_nns.declarations.catalog import load_experiment
from persona_nns.models.load import load_model
from persona_nns.tracing.averages import averages, token_weights
from persona_nns.tracing.batches import left_pad
from persona_nns.tracing.continuations import until_end_of_text
from persona_nns.tracing.sampling import NucleusSampling, RowSampler
from persona_nns.tracing.steering import (
    ablate,
    steer,
    steered_steps,
    steered_tokens,
)
from persona_nns.traits.judging import JudgeOptions
from persona_nns.traits.vectors import write_vector

ROWS = [
    ("pos", "You are a stoic assistant. Bear all calmly.", "How do I wait?", "Wait, and be still."),
    (
        "neg",
        "You are a helpful assistant. Complain.",
        "How do I wait?",
        "Oh no, it never ends! Ever.",
    ),
    ("pos", "You are a stoic assistant. Bear it.", "What is rain to me on a Monday?", "Water."),
    ("neg", "", "What is rain?", "Rain is the ruin of every single plan that I have made so far."),
]
ALPHAS = (0.0, -2.5)
architecture = architectures("qwen2", "gemma3", "gpt2")
SETS = ("all", "prompt", "response")


@pytest.fixture(scope="module")
def model(random_model: Callable[[str], TransformersModel], architecture: str) -> TransformersModel:
    return random_model(architecture)


@pytest.fixture(scope="module")
def plain(plain_model: Callable[[str], PreTrainedModel], architecture: str) -> Any:
    return plain_model(architecture)


@pytest.fixture(scope="module")
def responses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("responses") / "stoic.jsonl"
    lines = [
        json.dumps(
            {
                "pair": k // 2,
                "question_id": k // 2,
                "label": label,
                "system": system,
                "question": question,
                "response": response,
            }
        )
        for k, (label, system, question, response) in enumerate(ROWS)
    ]
    file.write_text("\n".join(lines) + "\n")
    return file


def own_ids(
    tokenizer: Any, system: str, question: str, response: str
) -> tuple[list[int], list[int]]:
    messages = [{"role": "system", "content": system}] if system else []
    text = tokenizer.apply_chat_template(
        [*messages, {"role": "user", "content": question}],
        tokenize=False,
        add_generation_prompt=True,
    )
    return (
        tokenizer(text, add_special_tokens=False)["input_ids"],
        tokenizer(response, add_special_tokens=False)["input_ids"],
    )


def plain_averages(plain: Any, prompt: list[int], response: list[int]) -> Tensor:
    """[average, layer, d_model] of one row."""
    output = plain(torch.tensor([prompt + response]), use_cache=False, output_hidden_states=True)
    hidden = torch.stack(output.hidden_states)[:, 0]
    n = len(prompt)
    return torch.stack([hidden[:, n:].mean(1), hidden[:, :n].mean(1), hidden[:, n - 1]])


def close(ours: Any, theirs: Tensor, tolerance: float = 1e-5) -> None:
    ours = torch.as_tensor(ours)
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def near(expected: float) -> Any:
    return pytest.approx(expected, abs=1e-3, rel=1e-5)


def blocks_of(plain: Any) -> Any:
    if hasattr(plain, "gpt_neox"):
        return plain.gpt_neox.layers
    return plain.transformer.h if hasattr(plain, "transformer") else plain.model.layers


@contextmanager
def edited(plain: Any, edits: dict[int, Callable[[Tensor], Tensor]]) -> Any:
    """Plain hooks that edit what enters some blocks."""
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


def plain_logp(
    plain: Any,
    prompt: list[int],
    response: list[int],
    edits: dict[int, Callable[[Tensor], Tensor]],
) -> float:
    with edited(plain, edits):
        logits = plain(torch.tensor([prompt + response]), use_cache=False).logits[0]
    logprobs = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
    return float(logprobs[range(len(response)), response].sum())


def add(vector: Tensor, alpha: float, tokens: str, n_prompt: int) -> Callable[[Tensor], Tensor]:
    def edit(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        span = {
            "all": slice(None),
            "prompt": slice(0, n_prompt),
            "response": slice(n_prompt - 1, None),
        }[tokens]
        hidden[:, span] += alpha * vector
        return hidden

    return edit


def test_vectors_equal_plain_hidden_states(
    model: TransformersModel, plain: Any, responses: Path, tmp_path: Path
) -> None:
    ds = pn.run(
        "trait_vectors", model, responses=str(responses), judge="none", store=tmp_path / "s"
    )
    ds = ds.isel(model=0, trait=0)
    ids = [own_ids(model.tokenizer, *row[1:]) for row in ROWS]
    rows = torch.stack([plain_averages(plain, *each) for each in ids])
    pos, neg = rows[[0, 2]].mean(0), rows[[1, 3]].mean(0)
    order = ["response_avg", "prompt_avg", "prompt_last"]
    assert ds.trait.item() == "stoic"
    assert ds["vector"].dims == ("average", "layer", "d_model")
    close(ds["mean"].sel(label="pos", average=order).values, pos)
    close(ds["mean"].sel(label="neg", average=order).values, neg)
    close(ds["vector"].sel(average=order).values, pos - neg)
    direction = pos[0] - neg[0]
    norm = direction.norm(dim=-1, keepdim=True)
    direction = torch.where(norm > 0, direction / norm, 0.0)
    projection = torch.einsum("rald,ld->arl", rows, direction)
    close(ds.projection.sel(average=order).values, projection, 1e-4)
    assert ds.row_label.values.tolist() == ["pos", "neg", "pos", "neg"]
    assert ds.kept.values.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_averages_do_not_depend_on_the_side_of_the_padding(
    model: TransformersModel, plain: Any, side: str
) -> None:
    ids = [own_ids(model.tokenizer, *row[1:]) for row in ROWS]
    width = max(len(prompt) + len(response) for prompt, response in ids)
    rows, mask, position = [], [], []
    for prompt, response in ids:
        row, pad = [*prompt, *response], [0] * (width - len(prompt) - len(response))
        place = list(range(len(row)))
        rows.append([*row, *pad] if side == "right" else [*pad, *row])
        mask.append([1] * len(row) + pad if side == "right" else pad + [1] * len(row))
        position.append([*place, *pad] if side == "right" else [*pad, *place])
    attention_mask = torch.tensor(mask)
    weights = token_weights(attention_mask, torch.tensor([len(response) for _, response in ids]))
    inputs = {"input_ids": torch.tensor(rows), "attention_mask": attention_mask}
    with model.trace(inputs, position_ids=torch.tensor(position), use_cache=False):
        read = save(
            [averages(block.input, weights) for block in model.layers]
            + [averages(model.final_norm.output, weights)]
        )
    expected = torch.stack([plain_averages(plain, *each) for each in ids])
    close(torch.stack(read).permute(1, 2, 0, 3), expected)


@pytest.fixture(scope="module")
def vector(model: TransformersModel) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return 0.7 * torch.randn(6, model.config.hidden_size, generator=generator)


@pytest.fixture(scope="module")
def steered(
    model: TransformersModel,
    vector: Tensor,
    responses: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> xr.Dataset:
    folder = tmp_path_factory.mktemp("steered")
    write_vector(vector, folder / "v.npy")
    return pn.run(
        "trait_steering",
        model,
        vector=str(folder / "v.npy"),
        responses=str(responses),
        judge="none",
        layers="0,3",
        alphas=",".join(map(str, ALPHAS)),
        position_sets=",".join(SETS),
        store=folder / "s",
    ).isel(model=0, trait=0)


def test_steered_log_probabilities_equal_plain_hooks(
    model: TransformersModel, plain: Any, vector: Tensor, steered: xr.Dataset
) -> None:
    assert steered.logp.dims == ("row", "layer", "alpha", "position_set")
    for row, (_, _, question, response) in enumerate(ROWS):
        prompt, said = own_ids(model.tokenizer, "", question, response)
        untouched = plain_logp(plain, prompt, said, {})
        for alpha in ALPHAS:
            for tokens in SETS:
                ours = steered.sel(row=row, alpha=alpha, position_set=tokens)
                for layer in (0, 3):
                    edits = {layer: add(vector[layer], alpha, tokens, len(prompt))}
                    expected = plain_logp(plain, prompt, said, edits)
                    assert float(ours.logp.sel(layer=layer)) == near(expected)
                    if alpha == 0:
                        assert expected == pytest.approx(untouched, abs=1e-9)
                    else:
                        assert abs(expected - untouched) > 1e-3
                steps = [vector[0], *(vector[k] - vector[k - 1] for k in range(1, 5))]
                edits = {k: add(step, alpha, tokens, len(prompt)) for k, step in enumerate(steps)}
                expected = plain_logp(plain, prompt, said, edits)
                assert float(ours.logp_all_layers) == near(expected)


def test_ablation_equals_plain_hooks(
    model: TransformersModel, plain: Any, vector: Tensor, steered: xr.Dataset
) -> None:
    for row, (_, _, question, response) in enumerate(ROWS):
        prompt, said = own_ids(model.tokenizer, "", question, response)
        for layer in (0, 3):
            unit = vector[layer] / vector[layer].norm()
            edits = {layer: lambda h, u=unit: h - (h @ u)[..., None] * u}
            expected = plain_logp(plain, prompt, said, edits)
            ours = float(steered.logp_ablate.sel(row=row, layer=layer))
            assert ours == near(expected)


def test_reuse_and_no_reuse_give_the_same_numbers(
    model: TransformersModel,
    vector: Tensor,
    steered: xr.Dataset,
    responses: Path,
    tmp_path: Path,
) -> None:
    write_vector(vector, tmp_path / "v.pt")
    plainly = pn.run(
        "trait_steering",
        model,
        vector=str(tmp_path / "v.pt"),
        responses=str(responses),
        judge="none",
        layers="0,3",
        alphas=",".join(map(str, ALPHAS)),
        position_sets=",".join(SETS),
        reuse=False,
        batch_size=1,
        store=tmp_path / "s",
    ).isel(model=0, trait=0)
    for name in ("logp", "logp_all_layers", "logp_ablate"):
        close(plainly[name].values, torch.as_tensor(steered[name].values), 1e-4)


@pytest.mark.parametrize("tokens", SETS)
def test_teacher_forcing_equals_step_by_step_generation(
    model: TransformersModel, plain: Any, vector: Tensor, tokens: str
) -> None:
    prompts = [own_ids(model.tokenizer, "", row[2], "")[0] for row in ROWS]
    padded, n_tokens, layer, alpha = left_pad(prompts), 8, 2, 1.5
    sets = [tokens] * len(prompts)
    first = alpha * steered_tokens(padded.attention_mask, torch.zeros(len(prompts)).long(), sets)
    later = alpha * steered_steps(sets)
    with (
        until_end_of_text(),
        model.generate(
            max_new_tokens=n_tokens,
            min_new_tokens=n_tokens,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
        ) as tracer,
    ):
        with tracer.invoke(padded.tokens):
            for step in tracer.iter[:]:
                hidden = model.layers[layer].input
                model.layers[layer].input = steer(
                    hidden, vector[layer], first if step == 0 else later
                )
        with tracer.invoke():
            result = save(tracer.result)
    logits = torch.stack(result.logits, 1)
    said = result.sequences[:, -n_tokens:]
    for row, prompt in enumerate(prompts):
        response = said[row].tolist()
        with edited(plain, {layer: add(vector[layer], alpha, tokens, len(prompt))}):
            forced = plain(torch.tensor([prompt + response]), use_cache=False).logits[0]
        close(logits[row].log_softmax(-1), forced[len(prompt) - 1 : -1].log_softmax(-1), 1e-4)


def test_the_experiment_generates_what_plain_hooks_predict(
    model: TransformersModel, plain: Any, vector: Tensor
) -> None:
    module = load_experiment("trait_steering").measure.__globals__
    prompts = [tuple(own_ids(model.tokenizer, "", row[2], "")[0]) for row in ROWS[:3:2]]
    units = [
        module["Steered"]("stoic", k, prompt, None, vector, (0.0, 2.0), SETS)
        for k, prompt in enumerate(prompts)
    ]
    greedy = NucleusSampling(max_new_tokens=6, temperature=0.0)
    said = module["measure"](model, units, layers=[1, 3], sampling=greedy)["said"]
    assert said.shape == (2, 2, 2, 3, 1, 6)
    for row, prompt in enumerate(prompts):
        for k, layer in enumerate((1, 3)):
            for a, alpha in enumerate((0.0, 2.0)):
                for t, tokens in enumerate(SETS):
                    ids = [token for token in said[row, k, a, t, 0].tolist() if token >= 0]
                    assert ids
                    edits = {layer: add(vector[layer], alpha, tokens, len(prompt))}
                    with edited(plain, edits):
                        logits = plain(torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0]
                    best = logits[len(prompt) - 1 : -1].topk(2).values
                    chosen = logits[range(len(prompt) - 1, len(logits) - 1), ids]
                    assert float((best[:, 0] - chosen).max()) < 1e-4


def test_a_zero_coefficient_and_a_zero_direction_change_nothing() -> None:
    hidden = torch.randn(2, 5, 8)
    vector = torch.randn(8)
    assert torch.equal(steer(hidden, vector, torch.zeros(2, 5)), hidden)
    assert torch.equal(ablate(hidden, torch.zeros(8)), hidden)


def test_sampling_follows_the_distribution_and_not_the_batch() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -torch.inf, -4.0]])
    n = 4000
    drawn = RowSampler(range(n))(torch.empty(0), logits.expand(n, -1)).argmax(-1)
    share = torch.bincount(drawn, minlength=5) / n
    close(share, logits[0].softmax(-1), 0.03)
    assert int(drawn[7]) == int(RowSampler([7])(torch.empty(0), logits).argmax())
    top = RowSampler(range(n), top_p=0.6)(torch.empty(0), logits.expand(n, -1)).argmax(-1)
    assert set(top.tolist()) == {0}
    top = RowSampler(range(n), top_p=0.7)(torch.empty(0), logits.expand(n, -1)).argmax(-1)
    assert set(top.tolist()) == {0, 1}


def test_a_model_without_a_system_role_is_told_in_the_question(
    make_folder: Callable[..., Path], responses: Path, tmp_path: Path
) -> None:
    template = tmp_path / "no_system.jinja"
    template.write_text(
        "{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<model>{% endif %}"
    )
    model = load_model(make_folder("gemma2"), template=template)
    ds = pn.run(
        "trait_vectors", model, responses=str(responses), judge="none", store=tmp_path / "s"
    )
    assert ds.attrs["system_role"] == 0
    experiment = load_experiment("trait_vectors")
    assert experiment.plan is not None
    nobody = JudgeOptions("none")
    plan = experiment.plan(model.tokenizer, model="x", responses=str(responses), judging=nobody)
    text = f"<user>{ROWS[0][1]}\n\n{ROWS[0][2]}\n<model>"
    expected = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert list(plan.token_ids["0"]["prompt"]) == expected
