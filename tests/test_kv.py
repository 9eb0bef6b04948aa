"""Caches as values: what goes in comes out, moved keys are those of the other position."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight import TransformersModel, save
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from persona_nns.errors import PersonaError
from persona_nns.models.load import load_model
from persona_nns.tracing.batches import left_pad
from persona_nns.tracing.knockout import block_keys
from persona_nns.tracing.kv.cache import KVCache, read_cache, running_cache, stack
from persona_nns.tracing.kv.rotation import read_rotation
from persona_nns.tracing.kv.splice import Piece, splice
from persona_nns.tracing.prefixes import fill_cache
from persona_nns.tracing.window import open_window

# Longer than the sliding window (16) of the architectures that have one.
LONG = [5 + (37 * k) % 1000 for k in range(27)]
LONGER = [9 + (53 * k) % 1000 for k in range(33)]
NEXT = [17, 400, 23]

SCALED = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0},
    "linear": {"factor": 3.0},
}
# Every way to turn a key that the supported architectures have.
ROTARY: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("qwen2", {}),
    **{
        kind: (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": kind,
                    "rope_theta": 10000.0,
                    "original_max_position_embeddings": 64,
                    **parameters,
                }
            },
        )
        for kind, parameters in SCALED.items()
    },
    "partial": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            }
        },
    ),
    "partial, GPT-NeoX": ("gpt_neox", {}),
    "Gemma3, sliding": ("gemma3", {}),
    "Gemma3, full": (
        "gemma3",
        {"layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"]},
    ),
}


@pytest.fixture(scope="module")
def model(random_model: Callable[[str], TransformersModel], architecture: str) -> TransformersModel:
    return random_model(architecture)


def logits_after(model: TransformersModel, rows: list[list[int]], cache: KVCache) -> torch.Tensor:
    """Logits [row, token, vocabulary] of the last prompt token and of `NEXT`, on a cache."""
    window = open_window(rows, torch.tensor([NEXT] * len(rows)), cache)
    with model.trace(window.inputs()):
        logits = save(model.output.logits)
    return logits  # noqa: RET504 - a traced block cannot return


def plain_logits(plain: PreTrainedModel, row: list[int]) -> torch.Tensor:
    ids = torch.tensor([[*row, *NEXT]])
    return plain(ids, use_cache=False).logits[0, -1 - len(NEXT) :]


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    p, q = torch.log_softmax(p, -1), torch.log_softmax(q, -1)
    return float((p.exp() * (p - q)).sum())


def test_cached_equals_uncached(
    model: TransformersModel,
    plain_model: Callable[[str], PreTrainedModel],
    architecture: str,
) -> None:
    rows = [LONG, LONGER, LONG[:19]]
    cache = fill_cache(model, [row[:-1] for row in rows])
    together = logits_after(model, rows, cache)
    for row, ids in enumerate(rows):
        expected = plain_logits(plain_model(architecture), ids)
        torch.testing.assert_close(together[row], expected, atol=1e-5, rtol=1e-5)


def test_splicing_a_row_from_its_own_spans_is_bit_for_bit_the_same(
    model: TransformersModel,
) -> None:
    rows = [LONG, LONGER]
    cache = fill_cache(model, [row[:-1] for row in rows])
    rotation = read_rotation(model, 40)
    pieces = [
        Piece(cache, [range(5), range(9)]),
        Piece(cache, [range(5, 5), range(9, 20)]),
        Piece(cache, [range(5, 26), range(20, 32)]),
    ]
    same = splice(pieces, rotation)
    assert torch.equal(same.attention_mask, cache.attention_mask)
    assert torch.equal(same.position_ids, cache.position_ids)
    held = cache.attention_mask[:, None, :, None] > 0
    for k in range(5):
        assert torch.equal(same.keys[k] * held, cache.keys[k] * held)
        assert torch.equal(same.values[k] * held, cache.values[k] * held)
    before, after = logits_after(model, rows, cache), logits_after(model, rows, same)
    assert abs(kl(before, after)) < 1e-9


@pytest.fixture(scope="module", params=ROTARY)
def turning(
    make_folder: Callable[..., Path], request: pytest.FixtureRequest
) -> tuple[TransformersModel, Any]:
    """A model that turns its keys in one of the ways, and the same in plain transformers."""
    architecture, changes = ROTARY[request.param]
    folder = make_folder(architecture, **changes)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return load_model(folder), plain


@pytest.mark.parametrize("distance", [-3, 1, 100])
def test_a_moved_key_is_the_key_computed_at_the_new_position(
    turning: tuple[TransformersModel, Any], distance: int
) -> None:
    model, plain = turning
    ids, position = torch.tensor([LONG]), torch.arange(len(LONG))[None] + 3

    def first_layer_keys(position: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return (
                plain(ids, position_ids=position, past_key_values=DynamicCache())
                .past_key_values.layers[0]
                .keys
            )

    here, there = first_layer_keys(position), first_layer_keys(position + distance)
    rotation = read_rotation(model, 100)
    moved = rotation.move(here, torch.full_like(position, distance), 0)
    torch.testing.assert_close(moved, there, atol=1e-5, rtol=0)
    assert float((here - there).abs().max()) > 1e-2
    assert torch.equal(rotation.move(here, torch.zeros_like(position), 0), here)
    back_and_forth = torch.zeros_like(position)
    back_and_forth[:, 3] = distance
    some = rotation.move(here, back_and_forth, 0)
    stays = [k for k in range(len(LONG)) if k != 3]
    assert torch.equal(some[:, :, stays], here[:, :, stays])
    torch.testing.assert_close(some[:, :, 3], there[:, :, 3], atol=1e-5, rtol=0)


def test_keys_move_in_bfloat16_within_its_rounding(make_folder: Callable[..., Path]) -> None:
    model = load_model(make_folder("qwen2", dtype=torch.bfloat16))
    assert read_rotation(model, 10).cos[0].dtype is torch.float32
    cache = fill_cache(model, [LONG])
    moved = splice([Piece(cache, [range(9, 27)])], read_rotation(model, 10))
    assert moved.dtype is torch.bfloat16
    again = splice([Piece(cache, [range(9)]), Piece(moved, [range(18)])], read_rotation(model, 10))
    torch.testing.assert_close(again.keys[0], cache.keys[0], atol=0.1, rtol=0.03)


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        ("gpt2", {}, "learned"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "'dynamic' is not one of default, linear, llama3, yarn",
        ),
        (
            "phi3",
            {
                "original_max_position_embeddings": 64,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 64,
                },
            },
            "'longrope' is not one of",
        ),
    ],
)
def test_keys_that_cannot_be_moved_are_refused(
    make_folder: Callable[..., Path], architecture: str, changes: dict[str, Any], reason: str
) -> None:
    model = load_model(make_folder(architecture, **changes))
    rotation = read_rotation(model, 40)
    cache = fill_cache(model, [LONG])
    stays = splice([Piece(cache, [range(5)]), Piece(cache, [range(5, 27)])], rotation)
    assert torch.equal(stays.keys[0], cache.keys[0])
    with pytest.raises(PersonaError, match=reason):
        splice([Piece(cache, [range(5, 27)])], rotation)


def test_a_model_that_turns_its_keys_otherwise_is_refused(
    make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose frequencies at one layer are not those of its rotary module."""
    model = load_model(make_folder("qwen2"))
    attention = model.layers[2].attn._module
    own = attention.forward

    def forward(*args: Any, position_embeddings: Any, **kwargs: Any) -> Any:
        cos, sin = position_embeddings
        return own(*args, position_embeddings=(cos, -sin), **kwargs)

    monkeypatch.setattr(attention, "forward", forward)
    with pytest.raises(PersonaError, match="keys of layer 2 of Qwen2ForCausalLM cannot be moved"):
        read_rotation(model, 10)


