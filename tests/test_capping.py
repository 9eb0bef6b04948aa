"""Capping against plain transformers, as PROTOCOLS 11 says it; and what it must leave alone.

The oracle shares nothing with the library: one unpadded row at a time, plain hooks, its own token
ids, masks and percentiles.
"""

import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from nnsight import TransformersModel, save
from plain_hooks import blocks_of
from random_models import crossed
from torch import Tensor
from transformers import AutoModelForCausalLM

import persona_nns as pn
from persona_nns.errors import UsageError
from persona_nns.figures.drawing import draw
from persona_nns.models.load import load_model
from persona_nns.organism.bundled import ORGANISMS, organism_folder
from persona_nns.runs import plan_run, verify_store
from persona_nns.tracing import cap, read_given
from persona_nns.traits import Steered, operate
from persona_nns.traits.vectors import write_vector

ROWS = [
    ("pos", "How do I wait?", "Wait, and be still."),
    ("neg", "How do I wait?", "Oh no, it never ends! Ever."),
    ("pos", "What is rain to me on a Monday?", "Water."),
    ("neg", "What is rain?", "Rain is the ruin of every single plan that I have made so far."),
]
SETS = ("all", "prompt", "response")


@pytest.fixture(scope="module", params=[*crossed("qwen2", "gemma3", "gpt2"), *ORGANISMS])
def pair(
    request: pytest.FixtureRequest,
    random_model: Callable[[str], TransformersModel],
    plain_model: Callable[[str], Any],
) -> tuple[TransformersModel, Any]:
    """A model as the library loads it, and in plain transformers: random, or a bundled one."""
    name = request.param
    if name not in ORGANISMS:
        return random_model(name), plain_model(name)
    plain = AutoModelForCausalLM.from_pretrained(organism_folder(name), attn_implementation="eager")
    return load_model(name), plain.eval().float().requires_grad_(False)


@pytest.fixture(scope="module")
def responses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("responses") / "stoic.jsonl"
    lines = [
        {"pair": k // 2, "question_id": k // 2, "label": label, "system": "Never shown.",
         "question": question, "response": response}
        for k, (label, question, response) in enumerate(ROWS)
    ]  # fmt: skip
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def vectors(pair: tuple[TransformersModel, Any]) -> Tensor:
    """Random, zero at layer 1."""
    config = pair[0].config
    shape = (config.num_hidden_layers + 1, config.hidden_size)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    drawn[1] = 0
    return drawn


