"""Attention knockout against plain transformers.

The oracle shares nothing with the library: it runs each row by itself, unpadded and without a
cache, finds the persona's tokens in the text, and puts −inf into the scores where the softmax is
called.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from nnsight import TransformersModel, save
from random_models import GOLDEN, architectures, crossed
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from persona_nns.declarations.bands import band_labels, band_layers
from persona_nns.declarations.catalog import load_experiment
from persona_nns.prompts.frames import load_frame
from persona_nns.prompts.grids import Cell, Grid, load_grid
from persona_nns.prompts.render import Prompt, render_cell
from persona_nns.tracing.batches import left_pad
from persona_nns.tracing.knockout import BLOCKED, block_keys, blocked_queries, persona_keys
from persona_nns.tracing.prefixes import prefill

pytestmark = pytest.mark.filterwarnings("ignore:The grid has no markers")
N_TOKENS = 7  # of the continuations
LABELS = band_labels(5)
architecture = architectures("qwen2", "gemma3", "gpt2", "gpt_neox")


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    return sys.modules[load_experiment("attention_knockout").measure.__module__]


@pytest.fixture(scope="module")
def model(random_model: Callable[[str], TransformersModel], architecture: str) -> TransformersModel:
    return random_model(architecture)


def text_of(tokenizer: Any, persona: str, task: str) -> str:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": f"As {persona}, {task}"}],
        tokenize=False,
        add_generation_prompt=True,
    )


def tokens_in(tokenizer: Any, text: str, start: int, stop: int) -> list[int]:
    """Tokens whose first character that is no space lies in text[start:stop]."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    places = []
    for index, (left, right) in enumerate(offsets["offset_mapping"]):
        first = next((k for k in range(left, right) if not text[k].isspace()), right)
        if start <= first < stop:
            places.append(index)
    return places


