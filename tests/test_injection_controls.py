"""Injection controls against plain transformers.

The oracle runs each row by itself, unpadded and without a cache, and intervenes with forward
hooks on blocks and norms. Where things are done it counts in tokens from the end of each prompt.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from nnsight import TransformersModel
from random_models import architectures
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from persona_nns.declarations.catalog import load_experiment
from persona_nns.prompts.frames import BUNDLED_FRAMES, load_frame
from persona_nns.prompts.grids import Cell, Grid
from persona_nns.prompts.padding import NEUTRAL, pad_persona, pad_total
from persona_nns.prompts.render import Prompt, render_cell

LAYER_SETS = [[2], [1, 3]]
SOURCES = ["none", "cached", "oracle"]
CONTROLS = [
    *("uncontrolled", "norm", "rms", "persona_length", "total_length", "tail", "tail+task", "kv"),
    *("every_step", "together", "together_own_size"),
]
TASK_TOKENS = 3
architecture = architectures("gemma3", "gpt2", "olmo2")
Edit = dict[tuple[int, int], Tensor]  # (layer, token) → what is put there


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    return sys.modules[load_experiment("injection_controls").measure.__module__]


@pytest.fixture(scope="module")
def model(random_model: Callable[[str], TransformersModel], architecture: str) -> TransformersModel:
    return random_model(architecture)


@pytest.fixture(scope="module")
def plain(plain_model: Callable[[str], PreTrainedModel], architecture: str) -> PreTrainedModel:
    return plain_model(architecture)


def blocks_of(plain: Any) -> Any:
    if hasattr(plain, "gpt_neox"):
        return plain.gpt_neox.layers
    return plain.transformer.h if hasattr(plain, "transformer") else plain.model.layers


def norm_of(block: Any) -> Any:
    return block.ln_1 if hasattr(block, "ln_1") else getattr(block, "input_layernorm", None)


def size_of(vector: Tensor) -> Tensor:
    return vector.pow(2).mean().sqrt()


def run_plain(
    plain: Any, ids: list[int], edits: Edit | None = None, sizes: Edit | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, residuals [layer, token, d] and norm outputs, with residuals or sizes replaced."""
    edits, sizes = edits or {}, sizes or {}
    residual: list[Tensor] = []
    normed: list[Tensor] = []
    handles = []
    for layer, block in enumerate(blocks_of(plain)):

        def before(_: Any, args: Any, kwargs: Any, layer: int = layer) -> Any:
            hidden = (args[0] if args else kwargs["hidden_states"]).clone()
            for (at, token), value in edits.items():
                if at == layer:
                    hidden[0, token] = value
            residual.append(hidden[0])
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        def after_norm(_: Any, __: Any, output: Tensor, layer: int = layer) -> Tensor:
            output = output.clone()
            for (at, token), size in sizes.items():
                if at == layer:
                    output[0, token] *= size / size_of(output[0, token])
            normed.append(output[0])
            return output

        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        if norm_of(block) is not None:
            handles.append(norm_of(block).register_forward_hook(after_norm))
    try:
        logits = plain(torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits, torch.stack(residual), torch.stack(normed or residual)


def hosts_of(tokenizer: Any, cell: Cell) -> dict[str, Prompt]:
    prompts = render_cell(tokenizer, cell)
    return {
        **prompts,
        "persona_length": pad_persona(
            tokenizer, cell, prompts["BY"], prompts["XY"], NEUTRAL
        ).prompt,
        "total_length": pad_total(tokenizer, cell, prompts["BY"], prompts["XY"], NEUTRAL).prompt,
    }


def plain_cell(plain: Any, tokenizer: Any, cell: Cell, n_eval: int = 10, end: int = 2) -> Tensor:
    """KL [layer set, control, source] by the words of the experiment's docstring."""
    hosts = hosts_of(tokenizer, cell)
    said: list[int] = []
    while len(said) < n_eval and end not in said:
        logits = run_plain(plain, [*hosts["XY"].ids, *said])[0]
        said.append(int(logits[-1].argmax()))
    ids = {name: [*prompt.ids, *said[:-1]] for name, prompt in hosts.items()}
    runs = {name: run_plain(plain, row) for name, row in ids.items()}
    clean = runs["XY"][0][-len(said) :].double().log_softmax(-1)
    has_norm = norm_of(blocks_of(plain)[0]) is not None
    n_layers, n_forced = len(blocks_of(plain)), len(said) - 1

    def kl(logits: Tensor) -> float:
        moved = logits[-len(said) :].double().log_softmax(-1)
        return float((clean.exp() * (clean - moved)).sum())

    def back(name: str, distance: int, layer: int) -> Tensor:
        """The residual so many tokens before the last column."""
        return runs[name][1][layer, len(ids[name]) - 1 - distance]

    n_tail = len(hosts["XY"].spans["tail"])
    n_task = min(len(prompt.spans["task"]) for prompt in hosts.values())
    n_own_task = len(hosts["XY"].spans["task"])
    result = torch.full((len(LAYER_SETS), len(CONTROLS), 3), torch.nan)
    for c, control in enumerate(CONTROLS):
        together = control.startswith("together")
        padded = {"total_length": "total_length", "persona_length": "persona_length"}
        host = padded.get(control, "persona_length" if together else "BY")
        if control in ("rms", "together") and not has_norm:
            continue
        distances = [n_forced]  # of p_last from the last column
        if control == "every_step" or together:
            distances += list(range(n_forced))
        if control == "tail":
            distances += [n_forced + k for k in range(1, n_tail)]
        if control == "tail+task":
            distances += [n_forced + k for k in range(1, n_tail + min(TASK_TOKENS, n_task))]
        edits_kv: Edit = {}
        if control == "kv" or together:
            for k in range(1, n_tail + n_own_task):
                for layer in range(n_layers):
                    token = len(ids[host]) - 1 - n_forced - k
                    edits_kv[layer, token] = back("XY", n_forced + k, layer)
        for s, layers in enumerate(LAYER_SETS):
            for k, source in enumerate(SOURCES):
                edits, sizes = dict(edits_kv), {}
                for layer in layers if source != "none" else []:
                    for distance in distances:
                        bb, xb, by = (back(n, distance, layer) for n in ("BB", "XB", "BY"))
                        value = back("XY", distance, layer)
                        if source == "cached":
                            value = xb + by - bb
                        token = len(ids[host]) - 1 - distance
                        if control in ("norm", "together"):
                            value = value / value.norm() * back(host, distance, layer).norm()
                        edits[layer, token] = value
                        if control in ("rms", "together"):
                            sizes[layer, token] = size_of(runs[host][2][layer, token])
                result[s, c, k] = kl(run_plain(plain, ids[host], edits, sizes)[0])
    return result


def assert_cell(measured: dict[str, Any], row: int, expected: Tensor) -> None:
    fits = measured["n_neutral"][row] >= 0
    kl = measured["kl"][row]
    torch.testing.assert_close(kl[:, fits], expected[:, fits], atol=5e-5, rtol=2e-4, equal_nan=True)
    assert kl[:, ~fits].isnan().all()


@pytest.fixture(scope="module")
def batched(experiment: ModuleType, model: TransformersModel, small_grid: Grid) -> dict[str, Any]:
    return experiment.measure(
        model, list(small_grid.cells), layer_sets=LAYER_SETS, task_tokens=TASK_TOKENS
    )


def test_it_equals_plain_transformers_with_plain_hooks(
    batched: dict[str, Any],
    experiment: ModuleType,
    plain: PreTrainedModel,
    tokenizer: Any,
    small_grid: Grid,
) -> None:
    assert list(experiment.CONTROLS) == CONTROLS
    for row in (0, 3):
        assert_cell(batched, row, plain_cell(plain, tokenizer, small_grid.cells[row]))


def test_closure_is_the_share_of_the_controls_own_gap(
    batched: dict[str, Any],
) -> None:
    kl, closure = batched["kl"], batched["closure"]
    own = {"together": "persona_length", "together_own_size": "persona_length"}
    for c, name in enumerate(CONTROLS):
        base = own.get(name, "uncontrolled" if not name.endswith("_length") else name)
        gap = kl[:, :, CONTROLS.index(base), 0]
        torch.testing.assert_close(
            closure[:, :, c], 1 - kl[:, :, c] / gap[..., None], equal_nan=True
        )
    for name in ("norm", "rms", "tail", "tail+task", "every_step"):
        none = kl[:, :, CONTROLS.index(name), 0]
        expected = kl[:, :, 0, 0]
        assert none.isnan().all() or torch.equal(none, expected)


def test_every_control_does_something(batched: dict[str, Any], architecture: str) -> None:
    kl = batched["kl"][0]  # a persona that is longer than the baseline's
    for c, name in enumerate(CONTROLS[1:], start=1):
        if architecture == "olmo2" and name in ("rms", "together"):
            assert kl[:, c].isnan().all()
        elif name == "rms":  # an RMS norm has undone the size already; a layer norm has not
            assert not torch.equal(kl[:, c], kl[:, 0])
        else:
            assert float((kl[:, c] - kl[:, 0]).abs().max()) > 1e-4, name


def test_a_batch_equals_one_cell_at_a_time(
    batched: dict[str, Any], experiment: ModuleType, model: TransformersModel, small_grid: Grid
) -> None:
    for row in (1, 2):
        single = experiment.measure(
            model, [small_grid.cells[row]], layer_sets=LAYER_SETS, task_tokens=TASK_TOKENS
        )
        for name, values in single.items():
            torch.testing.assert_close(
                values[0], batched[name][row], atol=5e-5, rtol=2e-4, equal_nan=True
            )


def test_reuse_gives_the_numbers_of_the_plain_protocol(
    batched: dict[str, Any], experiment: ModuleType, model: TransformersModel, small_grid: Grid
) -> None:
    plain = experiment.measure(
        model,
        list(small_grid.cells),
        layer_sets=LAYER_SETS,
        task_tokens=TASK_TOKENS,
        reuse=False,
    )
    for name, values in plain.items():
        torch.testing.assert_close(values, batched[name], atol=5e-5, rtol=2e-4, equal_nan=True)


def test_the_clean_residuals_are_the_clean_keys_and_values(
    batched: dict[str, Any], plain: Any, tokenizer: Any, small_grid: Grid
) -> None:
    """In a host as long as XY, positions are equal: the cache itself can be put together."""
    cell = small_grid.cells[0]
    hosts = hosts_of(tokenizer, cell)
    clean, host = hosts["XY"], hosts["persona_length"]
    assert len(clean) == len(host)
    first, last = host.spans["task"].start, len(host) - 1
    caches = []
    for prompt in (clean, host):
        cache = DynamicCache()
        plain(torch.tensor([prompt.ids[:-1]]), past_key_values=cache, use_cache=True)
        layers: Any = cache.layers
        caches.append([(layer.keys, layer.values) for layer in layers])
    joined = DynamicCache(
        [
            tuple(
                torch.cat([of_host[:, :, :first], of_clean[:, :, first:last]], 2)
                for of_clean, of_host in zip(*pair, strict=True)
            )
            for pair in zip(*caches, strict=True)
        ]
    )
    said: list[int] = []
    while len(said) < 10:
        said.append(int(run_plain(plain, [*clean.ids, *said])[0][-1].argmax()))
    rest = torch.tensor([[clean.ids[-1], *said[:-1]]])
    moved = plain(
        rest,
        past_key_values=joined,
        position_ids=torch.arange(last, last + 10)[None],
        use_cache=True,
    ).logits[0]
    target = run_plain(plain, [*clean.ids, *said[:-1]])[0][-10:]
    p, q = target.double().log_softmax(-1), moved.double().log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum())
    for name in ("together_own_size", "together"):
        measured = float(batched["kl"][0, 0, CONTROLS.index(name), 0])
        if measured == measured:
            assert measured == pytest.approx(expected, rel=1e-3, abs=2e-5)