def test_too_far(random_model: Callable[[str], TransformersModel]) -> None:
    rotation = read_rotation(random_model("qwen2"), 60)
    with pytest.raises(PersonaError, match="moved by 61 positions: this rotation reaches 60"):
        rotation.move(torch.ones(1, 1, 1, 8), torch.tensor([[61]]), 0)


def test_overwriting_a_running_cache_gives_the_other_prompts_logits(
    model: TransformersModel,
) -> None:
    host, other = LONG[:24], LONGER[:24]
    mine, theirs = (fill_cache(model, [row[:-1]]) for row in (host, other))
    row = [*host[:-1], other[-1]]
    window = open_window([row], torch.tensor([NEXT]), mine)
    with model.trace(window.inputs()):
        theirs.write_into(running_cache(model))
        logits = save(model.output.logits)
    assert kl(logits_after(model, [other], theirs), logits) < 1e-9
    assert kl(logits_after(model, [row], mine), logits) > 1e-4
    with model.trace(window.inputs()):
        mine.write_into(running_cache(model))
        logits = save(model.output.logits)
    assert torch.equal(logits_after(model, [row], mine), logits)


def test_a_pass_changes_no_cache_that_it_was_given(
    random_model: Callable[[str], TransformersModel],
) -> None:
    model = random_model("gemma2")
    cache = fill_cache(model, [LONG[:-1]])
    before = [keys.clone() for keys in cache.keys]
    first, second = (logits_after(model, [LONG], cache) for _ in range(2))
    assert torch.equal(first, second)
    for keys, same in zip(cache.keys, before, strict=True):
        assert torch.equal(keys, same)


