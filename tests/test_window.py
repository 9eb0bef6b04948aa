"""Prefix reuse: the same numbers as the plain protocol, and little more than the least work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from nnsight import TransformersModel, save
from random_models import architectures

from persona_nns.declarations.sites import parse_layers
from persona_nns.prompts.grids import Cell, Grid, load_grid
from persona_nns.prompts.render import ROLE_PROMPTS, render_cell
from persona_nns.tracing.clean_run import force, run_clean
from persona_nns.tracing.continuations import say
from persona_nns.tracing.prefixes import prefill, prefill_rows
from persona_nns.tracing.window import open_window

POSITIONS = ["p_last", "g1", "g2"]
N_EVAL = 10
architecture = architectures("qwen2", "gemma3", "gpt2")


@contextmanager
def counted_work(model: TransformersModel) -> Iterator[list[int]]:
    """Tokens (padding included) that each block really runs, summed over blocks."""
    work = [0]

    def count(_module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = named["hidden_states"] if "hidden_states" in named else arguments[0]
        work[0] += hidden.shape[0] * hidden.shape[1]

    blocks = [layer.attn._module for layer in model.layers]
    handles = [block.register_forward_pre_hook(count, with_kwargs=True) for block in blocks]
    try:
        yield work
    finally:
        for handle in handles:
            handle.remove()


def least_work(model: TransformersModel, cells: list[Cell], layers: list[int]) -> int:
    """Token-layers that the protocol cannot do without.

    Every beginning of a prompt once, however many prompts begin so, the reference as it is said,
    the tokens that the other three prompts are forced on, and for each intervention (three at a
    site: the prediction, and two that change sizes) ten tokens from its layer up.
    """
    n_layers = len(model.layers)
    prompts = [render_cell(model.tokenizer, cell) for cell in cells]
    rows = {prompt[name].ids for prompt in prompts for name in ROLE_PROMPTS}
    beginnings = {row[:stop] for row in rows for stop in range(1, len(row) + 1)}
    n_forced = 2
    said = len(cells) * (n_forced + N_EVAL - 1)
    forced = 3 * len(cells) * n_forced
    interventions = 3 * len(POSITIONS) * sum(N_EVAL * (n_layers - layer) for layer in layers)
    return (len(beginnings) + said + forced) * n_layers + len(cells) * interventions


@pytest.mark.parametrize("layers", ["3", "0.25,0.40,0.55,0.70,0.85", "all"])
@pytest.mark.parametrize("grid", ["short", "long"])
def test_token_layers_are_close_to_the_least_the_protocol_needs(
    golden_model: Callable[[str], TransformersModel],
    localized_positions: ModuleType,
    grid: str,
    layers: str,
) -> None:
    model, cells = golden_model("qwen2"), list(load_grid(grid).cells)
    asked = parse_layers(layers, 6)
    with counted_work(model) as work:
        localized_positions.measure(model, cells, layers=asked, positions=POSITIONS)
    assert work[0] <= 1.2 * least_work(model, cells, asked)


@pytest.mark.parametrize("layer_sets", [[[3]], [[3], [1, 2, 3, 4], [0, 5]]])
def test_host_injection_is_close_to_the_least_it_needs(
    golden_model: Callable[[str], TransformersModel],
    host_injection: ModuleType,
    layer_sets: list[list[int]],
) -> None:
    """Beginnings of prompts once; four prompts forced or read at three sites; two interventions a
    set from its lowest layer up; texts of the long persona, of the hosts, and under injections."""
    model, cells, n_tokens = golden_model("qwen2"), list(load_grid("review").cells), 20
    prompts = [render_cell(model.tokenizer, cell) for cell in cells]
    rows = {prompt[name].ids for prompt in prompts for name in ROLE_PROMPTS}
    beginnings = {row[:stop] for row in rows for stop in range(1, len(row) + 1)}
    hosts = {prompt["BY"].ids for prompt in prompts}
    n_cells = len(cells)
    read = n_cells * (2 * N_EVAL + 2 * 3)
    said = (n_cells + len(hosts) + 4 * n_cells) * n_tokens
    interventions = sum(2 * N_EVAL * (6 - layers[0]) for layers in layer_sets) * n_cells
    least = (len(beginnings) + read + said) * 6 + interventions
    with counted_work(model) as work:
        host_injection.measure(model, cells, layer_sets=layer_sets, n_tokens=n_tokens)
    assert work[0] <= 1.2 * least


def test_the_plain_protocol_works_much_harder(
    golden_model: Callable[[str], TransformersModel], localized_positions: ModuleType
) -> None:
    model, cells = golden_model("qwen2"), list(load_grid("short").cells)
    asked = list(range(6))
    with counted_work(model) as work:
        localized_positions.measure(model, cells, layers=asked, positions=POSITIONS, reuse=False)
    assert work[0] > 3 * least_work(model, cells, asked)


@pytest.mark.parametrize("position", ["p_last", "g2", "p_user_last", "p_last-4"])
def test_reuse_gives_the_numbers_of_the_plain_protocol(
    architecture: str,
    random_model: Callable[[str], TransformersModel],
    localized_positions: ModuleType,
    small_grid: Grid,
    position: str,
) -> None:
    settings: dict[str, Any] = {"layers": list(range(5)), "positions": [position]}
    model, cells = random_model(architecture), list(small_grid.cells)
    reused = localized_positions.measure(model, cells, **settings)
    plain = localized_positions.measure(model, cells, **settings, reuse=False)
    assert float(plain["kl"].max()) > 2e-4  # there is something to agree on
    torch.testing.assert_close(reused["kl"], plain["kl"], rtol=1e-3, atol=1e-5)
    assert torch.equal(reused["n_eval"], plain["n_eval"])
    # Two blocks with a sliding window of 16 do not see the persona: below layer 3 its effect can
    # be rounding alone, which has no direction.
    for name in ("cos_additive", "cos_persona_task", "interaction_ratio"):
        torch.testing.assert_close(reused[name][:, 3:], plain[name][:, 3:], rtol=1e-3, atol=1e-4)


def test_bfloat16_agrees_within_its_rounding(
    random_folder: Callable[[str], Any], localized_positions: ModuleType, small_grid: Grid
) -> None:
    """Batches of other shapes round differently; in bfloat16 (8 bits) that shows in the KL."""
    from persona_nns.models.load import load_model

    model, cells = load_model(random_folder("qwen2"), dtype="bfloat16"), list(small_grid.cells)
    settings: dict[str, Any] = {"layers": [1, 3], "positions": ["p_last"], "n_eval": 1}
    reused = localized_positions.measure(model, cells, **settings)["kl"]
    plain = localized_positions.measure(model, cells, **settings, reuse=False)["kl"]
    torch.testing.assert_close(reused, plain, rtol=0.1, atol=0.02)


def test_equal_prefixes_are_run_once_and_every_row_gets_its_own(
    golden_model: Callable[[str], TransformersModel],
) -> None:
    model = golden_model("qwen2")
    rows = [list(range(10, 20)), list(range(40, 45)), list(range(10, 20)), list(range(70, 100))]
    with counted_work(model) as work:
        prefix = prefill(model, rows)
    assert prefix is not None
    assert work[0] == (10 + 5 + 30) * 6  # too different in length to be padded to each other
    assert prefix.attention_mask.sum(1).tolist() == [10, 5, 10, 30]
    window = open_window([[*row, 7, 8] for row in rows], torch.tensor([[9]] * 4), prefix)
    with model.trace(window.inputs()):
        together = save(model.output.logits)
    for index, row in enumerate(rows):
        alone = torch.tensor([[*row, 7, 8, 9]])
        with model.trace({"input_ids": alone, "attention_mask": torch.ones_like(alone)}):
            expected = save(model.output.logits)
        torch.testing.assert_close(together[index], expected[0, -3:], rtol=1e-4, atol=1e-5)


def test_a_window_can_be_run_again(golden_model: Callable[[str], TransformersModel]) -> None:
    """Caches grow with every pass that is given one; a window gives each pass its own."""
    model = golden_model("gemma2")
    window = open_window([[5, 6, 7, 8]], torch.tensor([[9, 10]]), prefill(model, [[5, 6, 7]]))
    passes = []
    for _ in range(2):
        with model.trace(window.inputs()):
            passes.append(save(model.output.logits))
    assert torch.equal(*passes)


def test_without_a_prefix_the_window_is_the_whole_rows(
    golden_model: Callable[[str], TransformersModel],
) -> None:
    model = golden_model("qwen2")
    assert prefill(model, [[1, 2], [3]], reuse=False) is None
    assert prefill(model, [[1, 2], []]) is None
    window = open_window([[1, 2], [3]], torch.tensor([[4], [5]]), None)
    assert window.input_ids.tolist() == [[1, 2, 4], [0, 3, 5]]
    assert window.column(torch.tensor([0, 0])).tolist() == [0, 1]


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
@pytest.mark.parametrize("reuse", [True, False])
def test_what_is_said_and_then_forced_is_the_run_in_which_it_was_said(
    random_model: Callable[[str], TransformersModel], small_grid: Grid, name: str, reuse: bool
) -> None:
    model = random_model(name)
    rows = [render_cell(model.tokenizer, cell)["XY"].ids for cell in small_grid.cells]
    prompts = prefill_rows(model, rows, 3, reuse=reuse)
    said, run = run_clean(model, prompts, 6)
    assert torch.equal(said.ids, say(model, prompts, 6).ids)
    assert torch.equal(said.ids[:, 0], run.logits[:, 0].argmax(-1))
    forced = force(model, prompts, said.ids[:, :-1])
    assert forced.n_prompt == run.n_prompt
    assert forced.p_last.tolist() == [len(row) - 1 for row in rows]
    torch.testing.assert_close(forced.logits, run.logits, rtol=1e-4, atol=1e-4)
    is_token = run.window.attention_mask[:, run.window.start :, None] > 0
    ours, theirs = (torch.where(is_token, r, 0.0) for r in (forced.residual, run.residual[:-1]))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (forced.cache is None) == (run.cache is None) == (not reuse)
    some = force(model, prompts.some([2, 0, 2]), said.ids[[2, 0, 2], :-1])
    torch.testing.assert_close(some.logits, run.logits[[2, 0, 2]], rtol=1e-4, atol=1e-4)
