"""Attribution against finite differences of plain transformers, for every kind of part."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight import TransformersModel
from plain_hooks import blocks_of
from random_models import crossed
from sandboxed import sandboxed
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import persona_nns as pn
from persona_nns.errors import PersonaError, UsageError
from persona_nns.tracing import attribute, attribution, left_pad, open_batch
from persona_nns.tracing.attribution import Part

CLEAN, HOST = [5, 9, 200, 31, 77, 140, 8, 61], [5, 9, 410, 31, 77, 140, 8, 61]
TOKEN = 300


@pytest.fixture(scope="module", params=crossed("gemma2", "gpt_neox", "gpt2"))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


def metric(logits: Tensor) -> Tensor:
    """A metric that is not linear: how likely a token is at the end, [row]."""
    return logits[:, -1].log_softmax(-1)[:, TOKEN]


def modules_of(plain: Any, part: Part) -> list[tuple[nn.Module, bool]]:
    """The modules at which parts stand, and whether it is what goes in."""
    found: list[tuple[nn.Module, bool]] = []
    for block in blocks_of(plain):
        attention = getattr(block, "self_attn", None) or getattr(block, "attention", None)
        attention = attention or block.attn
        named = dict(block.mlp.named_children())
        if part == "mlp":
            found.append((block.mlp, False))
        elif part == "neuron":
            down = ("down_proj", "dense_4h_to_h", "c_proj")
            found.append((next(named[name] for name in down if name in named), True))
        else:
            out = ("o_proj", "dense", "c_proj")
            found.append((next(getattr(attention, n) for n in out if hasattr(attention, n)), True))
    return found


def run(plain: Any, ids: list[int], part: Part, change: Callable[[int, Tensor], Tensor]) -> Tensor:
    """The logits, with the outputs of parts changed: of a layer, [column, feature]."""
    handles = []
    for layer, (module, goes_in) in enumerate(modules_of(plain, part)):

        def before(_: Any, args: Any, layer: int = layer) -> Any:
            return (change(layer, args[0]), *args[1:])

        def after(_: Any, __: Any, output: Tensor, layer: int = layer) -> Tensor:
            return change(layer, output)

        hook = module.register_forward_pre_hook(before) if goes_in else None
        handles.append(hook or module.register_forward_hook(after))
    logits = plain(torch.tensor([ids]), use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


def slope(plain: Any, part: Part, layer: int, features: slice, columns: slice) -> float:
    """d metric / dt of features moved by t of the way to the clean run, by finite differences."""
    held: dict[str, list[Tensor]] = {"clean": [], "host": []}
    for name, ids in (("clean", CLEAN), ("host", HOST)):
        run(plain, ids, part, lambda _, own, to=held[name]: to.append(own) or own)
    way = held["clean"][layer] - held["host"][layer]

    def moved(step: float) -> float:
        def change(at: int, own: Tensor) -> Tensor:
            own = own.clone()
            if at == layer:
                own[:, columns, features] += step * way[:, columns, features]
            return own

        return float(metric(run(plain, HOST, part, change)))

    wide, narrow = ((moved(step) - moved(-step)) / (2 * step) for step in (0.04, 0.02))
    return (4 * narrow - wide) / 3  # steps extrapolated to none: norms compute in single precision


@pytest.mark.parametrize("part", ["head", "mlp", "neuron"])
def test_attribution_is_a_slope(
    part: Part,
    architecture: str,
    random_folder: Callable[[str], Path],
    random_model: Callable[[str], TransformersModel],
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(
        random_folder(architecture), dtype=torch.float64, attn_implementation="eager"
    )
    plain.eval().requires_grad_(requires_grad=False)
    model = random_model(architecture)
    clean, host = (open_batch(left_pad([ids]), None) for ids in (CLEAN, HOST))
    ours = attribute(model, clean, host, metric, part)[0]
    width = {"head": 8, "mlp": 32, "neuron": 1}[part]
    scores = ours.view(5, -1)
    largest = scores.abs().flatten().topk(min(6, scores.numel())).indices.tolist()
    for at in largest:
        layer, k = divmod(at, scores.shape[1])
        features = slice(k * width, (k + 1) * width)
        expected = slope(plain, part, layer, features, slice(None))
        assert float(scores[layer, k]) == pytest.approx(expected, rel=2e-3, abs=1e-6)


def test_what_parts_add_to_is_what_their_whole_is_given(
    architecture: str, random_model: Callable[[str], TransformersModel]
) -> None:
    """An MLP's output is linear in its neurons: theirs add up to its own."""
    model = random_model(architecture)
    clean, host = (open_batch(left_pad([ids]), None) for ids in (CLEAN, HOST))
    whole = attribute(model, clean, host, metric, "mlp")
    neurons = attribute(model, clean, host, metric, "neuron")
    torch.testing.assert_close(neurons.sum(-1), whole, rtol=1e-4, atol=1e-5)