def test_a_cache_can_be_read_inside_a_trace(
    random_model: Callable[[str], TransformersModel],
) -> None:
    model = random_model("gemma2")
    batch = left_pad([LONG, LONGER])
    with model.trace(
        batch.tokens,
        position_ids=batch.position_ids,
        past_key_values=DynamicCache(),
        use_cache=True,
    ):
        cache = save(read_cache(model.output.past_key_values, batch.attention_mask))
    filled = fill_cache(model, [LONG, LONGER])
    torch.testing.assert_close(cache.keys[4][1], filled.keys[4][1], atol=1e-5, rtol=1e-5)
    assert torch.equal(cache.position_ids, batch.position_ids)
    assert cache.token_bytes == 2 * 2 * 8 * 4
    assert cache.padding.tolist() == [6, 0]


@pytest.mark.parametrize("architecture_", ["gemma2", "gemma3", "mistral"])
def test_a_cache_that_has_forgotten_columns_is_refused(
    random_model: Callable[[str], TransformersModel], architecture_: str
) -> None:
    model = random_model(architecture_)
    batch = left_pad([LONG])
    with model.trace(
        batch.tokens, past_key_values=DynamicCache(config=model.config), use_cache=True
    ):
        cache = save(model.output.past_key_values)
    with pytest.raises(PersonaError, match="Layer 0 holds 15 of 27 columns: its sliding window"):
        read_cache(cache, batch.attention_mask)


def test_stacked_rows_are_padded_on_the_left(
    random_model: Callable[[str], TransformersModel],
) -> None:
    model = random_model("mistral")
    rows = [LONG, LONGER, LONG[:19]]
    one_by_one = stack([fill_cache(model, [row[:-1]]) for row in rows])
    torch.testing.assert_close(
        logits_after(model, rows, one_by_one),
        logits_after(model, rows, fill_cache(model, [row[:-1] for row in rows])),
        atol=1e-5,
        rtol=1e-5,
    )
    assert one_by_one.padding.tolist() == [6, 0, 14]


