"""The ten supported architectures against plain transformers.

The oracles below share nothing with the library: they load the model with transformers alone,
intervene with forward pre-hooks, and run every prompt by itself, unpadded and without a cache.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import nnsight
import pytest
import torch
from nnsight import TransformersModel
from random_models import crossed
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from persona_nns.prompts.grids import Cell, Grid
from persona_nns.tracing.batches import keep_last, left_pad
from persona_nns.tracing.residuals import substitute, take

# Longer than the sliding window (16) of the architectures that have one.
LONG = [5 + (37 * k) % 1000 for k in range(27)]
LONGER = [9 + (53 * k) % 1000 for k in range(33)]
N_EVAL = 10
POSITIONS = ["p_user_last", "p_last-2", "p_last", "g1", "g2"]


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


def plain_logits(
    plain: Any, ids: list[int], layer: int | None = None, at: int = 0, value: Tensor | None = None
) -> Tensor:
    """Logits [token, vocabulary], with ``value`` in place of one input of one block."""
    handles = []
    if layer is not None:

        def overwrite(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = (args[0] if args else kwargs["hidden_states"]).clone()
            assert value is not None
            hidden[0, at] = value
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        block = blocks_of(plain)[layer]
        handles.append(block.register_forward_pre_hook(overwrite, with_kwargs=True))
    try:
        return plain(torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def plain_hidden(plain: Any, ids: list[int]) -> Tensor:
    """Residual streams [layer, token, d_model], the last one after the final norm."""
    output = plain(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    return torch.stack(output.hidden_states)[:, 0]


def test_every_block_answers_to_the_standard_names(
    model: TransformersModel, architecture: str
) -> None:
    module = model._module
    assert len(model.layers) == 5
    assert model.embed._module is module.get_input_embeddings()
    assert model.lm_head._module is module.get_output_embeddings()
    names = dict(module.named_modules())
    path = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}.get(
        architecture, "model.layers"
    )
    attention = {"gpt2": "attn", "gpt_neox": "attention"}.get(architecture, "self_attn")
    out = {"gpt2": "c_proj", "gpt_neox": "dense"}.get(architecture, "o_proj")
    norm = {"gpt2": "ln_1"}.get(architecture, "input_layernorm")
    final = {"gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm"}
    assert model.final_norm._module is names[final.get(architecture, "model.norm")]
    for index, block in enumerate(model.layers):
        assert block._module is names[f"{path}.{index}"]
        assert block.attn._module is names[f"{path}.{index}.{attention}"]
        assert block.attn.o_proj._module is names[f"{path}.{index}.{attention}.{out}"]
        assert block.mlp._module is names[f"{path}.{index}.mlp"]
        if architecture == "olmo2":
            assert not hasattr(block, "input_norm")
        else:
            assert block.input_norm._module is names[f"{path}.{index}.{norm}"]


def test_reading_equals_hidden_states_at_every_layer_of_a_padded_batch(
    model: TransformersModel, plain: PreTrainedModel
) -> None:
    batch = left_pad([LONG, LONGER])
    with model.trace(
        batch.tokens, position_ids=batch.position_ids, use_cache=False, output_hidden_states=True
    ):
        read = nnsight.save(
            [block.input.clone() for block in model.layers] + [model.final_norm.output.clone()]
        )
        own = model.output.hidden_states.save()
    assert len(read) == len(own) == 6
    for ours, theirs in zip(read, own, strict=True):
        assert torch.equal(ours, theirs)
    stacked = torch.stack(read)
    for row, ids in enumerate((LONG, LONGER)):
        torch.testing.assert_close(
            stacked[:, row, int(batch.padding[row]) :],
            plain_hidden(plain, ids),
            atol=1e-5,
            rtol=1e-5,
        )


def test_a_padded_row_gives_the_logits_of_the_prompt_alone(
    model: TransformersModel, plain: PreTrainedModel
) -> None:
    batch = left_pad([LONG, LONGER, LONG[:19]])
    with model.trace(batch.tokens, position_ids=batch.position_ids, use_cache=False):
        together = model.output.logits.save()
    for row, ids in enumerate((LONG, LONGER, LONG[:19])):
        single = left_pad([ids])
        with model.trace(single.tokens, position_ids=single.position_ids, use_cache=False):
            alone = model.output.logits.save()
        ours = together[row, int(batch.padding[row]) :]
        torch.testing.assert_close(ours, alone[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours, plain_logits(plain, ids), atol=1e-5, rtol=1e-5)


def test_columns_that_are_named_have_the_logits_of_the_last(plain: PreTrainedModel) -> None:
    ids = torch.tensor([[3, 5, 7, 11, 13], [17, 19, 23, 29, 31]])
    with torch.no_grad():
        whole = plain(ids, use_cache=False).logits
        for n_columns in (0, 1, 3):
            kept = plain(ids, use_cache=False, logits_to_keep=keep_last(n_columns)).logits
            assert kept.shape == (2, n_columns, whole.shape[-1])
            torch.testing.assert_close(kept, whole[:, 5 - n_columns :])


@pytest.mark.parametrize("sliding", ["gemma2", "gemma3", "mistral"])
def test_the_prompts_are_longer_than_the_sliding_window(
    plain_model: Callable[[str], PreTrainedModel],
    random_folder: Callable[[str], Path],
    sliding: str,
) -> None:
    windowed = plain_model(sliding)
    assert getattr(windowed.config, "sliding_window", None) == 16
    open_window = AutoModelForCausalLM.from_pretrained(
        random_folder(sliding), attn_implementation="eager", sliding_window=512
    ).requires_grad_(False)
    moved = (plain_logits(windowed, LONG) - plain_logits(open_window, LONG)).abs().amax(-1)
    assert float(moved[:16].max()) < 1e-5
    assert float(moved[16:].min()) > 1e-2


def test_a_substitution_equals_plain_hooks_at_every_layer(
    model: TransformersModel, plain: PreTrainedModel
) -> None:
    rows, sites = [LONG, LONGER], [LONG.index(LONG[21]), 30]
    batch = left_pad(rows)
    columns = batch.padding + torch.tensor(sites)
    generator = torch.Generator().manual_seed(1)
    value = 2.0 * torch.randn(2, model.config.hidden_size, generator=generator)
    for layer in range(5):
        with model.trace(batch.tokens, position_ids=batch.position_ids, use_cache=False):
            model.layers[layer].input = substitute(model.layers[layer].input, columns, value)
            logits = model.output.logits.save()
        for row, ids in enumerate(rows):
            ours = logits[row, int(batch.padding[row]) :]
            theirs = plain_logits(plain, ids, layer, sites[row], value[row])
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
            effect = (ours - plain_logits(plain, ids)).abs().amax(-1)
            assert float(effect[: sites[row]].max()) < 1e-5
            assert float(effect[sites[row]]) > 0.1


def test_writing_back_what_was_read_changes_nothing(model: TransformersModel) -> None:
    batch = left_pad([LONG, LONGER])
    columns = torch.tensor([20, 25])
    with model.trace(batch.tokens, position_ids=batch.position_ids, use_cache=False):
        clean = model.output.logits.save()
    for layer in range(5):
        with model.trace(batch.tokens, position_ids=batch.position_ids, use_cache=False):
            hidden = model.layers[layer].input
            own = take(hidden, columns[:, None])[:, 0]
            model.layers[layer].input = substitute(hidden, columns, own)
            logits = model.output.logits.save()
        assert torch.equal(logits, clean), layer


def test_overwriting_a_whole_layer_gives_the_other_prompts_logits(
    model: TransformersModel, plain: PreTrainedModel
) -> None:
    host, other = LONG[:24], LONGER[:24]
    residual = plain_hidden(plain, other)
    target, start = plain_logits(plain, other), plain_logits(plain, host)
    assert float((target - start).abs().amax(-1).min()) > 0.1
    single = left_pad([host])
    for layer in range(5):
        with model.trace(single.tokens, position_ids=single.position_ids, use_cache=False):
            hidden = model.layers[layer].input
            for position in range(24):
                hidden = substitute(
                    hidden, torch.tensor([position]), residual[layer, position][None]
                )
            model.layers[layer].input = hidden
            logits = model.output.logits.save()
        torch.testing.assert_close(logits[0], target, atol=1e-5, rtol=1e-5)


@dataclass(frozen=True)
class PlainCell:
    """What the oracle measures for one cell: [layer, position], and [position]."""

    kl: Tensor
    n_eval: list[int]
    cos_additive: Tensor
    cos_persona_task: Tensor
    interaction_ratio: Tensor


def plain_ids(tokenizer: Any, persona: str, task: str, *, header: bool = True) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"As {persona}, {task}"}],
        tokenize=False,
        add_generation_prompt=header,
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def plain_greedy(plain: PreTrainedModel, ids: list[int], count: int, end: int) -> list[int]:
    said: list[int] = []
    while len(said) < count and end not in said:
        said.append(int(plain_logits(plain, [*ids, *said])[-1].argmax()))
    return said


def plain_cosine(a: Tensor, b: Tensor) -> float:
    size = float(a.norm()) * float(b.norm())
    return float(a @ b) / size if size else 0.0


def plain_cell(plain: PreTrainedModel, tokenizer: Any, cell: Cell, end: int = 2) -> PlainCell:
    """The protocol of `localized_positions` for one cell, one plain forward pass at a time."""
    persona, task = cell.persona_text, cell.task_text
    baseline, neutral = cell.baseline_persona_text, cell.baseline_task_text
    texts = [(baseline, neutral), (persona, neutral), (baseline, task), (persona, task)]
    prompts = [plain_ids(tokenizer, *text) for text in texts]
    turns = [len(plain_ids(tokenizer, *text, header=False)) for text in texts]
    reference = plain_greedy(plain, prompts[3], N_EVAL + 2, end)
    hidden = [plain_hidden(plain, [*prompt, *reference[:2]]) for prompt in prompts]
    full = [*prompts[3], *reference]
    clean = plain_logits(plain, full).log_softmax(-1)

    measured = torch.full((4, 6, len(POSITIONS)), math.nan)
    n_eval: list[int] = []
    for p, name in enumerate(POSITIONS):
        # Where the position stands, counted from the end of each prompt.
        lasts = [len(prompt) - 1 for prompt in prompts]
        forced = 0
        if name == "p_user_last":
            sites = [turn - 1 for turn in turns]
        elif name.startswith("g"):
            forced = int(name[1:])
            sites = [last + forced for last in lasts]
        else:
            sites = [last - int(name.partition("-")[2] or 0) for last in lasts]
        window = range(forced, min(forced + N_EVAL, len(reference)))
        n_eval.append(len(window))
        if forced > len(reference):
            continue
        for layer in range(6):
            bb, xb, by, xy = (h[layer, site] for h, site in zip(hidden, sites, strict=True))
            dx, dy, dxy = xb - bb, by - bb, xy - bb
            measured[1, layer, p] = plain_cosine(dxy, dx + dy)
            measured[2, layer, p] = plain_cosine(dx, dy)
            size = float(dxy.norm())
            measured[3, layer, p] = float((dxy - dx - dy).norm()) / size if size else 0.0
            if layer == 5 or not window:
                continue
            logits = plain_logits(plain, full, layer, sites[3], bb + dx + dy).log_softmax(-1)
            total = 0.0
            for token in window:
                column = lasts[3] + token  # predicts reference token `token`
                p_clean, p_moved = clean[column].double(), logits[column].double()
                total += float((p_clean.exp() * (p_clean - p_moved)).sum())
            measured[0, layer, p] = total
    return PlainCell(measured[0, :5], n_eval, *measured[1:])


@pytest.fixture(scope="module")
def batched(
    localized_positions: ModuleType, model: TransformersModel, small_grid: Grid
) -> dict[str, Tensor]:
    return localized_positions.measure(
        model, list(small_grid.cells), layers=list(range(5)), positions=POSITIONS
    )


def assert_cell_equals(batched: dict[str, Tensor], index: int, expected: PlainCell) -> None:
    assert batched["n_eval"][index].tolist() == expected.n_eval
    for name in ("kl", "cos_additive", "cos_persona_task", "interaction_ratio"):
        torch.testing.assert_close(
            batched[name][index],
            getattr(expected, name),
            atol=1e-5,
            rtol=1e-4,
            equal_nan=True,
            msg=lambda text, name=name: f"{name} of cell {index}: {text}",
        )


def test_the_experiment_equals_one_computed_with_plain_hooks(
    batched: dict[str, Tensor], plain: PreTrainedModel, tokenizer: Any, small_grid: Grid
) -> None:
    for index in (0, 3):  # another persona and another task
        assert_cell_equals(batched, index, plain_cell(plain, tokenizer, small_grid.cells[index]))


def test_the_substitution_of_the_experiment_has_an_effect_at_every_layer(
    batched: dict[str, Tensor], architecture: str
) -> None:
    kl = batched["kl"].nan_to_num()
    # In the embedding p_last and g1 are one token in all four prompts: the sum is exact there,
    # except for learned positions, which differ between prompts of different lengths.
    first = float(kl[:, 0, 2:4].abs().max())
    assert first > 1e-3 if architecture == "gpt2" else first < 1e-5
    assert float(kl[:, 1:].amax((0, 2)).min()) > 1e-3


@pytest.mark.parametrize("architecture", crossed("qwen2", "gemma3", "gpt2"), scope="session")
def test_a_batch_of_cells_equals_one_cell_at_a_time(
    batched: dict[str, Tensor],
    localized_positions: ModuleType,
    model: TransformersModel,
    small_grid: Grid,
) -> None:
    for index, cell in enumerate(small_grid.cells):
        single = localized_positions.measure(
            model, [cell], layers=list(range(5)), positions=POSITIONS
        )
        assert set(single) == set(batched)
        for name, values in single.items():
            # Two blocks with a sliding window of 16 do not see the persona: below layer 3 its
            # effect can be rounding alone, which has no direction.
            first = 0 if name.startswith(("kl", "n_eval")) else 3
            torch.testing.assert_close(
                batched[name][index][first:],
                values[0][first:],
                atol=1e-5,
                rtol=1e-4,
                equal_nan=True,
            )


@pytest.mark.parametrize("said", [0, 1, 4])
def test_a_continuation_that_ends_early_is_scored_up_to_its_end(
    random_model: Callable[[str], TransformersModel],
    plain_model: Callable[[str], PreTrainedModel],
    localized_positions: ModuleType,
    tokenizer: Any,
    small_grid: Grid,
    monkeypatch: pytest.MonkeyPatch,
    said: int,
) -> None:
    model, plain = random_model("llama"), plain_model("llama")
    cell = small_grid.cells[2]
    prompt = plain_ids(tokenizer, cell.persona_text, cell.task_text)
    reference = plain_greedy(plain, prompt, N_EVAL + 2, end=2)
    assert reference[said] not in reference[:said]
    end = reference[said]  # this token now ends a text
    monkeypatch.setattr(model._module.generation_config, "eos_token_id", end)
    for cells in ([small_grid.cells[1], cell], [cell]):
        with pytest.warns(UserWarning, match=rf"before 12 tokens.* {cell.label} \({said + 1}\)"):
            measured = localized_positions.measure(
                model, cells, layers=list(range(5)), positions=POSITIONS
            )
        row = measured["n_eval"][cells.index(cell)].tolist()
        assert row == [said + 1] * 3 + [said, max(said - 1, 0)]
        for index, each in enumerate(cells):
            assert_cell_equals(measured, index, plain_cell(plain, tokenizer, each, end))