@contextmanager
def knocked_out(queries: set[int], keys: list[int], layers: range) -> Iterator[None]:
    """−inf in the scores of these queries and keys, wherever the softmax of a layer is called."""
    softmax, calls = torch.nn.functional.softmax, [0]

    def blocked(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if calls[0] in layers:
            scores = scores.clone()
            for query in queries:
                if query < scores.shape[-2]:
                    scores[:, :, query, keys] = -math.inf
        calls[0] += 1
        return softmax(scores, *args, **kwargs)

    torch.nn.functional.softmax = blocked
    try:
        yield
    finally:
        torch.nn.functional.softmax = softmax


@dataclass(frozen=True)
class PlainCell:
    kl: Tensor  # [blocked, band]
    kl_host: Tensor
    kl_clean_host: float
    kl_host_clean: float
    n_eval: int
    text: list[str]


def summed(p: Tensor, q: Tensor) -> float:
    return float((p.exp() * (p - q)).sum())


def plain_cell(
    plain: Any, tokenizer: Any, cell: Cell, labels: list[str], end: int = 2, n_eval: int = 10
) -> PlainCell:
    def logits(ids: list[int]) -> Tensor:
        return plain(torch.tensor([ids]), use_cache=False).logits[0]

    def greedy(ids: list[int], count: int) -> list[int]:
        said: list[int] = []
        while len(said) < count and end not in said:
            said.append(int(logits([*ids, *said])[-1].argmax()))
        return said

    def scores(ids: list[int], said: list[int]) -> Tensor:
        return logits([*ids, *said[:-1]])[-len(said) :].double().log_softmax(-1)

    n_layers = plain.config.num_hidden_layers
    text = text_of(tokenizer, cell.persona_text, cell.task_text)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    other = text_of(tokenizer, cell.baseline_persona_text, cell.task_text)
    host_ids = tokenizer(other, add_special_tokens=False)["input_ids"]
    start = text.index(cell.persona_text)
    stop = start + len(cell.persona_text)
    persona = tokens_in(tokenizer, text, start, stop)
    task = set(tokens_in(tokenizer, text, stop, stop + len(f", {cell.task_text}")))
    last = set(range(len(ids) - 1, len(ids) + 100))
    later = set(range(persona[-1] + 1, len(ids) + 100))
    queries = {"last": last, "task": task, "task+last": task | last, "later": later}

    said = greedy(ids, n_eval)
    clean, host = scores(ids, said), scores(host_ids, said)
    kl, kl_host = torch.empty(4, len(labels)), torch.empty(4, len(labels))
    texts = []
    for b, blocked in enumerate(("last", "task", "task+last", "later")):
        for k, label in enumerate(labels):
            with knocked_out(queries[blocked], persona, band_layers(label, n_layers)):
                moved = scores(ids, said)
            kl[b, k], kl_host[b, k] = summed(clean, moved), summed(host, moved)
        follows: list[int] = []
        while len(follows) < N_TOKENS and end not in follows:
            with knocked_out(queries[blocked], persona, range(n_layers)):
                follows.append(int(logits([*ids, *follows])[-1].argmax()))
        texts.append(tokenizer.decode(follows, skip_special_tokens=True))
    both = summed(clean, host), summed(host, clean)
    return PlainCell(kl, kl_host, *both, len(said), texts)


def assert_equal(measured: dict[str, Any], row: int, expected: PlainCell, bands: list[int]) -> None:
    for name in ("kl", "kl_host"):
        torch.testing.assert_close(
            measured[name][row][:, bands], getattr(expected, name), atol=2e-5, rtol=1e-4
        )
    for name in ("kl_clean_host", "kl_host_clean"):
        value = getattr(expected, name)
        assert float(measured[name][row]) == pytest.approx(value, rel=1e-4, abs=2e-5)
    assert int(measured["n_eval"][row]) == expected.n_eval
    assert measured["text"][row] == expected.text


@pytest.fixture(scope="module")
def batched(experiment: ModuleType, model: TransformersModel, small_grid: Grid) -> dict[str, Any]:
    return experiment.measure(model, list(small_grid.cells), n_tokens=N_TOKENS)


def test_the_labels_are_those_of_the_protocol() -> None:
    assert [
        *("all", "0", "1", "2", "3", "4"),
        *("0:2", "0:3", "0:4"),
        "1:5",
        "2:5",
        "3:5",
    ] == LABELS
    assert [list(band_layers(label, 5)) for label in ("all", "4", "0:2", "3:5")] == [
        [0, 1, 2, 3, 4],
        [4],
        [0, 1],
        [3, 4],
    ]
    assert band_labels(2) == ["all", "0", "1"]
    assert band_labels(1) == ["all", "0"]


def test_it_equals_a_knockout_in_the_softmax_of_plain_transformers(
    batched: dict[str, Any],
    plain_model: Callable[[str], PreTrainedModel],
    architecture: str,
    tokenizer: Any,
    small_grid: Grid,
) -> None:
    labels = ["all", "0", "3", "0:3", "2:5"]
    bands = [LABELS.index(label) for label in labels]
    for row in (0, 3):
        expected = plain_cell(plain_model(architecture), tokenizer, small_grid.cells[row], labels)
        assert float(expected.kl[3, 0]) > 1e-3
        assert_equal(batched, row, expected, bands)


@pytest.mark.parametrize("name", crossed("gemma2", among=("qwen2", "gemma2")))
def test_every_label_equals_plain_transformers_on_a_trained_model(
    golden_model: Callable[[str], TransformersModel], experiment: ModuleType, name: str
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(
        GOLDEN / name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model, cells = golden_model(name), load_grid("review").select_cells("lawyer/plan,engineer/arch")
    measured = experiment.measure(model, list(cells), n_tokens=N_TOKENS)
    labels = band_labels(len(model.layers))
    assert measured["kl"].shape == (2, 4, len(labels))
    with torch.no_grad():
        for row, cell in enumerate(cells):
            end = model._module.generation_config.eos_token_id
            expected = plain_cell(plain, model.tokenizer, cell, labels, end)
            assert_equal(measured, row, expected, list(range(len(labels))))


def test_a_batch_equals_one_cell_at_a_time(
    batched: dict[str, Any], experiment: ModuleType, model: TransformersModel, small_grid: Grid
) -> None:
    for row in (1, 2):
        single = experiment.measure(model, [small_grid.cells[row]], n_tokens=N_TOKENS)
        for name, values in single.items():
            if name == "text":
                assert values == [batched[name][row]]
            else:
                torch.testing.assert_close(values[0], batched[name][row], atol=1e-5, rtol=1e-4)


def test_reuse_gives_the_numbers_of_the_plain_protocol(
    batched: dict[str, Any], experiment: ModuleType, model: TransformersModel, small_grid: Grid
) -> None:
    plain = experiment.measure(model, list(small_grid.cells), n_tokens=N_TOKENS, reuse=False)
    assert plain.pop("text") == batched["text"]
    for name, values in plain.items():
        torch.testing.assert_close(values, batched[name], atol=1e-5, rtol=1e-4)


def test_conditions_one_at_a_time_equal_many_in_a_pass(
    batched: dict[str, Any],
    experiment: ModuleType,
    model: TransformersModel,
    small_grid: Grid,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("persona_nns.tracing.knockout._BYTES_OF_A_PASS", 1)
    alone = experiment.measure(model, list(small_grid.cells), n_tokens=1)
    for name in ("kl", "kl_host"):
        torch.testing.assert_close(alone[name], batched[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("blocked", BLOCKED)
def test_blocked_weights_are_zero_and_the_others_sum_to_one(
    model: TransformersModel, small_grid: Grid, blocked: Any
) -> None:
    prompts = [render_cell(model.tokenizer, cell)["XY"] for cell in small_grid.cells]
    batch = left_pad([prompt.ids for prompt in prompts])
    width = batch.input_ids.shape[1]
    keys = persona_keys(prompts, batch.padding, width)
    queries = blocked_queries(prompts, blocked, batch.padding, width)
    assert (queries & keys).sum() == 0
    for row, prompt in enumerate(prompts):  # the columns are those of the persona's tokens
        place = keys[row].nonzero().flatten() - batch.padding[row]
        assert place.tolist() == list(prompt.spans["persona"])
    with model.trace(batch.tokens, position_ids=batch.position_ids, use_cache=False):
        weights = save([])
        for layer in range(5):
            attention = model.layers[layer].attn
            block_keys(attention, queries, keys)
            weights.append(attention.output[1])
    pairs = (queries[:, :, None] & keys[:, None, :])[:, None]
    real = batch.attention_mask.bool()[:, None]
    for weight in weights:
        assert weight.shape == (4, 4, width, width)
        assert float((weight * pairs).abs().max()) == 0.0
        total = weight.sum(-1)
        torch.testing.assert_close(torch.where(real, total, 1.0), torch.ones_like(total))


def test_blocking_nothing_changes_nothing(model: TransformersModel, small_grid: Grid) -> None:
    batch = left_pad([render_cell(model.tokenizer, cell)["XY"].ids for cell in small_grid.cells])
    with model.trace(batch.tokens, position_ids=batch.position_ids, use_cache=False):
        clean = save(model.output.logits)
    every, none = (
        torch.ones(batch.input_ids.shape).bool(),
        torch.zeros(batch.input_ids.shape).bool(),
    )
    for queries, keys in ((every, none), (none, every)):
        with model.trace(batch.tokens, position_ids=batch.position_ids, use_cache=False):
            for layer in range(5):
                attention = model.layers[layer].attn
                block_keys(attention, queries, keys)
            logits = save(model.output.logits)
        assert torch.equal(logits, clean)


def kl_without_persona(model: TransformersModel, prompt: Prompt) -> float:
    """KL of the rest of the prompt on a cache without the persona's columns, at its own places."""
    persona = prompt.spans["persona"]
    said: list[int] = []
    clean: list[Tensor] = []
    while len(said) < 10:
        ids = torch.tensor([[*prompt.ids, *said]])
        with model.trace({"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
            last = save(model.output.logits[0, -1])
        clean.append(last.log_softmax(-1))
        said.append(int(last.argmax()))
    prefix = prefill(model, [prompt.ids[: persona.stop]])
    assert prefix is not None
    mask = torch.ones(1, len(prompt) + 9).long()
    mask[:, list(persona)] = 0  # a key that is masked for all is a key that is not there
    rest = torch.tensor([[*prompt.ids[persona.stop :], *said[:-1]]])
    with model.trace(
        {"input_ids": rest, "attention_mask": mask},
        position_ids=torch.arange(persona.stop, len(prompt) + 9)[None],
        past_key_values=prefix.cache(),
        use_cache=True,
    ):
        without = save(model.output.logits[0, -10:].log_softmax(-1))
    return summed(torch.stack(clean), without)


def test_blocking_all_later_queries_everywhere_deletes_the_persona_from_the_cache(
    batched: dict[str, Any], model: TransformersModel, small_grid: Grid
) -> None:
    for row, cell in enumerate(small_grid.cells):
        expected = kl_without_persona(model, render_cell(model.tokenizer, cell)["XY"])
        measured = float(batched["kl"][row, BLOCKED.index("later"), 0])
        assert measured == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("frame", ["system", "later"])
def test_so_it_does_in_other_frames(
    experiment: ModuleType, model: TransformersModel, small_grid: Grid, frame: str
) -> None:
    cells = list(small_grid.put_in(load_frame(frame)).cells)
    kl = experiment.measure(model, cells, bands="all", n_tokens=1)["kl"]
    for row, cell in enumerate(cells):
        prompt = render_cell(model.tokenizer, cell)["XY"]
        persona = prompt.ids[prompt.spans["persona"].start : prompt.spans["persona"].stop]
        assert model.tokenizer.decode(list(persona)).strip() == cell.persona_text
        measured = float(kl[row, BLOCKED.index("later"), 0])
        assert measured == pytest.approx(kl_without_persona(model, prompt), rel=1e-4, abs=1e-5)
        assert measured > 1e-4


def test_single_layers_and_bands_that_are_one_thing_have_one_label(
    batched: dict[str, Any],
) -> None:
    """A layer blocks something of its own: no two bands give the same numbers by accident."""
    later = batched["kl"][:, BLOCKED.index("later")]
    assert float(later[:, 0].min()) > 1e-3
    assert not torch.allclose(later[:, LABELS.index("0:2")], later[:, LABELS.index("0")])
    assert not torch.allclose(later[:, LABELS.index("1:5")], later[:, 0])


@pytest.mark.parametrize("said", [0, 3])
def test_a_continuation_that_ends_early_is_scored_up_to_its_end(
    random_model: Callable[[str], TransformersModel],
    plain_model: Callable[[str], PreTrainedModel],
    experiment: ModuleType,
    tokenizer: Any,
    small_grid: Grid,
    monkeypatch: pytest.MonkeyPatch,
    said: int,
) -> None:
    model, plain, cell = random_model("llama"), plain_model("llama"), small_grid.cells[2]
    ids = tokenizer(text_of(tokenizer, cell.persona_text, cell.task_text))["input_ids"]
    follows: list[int] = []
    while len(follows) <= said:
        follows.append(int(plain(torch.tensor([[*ids, *follows]])).logits[0, -1].argmax()))
    assert follows[said] not in follows[:said]
    end = follows[said]  # this token now ends a text
    monkeypatch.setattr(model._module.generation_config, "eos_token_id", end)
    for cells in ([small_grid.cells[1], cell], [cell]):
        with pytest.warns(UserWarning, match=rf"{cell.label} \({said + 1}\)"):
            measured = experiment.measure(model, cells, n_tokens=N_TOKENS)
        for row, each in enumerate(cells):
            expected = plain_cell(plain, tokenizer, each, ["all", "1:5"], end)
            assert_equal(measured, row, expected, [0, LABELS.index("1:5")])


def test_a_task_longer_than_another_prompt_needs_no_special_care(
    random_model: Callable[[str], TransformersModel],
    plain_model: Callable[[str], PreTrainedModel],
    experiment: ModuleType,
    tokenizer: Any,
    small_grid: Grid,
) -> None:
    """The window of the long row is wider than the short row is long: nothing can be reused."""
    tasks = {**small_grid.tasks, "policy": small_grid.tasks["policy"] * 3, "haiku": "Sing."}
    cells = list(replace(small_grid, tasks=tasks).cells)
    measured = experiment.measure(random_model("gemma2"), cells, n_tokens=N_TOKENS, n_eval=4)
    for row, cell in enumerate(cells):
        expected = plain_cell(plain_model("gemma2"), tokenizer, cell, ["all", "3"], n_eval=4)
        assert_equal(measured, row, expected, [0, LABELS.index("3")])