def test_caches_that_do_not_belong_together_are_refused(
    random_model: Callable[[str], TransformersModel], make_folder: Callable[..., Path]
) -> None:
    model = random_model("qwen2")
    cache = fill_cache(model, [LONG])
    half = fill_cache(load_model(make_folder("qwen2", dtype=torch.bfloat16)), [LONG])
    heads = fill_cache(random_model("gpt_neox"), [LONG])
    shallow = fill_cache(load_model(make_folder("qwen2", num_hidden_layers=3)), [LONG])
    rotation = read_rotation(model, 40)
    for other in (half, heads, shallow, fill_cache(model, [LONG, LONGER])):
        pieces = [Piece(cache, [range(5)]), Piece(other, [range(5, 9)])]
        with pytest.raises(PersonaError, match="do not mix"):
            splice(pieces, rotation)
        with pytest.raises(PersonaError, match="do not mix"):
            cache.only_in(range(1), other)
    for other in (half, heads, shallow):
        with pytest.raises(PersonaError, match="do not mix"):
            stack([cache, other])
        with pytest.raises(PersonaError, match="cannot overwrite"):
            other.write_into(cache.cache())
    with pytest.raises(PersonaError, match="27 and 26 columns do not mix"):
        cache.only_in(range(1), cache.until(26))
    with pytest.raises(PersonaError, match="same positions"):
        cache.plus(cache, splice([Piece(cache, [range(20)])], rotation))


def test_spans_that_do_not_exist_are_refused(
    random_model: Callable[[str], TransformersModel],
) -> None:
    cache = fill_cache(random_model("qwen2"), [LONG, LONGER])
    rotation = read_rotation(random_model("qwen2"), 40)
    with pytest.raises(PersonaError, match="Row 0 has no span of tokens 20 to 29"):
        splice([Piece(cache, [range(20, 30), range(20, 30)])], rotation)
    with pytest.raises(PersonaError, match="no span of tokens -2 to 2"):
        splice([Piece(cache, [range(-2, 3), range(3)])], rotation)
    with pytest.raises(PersonaError, match="span of 5 tokens does not fit a slot of 4"):
        splice([Piece(cache, [range(5), range(3)], slots=[4, 4])], rotation)
    with pytest.raises(PersonaError, match="no column 34: the cache has 33"):
        cache.until(34)
    with (
        pytest.raises(PersonaError, match="runs without a cache"),
        random_model("qwen2").trace(left_pad([LONG]).tokens, use_cache=False),
    ):
        running_cache(random_model("qwen2"))


def test_hidden_columns_get_no_attention(random_model: Callable[[str], TransformersModel]) -> None:
    model = random_model("gemma2")
    cache = fill_cache(model, [LONG[:-1], LONGER[:-1]])
    window = open_window([LONG, LONGER], torch.tensor([NEXT] * 2), cache)
    columns = torch.zeros(2, cache.width, dtype=torch.bool)
    columns[0, 20:23] = columns[1, 30] = True
    with model.trace(window.inputs()):
        attention = model.layers[1].attn
        block_keys(attention, None, columns)
        hidden = save(model.layers[1].attn.output[1])
        other = save(model.layers[3].attn.output[1])
    rest = torch.nn.functional.pad(columns, (0, 4))
    for row in range(2):
        assert float(hidden[row][..., rest[row]].abs().max()) == 0
        assert float(other[row][..., rest[row]].min()) > 0
    torch.testing.assert_close(hidden.sum(-1), torch.ones_like(hidden[..., 0]))


def test_a_slot_holds_its_span_at_the_end(
    random_model: Callable[[str], TransformersModel],
) -> None:
    model = random_model("llama")
    cache = fill_cache(model, [LONG, LONGER])
    wide = splice(
        [
            Piece(cache, [range(3)] * 2),
            Piece(cache, [range(3, 6), range(3, 8)], slots=[5, 5]),
            Piece(cache, [range(6, 8), range(8, 10)]),
        ],
        read_rotation(model, 10),
    )
    assert wide.attention_mask.tolist() == [[1, 1, 1, 0, 0, 1, 1, 1, 1, 1], [1] * 10]
    assert wide.position_ids.tolist() == [list(range(10))] * 2
    assert torch.equal(wide.values[2][0, :, 5:], cache.values[2][0, :, 9:14])
    narrow = fill_cache(model, [LONG[:10], LONGER[:10]])
    both = wide.only_in(range(1, 3), narrow)
    assert torch.equal(both.keys[1], wide.keys[1])
    assert torch.equal(both.keys[0], narrow.keys[0])
    assert both.attention_mask.tolist() == [[1] * 10] * 2