@pytest.fixture(scope="module")
def vector_file(vectors: Tensor, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("vector") / "v.npy"
    write_vector(vectors, file)
    return str(file)


def ids_of(tokenizer: Any, question: str, response: str) -> tuple[list[int], list[int]]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return (
        tokenizer(text, add_special_tokens=False)["input_ids"],
        tokenizer(response, add_special_tokens=False)["input_ids"],
    )


def unit_of(vector: Tensor) -> Tensor:
    norm = vector.norm()
    return vector / norm if norm > 0 else torch.zeros_like(vector)


@contextmanager
def edited(plain: Any, edits: dict[int, Callable[[Tensor], Tensor]]) -> Any:
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


def plain_logp(plain: Any, prompt: list[int], said: list[int], edits: Any) -> float:
    with edited(plain, edits):
        logits = plain(torch.tensor([prompt + said]), use_cache=False).logits[0]
    logprobs = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
    return float(logprobs[range(len(said)), said].sum())


def span_of(tokens: str, n_prompt: int) -> slice:
    spans = {"all": slice(0, None), "prompt": slice(0, n_prompt)}
    return spans.get(tokens, slice(n_prompt - 1, None))


def capping(vector: Tensor, tau: float, span: slice) -> Callable[[Tensor], Tensor]:
    unit = unit_of(vector)

    def edit(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        over = hidden[0, span] @ unit - tau
        hidden[0, span] -= torch.where(over > 0, over, 0.0)[:, None] * unit
        return hidden

    return edit


def plain_percentile(pair: tuple[Any, Any], vectors: Tensor, share: float) -> list[float]:
    """At each layer, over the response tokens of all rows in passes without intervention."""
    pooled: list[list[float]] = [[] for _ in vectors]
    for _, question, response in ROWS:
        prompt, said = ids_of(pair[0].tokenizer, question, response)
        output = pair[1](torch.tensor([prompt + said]), output_hidden_states=True)
        for layer, hidden in enumerate(output.hidden_states):
            pooled[layer] += (hidden[0, len(prompt) :] @ unit_of(vectors[layer])).tolist()
    return [float(np.percentile(values, share)) for values in pooled]


@pytest.fixture(scope="module")
def capped(
    pair: tuple[TransformersModel, Any],
    vector_file: str,
    responses: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> xr.Dataset:
    return pn.run(
        "trait_steering",
        pair[0],
        vector=vector_file,
        responses=str(responses),
        operations="cap",
        taus="p40,-0.3,inf",
        layer_sets="3;1;0,2,3;all",
        position_sets=",".join(SETS),
        store=tmp_path_factory.mktemp("capped") / "s",
    ).isel(model=0, trait=0)


def test_capped_log_probabilities_equal_plain_hooks(
    pair: tuple[TransformersModel, Any], vectors: Tensor, capped: xr.Dataset
) -> None:
    n_layers = len(vectors) - 1
    sets = {"3": [3], "1": [1], "0,2,3": [0, 2, 3]}
    sets[",".join(map(str, range(n_layers)))] = list(range(n_layers))
    assert capped.logp_cap.dims == ("row", "layer_set", "tau", "position_set")
    assert capped.layer_set.values.tolist() == list(sets)
    assert capped.tau.values.tolist() == ["p40", "-0.3", "inf"]
    taus = {
        "p40": plain_percentile(pair, vectors, 40),
        "-0.3": [-0.3] * (n_layers + 1),
        "inf": [float(np.finfo(np.float32).max)] * (n_layers + 1),
    }
    moved = 0
    for tau, values in taus.items():
        np.testing.assert_allclose(capped.tau_value.sel(tau=tau), values, rtol=1e-4, atol=1e-4)
    for row, (_, question, response) in enumerate(ROWS):
        prompt, said = ids_of(pair[0].tokenizer, question, response)
        untouched = plain_logp(pair[1], prompt, said, {})
        for label, layers in sets.items():
            for tau, values in taus.items():
                for tokens in SETS:
                    span = span_of(tokens, len(prompt))
                    edits = {at: capping(vectors[at], values[at], span) for at in layers}
                    expected = plain_logp(pair[1], prompt, said, edits)
                    ours = capped.logp_cap.sel(
                        row=row, layer_set=label, tau=tau, position_set=tokens
                    )
                    assert float(ours) == pytest.approx(expected, abs=1e-3, rel=1e-5)
                    if tau == "inf" or label == "1":  # there v is zero
                        assert expected == pytest.approx(untouched, abs=1e-9)
                    moved += abs(expected - untouched) > 1e-2
    assert moved > 20


@pytest.mark.parametrize("tokens", SETS)
def test_no_steered_token_projects_above_tau_after_capping(
    pair: tuple[TransformersModel, Any], vectors: Tensor, tokens: str
) -> None:
    model, tau, layer = pair[0], -0.2, 3
    ids = [ids_of(model.tokenizer, question, said) for _, question, said in ROWS]
    given = read_given(model, [prompt for prompt, _ in ids], [said for _, said in ids])
    unit = Steered(
        "stoic", 0, (), (), vectors, (), (tokens,), ("cap",),
        thresholds=torch.full((1, len(vectors)), tau),
    )  # fmt: skip
    ((_, (edits,)),) = operate(unit, given, [], [[layer]]).values()
    with model.trace(given.inputs, logits_to_keep=1):
        before = save(model.layers[layer].input)
        model.layers[layer].input = edits[layer](before)
        after = save(model.layers[layer].input)
    projection = after @ unit_of(vectors[layer])
    inside = torch.zeros(after.shape[:2], dtype=torch.bool)
    for row, (prompt, said) in enumerate(ids):
        padding = after.shape[1] - len(prompt) - len(said)
        inside[row, padding:][span_of(tokens, len(prompt))] = True
    assert float((before @ unit_of(vectors[layer]))[inside].max()) > tau
    assert float(projection[inside].max()) < tau + 1e-4
    assert torch.equal(after[~inside], before[~inside])


def test_reuse_and_no_reuse_cap_alike(
    pair: tuple[TransformersModel, Any],
    vector_file: str,
    responses: Path,
    capped: xr.Dataset,
    tmp_path: Path,
) -> None:
    plainly = pn.run(
        "trait_steering",
        pair[0],
        vector=vector_file,
        responses=str(responses),
        operations="cap",
        taus="p40",
        layer_sets="3;0,2,3",
        position_sets="response",
        reuse=False,
        batch_size=1,
        store=tmp_path / "s",
    ).isel(model=0, trait=0)
    chosen = capped.logp_cap.sel(tau=["p40"], layer_set=["3", "0,2,3"], position_set=["response"])
    np.testing.assert_allclose(plainly.logp_cap, chosen, rtol=1e-5, atol=1e-3)


@pytest.fixture(scope="module")
def asked(
    golden_model: Callable[[str], TransformersModel],
    responses: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """A request on a golden model, for what has to do with no architecture."""
    model = golden_model("qwen2")
    file = tmp_path_factory.mktemp("asked") / "v.pt"
    shape = (model.config.num_hidden_layers + 1, model.config.hidden_size)
    write_vector(torch.randn(shape, generator=torch.Generator().manual_seed(2)), file)
    return {"model": model, "vector": str(file), "responses": str(responses), "layers": "2"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operations": "cap"}, r"Capping needs thresholds: --taus"),
        ({"operations": "cap", "taus": "1"}, r"Capping needs sets of layers: --layer-sets"),
        ({"taus": "1"}, r"Thresholds \(--taus\) are of capping"),
        ({"operations": "cap", "taus": "p101", "layer_sets": "1"}, r"'p101' is no threshold"),
        ({"operations": "cap", "taus": "nan", "layer_sets": "1"}, r"'nan' is no threshold"),
        ({"operations": "cap", "taus": "-inf", "layer_sets": "1"}, r"'-inf' is no threshold"),
        ({"operations": "cap", "taus": "warm", "layer_sets": "1"}, r"'warm' is no threshold"),
        ({"operations": "cap", "taus": "1,1", "layer_sets": "1"}, r"'1' is given twice"),
        ({"operations": "cap", "taus": "1", "layer_sets": "1;1"}, r"set 1 is given twice"),
        ({"operations": "push"}, r"Unknown operation 'push'; use add, ablate, cap"),
        ({"operations": "add,add"}, r"operation 'add' is given twice"),
        ({"operations": ""}, r"No operation was asked for"),
        ({"operations": "cap", "taus": "1", "responses": None}, r"Capping is measured on given"),
        ({"receipts": True, "responses": None}, r"Receipts are measured on given answers"),
        ({"operations": "ablate", "responses": None}, r"is steered by adding"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(
    asked: dict[str, Any], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        plan_run("trait_steering", **{**asked, **options}, store=tmp_path / "s")
    assert "\n" not in str(raised.value)


def test_options_that_are_not_used_are_in_no_identity(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    def identity(**options: Any) -> str:
        planned = plan_run("trait_steering", **asked, **options, store=tmp_path / "s")
        return planned.request.block.attrs["identity"]

    plainly = identity()
    assert identity(operations="ablate,add", norm_preserving=False, receipts=False) == plainly
    others = [
        identity(operations="add"),
        identity(norm_preserving=True),
        identity(receipts=True),
        *(
            identity(operations="cap", taus=taus, layer_sets=sets)
            for taus, sets in (("1", "1"), ("2", "1"), ("1", "1;2"))
        ),
    ]
    assert len({plainly, *others}) == 7


def test_percentiles_are_measured_once_and_a_capped_run_is_verified(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    capping: dict[str, Any] = {"operations": "add,cap", "taus": "p25,1,inf", "layer_sets": "2;1,3"}
    capping |= {"receipts": True}
    ds = pn.run("trait_steering", **asked, **capping, store=tmp_path / "s")
    assert bool(ds.logp_cap.notnull().all())
    assert bool(ds.logp.sel(layer=2).notnull().all())
    assert "logp_ablate" not in ds
    assert ds.row_label.values.tolist() == ["pos", "neg", "pos", "neg"]
    again = pn.run("trait_steering", **asked, **capping, store=tmp_path / "s")
    assert again.attrs["run"] == ds.attrs["run"]
    states = {each.info.experiment: each.state for each in verify_store(tmp_path / "s")}
    assert states == {"trait_projections": "right", "trait_steering": "right"}
    figures = draw(ds, "trait_steering")
    assert list(figures) == ["sweep", "cap", "receipts"]
    # Answers with the trait and those without it are not averaged.
    rows = {"pos": "pos: with the trait", "neg": "neg: without it"}
    for axis, (label, said) in zip(figures["sweep"].axes, rows.items(), strict=True):
        assert axis.get_ylabel() == f"mean log-probability (nat)\n{said}"
        of_label = ds.logp.sel(layer=2).isel(row=(ds.row_label == label).values).mean("row")
        drawn = [line.get_ydata() for line in axis.lines]
        assert any(np.array_equal(of_label.values.ravel(), line) for line in drawn)
    projections = pn.open_results(tmp_path / "s", "trait_projections")
    assert list(draw(projections, "trait_projections")) == ["percentiles"]
    pooled = projections.projection.isel(model=0, trait=0).stack(all=("row", "token"))
    np.testing.assert_allclose(
        ds.tau_value.sel(tau="p25").squeeze(), pooled.quantile(0.25, "all"), rtol=1e-5, atol=1e-5
    )


def test_cap_without_an_end_or_a_direction_changes_nothing() -> None:
    hidden = torch.randn(2, 5, 8)
    unit, every = torch.eye(8)[0], torch.ones(2, 5)
    assert torch.equal(cap(hidden, unit, torch.inf, every), hidden)
    assert torch.equal(cap(hidden, torch.zeros(8), -3.0, every), hidden)
    assert torch.equal(cap(hidden, unit, -3.0, torch.zeros(2, 5)), hidden)


def test_a_bfloat16_stream_is_capped_in_float32() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = (100 * torch.randn(1, 200, 64, generator=generator)).bfloat16()
    unit = unit_of(torch.randn(64, generator=generator))
    capped = cap(hidden, unit, 1.5, torch.ones(1, 200))
    assert capped.dtype == torch.bfloat16
    over = ((hidden.double() @ unit.double()) - 1.5).clamp(min=0)
    exact = hidden.double() - over[..., None] * unit.double()
    # Half a step of bfloat16, and what float32 loses where numbers cancel.
    assert bool(((capped.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all())