def test_of_a_linear_model_it_is_the_whole_difference(
    random_folder: Callable[[str], Path],
) -> None:
    """Without attention to other tokens and norms that divide, the last MLP's is all it does."""
    model = pn.load_model(random_folder("gpt2"))
    model._module.transformer.ln_f = nn.Identity()
    clean, host = (open_batch(left_pad([ids]), None) for ids in (CLEAN, HOST))

    def logit(logits: Tensor) -> Tensor:
        return logits[:, -1, TOKEN]

    ours = attribute(model, clean, host, logit, "mlp")[0, -1]
    with torch.no_grad():
        outputs = {}
        for name, ids in (("clean", CLEAN), ("host", HOST)):
            block, put_out = model._module.transformer.h[-1].mlp, []
            handle = block.register_forward_hook(lambda *given, to=put_out: to.append(given[2]))
            model._module(torch.tensor([ids]), use_cache=False)
            handle.remove()
            outputs[name] = put_out[0][0, -1]
        expected = model._module.lm_head.weight[TOKEN] @ (outputs["clean"] - outputs["host"])
    assert float(ours) == pytest.approx(float(expected), rel=1e-4)


def test_places_and_sources(random_model: Callable[[str], TransformersModel]) -> None:
    model = random_model("llama")
    longer = open_batch(left_pad([[7, 7, *CLEAN], [7, 7, *HOST]]), None)
    host = open_batch(left_pad([HOST, CLEAN]), None)
    column = torch.arange(len(HOST))
    first, rest = column < 3, column >= 3
    both = attribute(model, longer, host, metric, places=torch.stack([first, rest])[:, None])
    assert both.shape == (2, 2, 5, 4)
    whole = attribute(model, longer, host, metric)
    torch.testing.assert_close(both.sum(0), whole, rtol=1e-4, atol=1e-6)
    # Columns are aligned from the end unless it is said from where they come.
    source = (column + 2).expand(2, -1)
    torch.testing.assert_close(attribute(model, longer, host, metric, source=source), whole)
    # Of its own run, nothing would be added. And rows are apart.
    assert not attribute(model, host, host, metric).any()
    alone = attribute(
        model,
        open_batch(left_pad([[7, 7, *CLEAN]]), None),
        open_batch(left_pad([HOST]), None),
        metric,
    )
    torch.testing.assert_close(whole[:1], alone, rtol=1e-4, atol=1e-6)
    padded = open_batch(left_pad([HOST, [3, 3, *CLEAN]]), None)
    others = open_batch(left_pad([[7, 7, *CLEAN], HOST]), None)
    torch.testing.assert_close(
        attribute(model, others, padded, metric)[:1], alone, rtol=1e-3, atol=1e-5
    )


def test_under_any_mode_of_gradients(random_model: Callable[[str], TransformersModel]) -> None:
    model = random_model("llama")
    clean, host = (open_batch(left_pad([ids]), None) for ids in (CLEAN, HOST))
    expected = attribute(model, clean, host, metric)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            ours = attribute(model, clean, host, metric)
        torch.testing.assert_close(ours, expected)
    assert not expected.requires_grad
    assert not any(each.requires_grad for each in model._module.parameters())


def test_what_cannot_be_attributed_is_one_sentence(
    random_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pn.load_model(random_folder("llama"))
    window = open_batch(left_pad([HOST]), None)
    with pytest.raises(UsageError, match="no part 'layer'; use head, mlp, neuron"):
        attribute(model, window, window, metric, "layer")  # type: ignore[arg-type]
    with pytest.raises(PersonaError, match="does not depend on the logits"):
        attribute(model, window, window, lambda logits: torch.ones(len(logits)))
    with sandboxed(model), pytest.raises(UsageError, match="gradients, which a server"):
        attribute(model, window, window, metric)
    monkeypatch.setattr(attribution, "_DOWN", ("w2",))
    with pytest.raises(UsageError, match="the MLP of block 0 has none of w2; use 'head' or 'mlp'"):
        attribute(model, window, window, metric, "neuron")