def test_a_persona_that_is_the_baseline_leaves_nothing_to_close(
    experiment: ModuleType, model: TransformersModel, small_grid: Grid
) -> None:
    personas = {"baseline": "a thoughtful person", "same": "a thoughtful person"}
    cells = list(replace(small_grid, personas=personas).cells)
    measured = experiment.measure(model, cells, layer_sets=LAYER_SETS)
    kl = measured["kl"]
    assert float(kl[~kl.isnan()].abs().max()) < 5e-6
    assert int(measured["n_neutral"].abs().max()) == 0


@pytest.mark.parametrize("frame", BUNDLED_FRAMES)
def test_hosts_are_padded_to_the_token(tokenizer: Any, small_grid: Grid, frame: str) -> None:
    personas = {**small_grid.personas, "short": "me"}
    lengths = {"yoda": 0, "short": -1}
    grid = replace(small_grid, personas=personas).put_in(load_frame(frame))
    begins = grid.frame.messages[-1 if frame != "system" else 0].content.partition("{")[0]
    for cell in grid.cells:
        prompts = render_cell(tokenizer, cell)
        host, target = prompts["BY"], prompts["XY"]
        for padded in (
            pad_persona(tokenizer, cell, host, target, NEUTRAL),
            pad_total(tokenizer, cell, host, target, NEUTRAL),
        ):
            if cell.persona in lengths:
                assert (padded.prompt, padded.n_neutral) == (host, lengths[cell.persona])
                continue
            assert len(padded.prompt) == len(target)
            assert padded.n_neutral == len(target) - len(host)
            for name in ("persona", "task", "tail"):
                span, own = padded.prompt.spans[name], host.spans[name]
                kept = padded.prompt.ids[span.start : span.start + len(own)]
                assert kept == host.ids[own.start : own.stop]
            for name in ("task", "tail"):
                assert padded.prompt.spans[name] == target.spans[name]
            assert "ordinary" in padded.prompt.text
        in_persona = pad_persona(tokenizer, cell, host, target, NEUTRAL).prompt
        before = pad_total(tokenizer, cell, host, target, NEUTRAL).prompt
        if cell.persona not in lengths:
            assert in_persona.spans["persona"] == target.spans["persona"]
            own = f"{begins}a thoughtful person"
            assert before.text.index("ordinary") < before.text.index(own)
            head, _, _ = host.text.partition(own)
            assert before.text.startswith(f"{head}on an")
            assert "a thoughtful person on an ordinary" in in_persona.text


@pytest.mark.parametrize("said", [0, 2])
def test_a_continuation_that_ends_early_is_scored_up_to_its_end(
    random_model: Callable[[str], TransformersModel],
    plain_model: Callable[[str], PreTrainedModel],
    experiment: ModuleType,
    tokenizer: Any,
    small_grid: Grid,
    monkeypatch: pytest.MonkeyPatch,
    said: int,
) -> None:
    model, plain, cell = random_model("qwen3"), plain_model("qwen3"), small_grid.cells[1]
    ids = list(render_cell(tokenizer, cell)["XY"].ids)
    follows: list[int] = []
    while len(follows) <= said:
        follows.append(int(run_plain(plain, [*ids, *follows])[0][-1].argmax()))
    assert follows[said] not in follows[:said]
    monkeypatch.setattr(model._module.generation_config, "eos_token_id", follows[said])
    with pytest.warns(UserWarning, match=rf"{cell.label} \({said + 1}\)"):
        measured = experiment.measure(
            model, list(small_grid.cells[:2]), layer_sets=LAYER_SETS, task_tokens=TASK_TOKENS
        )
    assert int(measured["n_eval"][1]) == said + 1
    assert_cell(measured, 1, plain_cell(plain, tokenizer, cell, end=follows[said]))
