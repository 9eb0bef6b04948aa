"""Sites: which layers and positions a request names, and reading and overwriting them."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_nns.declarations.sites import (
    generated_index,
    parse_layer_sets,
    parse_layers,
    parse_positions,
)
from persona_nns.errors import UsageError
from persona_nns.prompts.positions import position_index
from persona_nns.prompts.render import Prompt
from persona_nns.tracing.residuals import substitute, take


def prompt_of(length: int, user_last: int | None) -> Prompt:
    empty = range(length, length)
    spans = {"prefix": range(length), "persona": empty, "task": empty, "tail": empty}
    return Prompt(text="x" * length, ids=(1,) * length, spans=spans, user_last=user_last)  # type: ignore[arg-type]


def test_all_layers_are_the_blocks_and_not_the_final_norm() -> None:
    assert parse_layers("all", 6) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ("3", [3]),
        ("14,6,10", [6, 10, 14]),
        (" 6 , 10,6 ", [6, 10]),
        ("0,25", [0, 25]),
        ([14, 6], [6, 14]),
        ((0,), [0]),
        ("0.5", [13]),
        (".5,1", [1, 13]),
        ("0.25,0.25", [6]),
    ],
)
def test_layers_are_numbers_or_depths_in_ascending_order(
    spec: str | list[int], layers: list[int]
) -> None:
    assert parse_layers(spec, 26) == layers


@pytest.mark.parametrize(
    ("n_layers", "layers"),
    [(26, [6, 10, 14, 18, 22]), (28, [7, 11, 15, 20, 24]), (36, [9, 14, 20, 25, 31])],
    ids=["gemma-2-2b", "qwen-2.5-1.5b", "qwen-2.5-3b"],
)
def test_the_five_depths_are_the_layers_of_the_paper(n_layers: int, layers: list[int]) -> None:
    assert parse_layers("0.25,0.40,0.55,0.70,0.85", n_layers) == layers


@pytest.mark.parametrize("spec", ["6", "-1", "99", [6], [0, -2]])
def test_a_layer_out_of_range_names_the_range(spec: str | list[int]) -> None:
    with pytest.raises(UsageError, match=r"is out of range: the model has layers 0 to 5\.$"):
        parse_layers(spec, 6)


@pytest.mark.parametrize("spec", ["", "x", "1;2", "1,,2", "1.5", "0.", "2-4", "1e0", "ALL"])
def test_what_is_not_a_layer_is_named(spec: str) -> None:
    with pytest.raises(UsageError, match="is not a layer; use 'all', numbers such as"):
        parse_layers(spec, 6)


def test_no_layer_at_all_is_refused() -> None:
    with pytest.raises(UsageError, match="No layer was asked for"):
        parse_layers([], 6)


@pytest.mark.parametrize("depth", ["0.95", "0.99", ".999"])
def test_a_depth_that_rounds_to_the_final_norm_is_not_a_layer_to_overwrite(depth: str) -> None:
    try:
        layers = parse_layers(depth, 6)
    except UsageError:
        return
    assert layers == [5]


def test_positions_keep_their_order() -> None:
    spec = "g2, p_last ,p_user_last,p_last-3,g10"
    names = ["g2", "p_last", "p_user_last", "p_last-3", "g10"]
    assert parse_positions(spec) == names
    assert parse_positions(names) == names


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("p_last-2:p_last", ["p_last-2", "p_last-1", "p_last"]),
        ("g1:g3", ["g1", "g2", "g3"]),
        ("p_last-1:g2", ["p_last-1", "p_last", "g1", "g2"]),
        ("p_last:p_last", ["p_last"]),
        (
            " g2 : g3 , p_user_last,p_last-4:p_last-3",
            ["g2", "g3", "p_user_last", "p_last-4", "p_last-3"],
        ),
        (["p_last", "g9:g11"], ["p_last", "g9", "g10", "g11"]),
    ],
)
def test_a_range_is_the_positions_in_it(spec: str | list[str], names: list[str]) -> None:
    assert parse_positions(spec) == names
    assert parse_positions(names) == names


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("p_last:p_last-2", "The range 'p_last:p_last-2' runs backwards; put the earlier"),
        ("g3:g1", "runs backwards"),
        ("p_last-2:p_user_last", "has p_user_last at an end, which is elsewhere in each template"),
        ("p_last-2:", "Unknown position ''; use"),
        ("p_last-2:3", "Unknown position '3'; use"),
        ("g1:g2:g3", "Unknown position 'g2:g3'; use"),
        ("g2,g1:g3", "The position 'g2' is given twice"),
    ],
)
def test_a_wrong_range_is_one_sentence(spec: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        parse_positions(spec)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    "name",
    ["", "last", "g0", "g", "g01", "g-1", "p_last-0", "p_last-", "p_last+1", "P_LAST", "g1 g2"],
)
def test_an_unknown_position_is_named(name: str) -> None:
    with pytest.raises(UsageError, match=rf"Unknown position '{name.replace('+', '[+]')}'; use"):
        parse_positions(["p_last", name])


def test_a_position_given_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="'g1' is given twice"):
        parse_positions("g1,p_last,g1")


def test_generated_positions_count_from_one() -> None:
    names = ["p_user_last", "p_last", "p_last-4", "g1", "g12"]
    assert [generated_index(name) for name in names] == [0, 0, 0, 1, 12]


def test_positions_index_the_prompt_followed_by_its_continuation() -> None:
    prompt = prompt_of(20, user_last=16)
    names = ["p_user_last", "p_last", "p_last-1", "p_last-19", "g1", "g2", "g11"]
    assert [position_index(prompt, name) for name in names] == [16, 19, 18, 0, 20, 21, 30]


def test_a_position_before_the_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match="A prompt of 20 tokens has no position 'p_last-20'"):
        position_index(prompt_of(20, 16), "p_last-20")


def test_p_user_last_is_refused_where_the_template_leaves_it_undefined() -> None:
    with pytest.raises(UsageError, match="p_user_last is not defined; use p_last or p_last-1"):
        position_index(prompt_of(20, None), "p_user_last")


_SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 5), st.integers(1, 6))


@settings(max_examples=50)
@given(shape=_SHAPES, seed=st.integers(0, 1000))
def test_take_reads_each_row_at_its_own_positions(
    shape: tuple[int, int, int, int], seed: int
) -> None:
    rows, columns, width, positions = shape
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, columns, width, generator=generator)
    index = torch.randint(columns, (rows, positions), generator=generator)
    taken = take(hidden, index)
    assert taken.shape == (rows, positions, width)
    for row in range(rows):
        for position in range(positions):
            assert torch.equal(taken[row, position], hidden[row, int(index[row, position])])


def test_what_take_reads_is_a_copy() -> None:
    hidden = torch.zeros(1, 3, 2)
    taken = take(hidden, torch.tensor([[1]]))
    hidden += 1
    assert taken.tolist() == [[[0.0, 0.0]]]


@settings(max_examples=50)
@given(shape=_SHAPES, seed=st.integers(0, 1000))
def test_substitute_changes_one_position_of_each_row_and_not_its_argument(
    shape: tuple[int, int, int, int], seed: int
) -> None:
    rows, columns, width, _ = shape
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, columns, width, generator=generator)
    before = hidden.clone()
    index = torch.randint(columns, (rows,), generator=generator)
    value = torch.randn(rows, width, generator=generator)
    changed = substitute(hidden, index, value)
    assert torch.equal(hidden, before)
    for row in range(rows):
        for column in range(columns):
            expected = value[row] if column == int(index[row]) else before[row, column]
            assert torch.equal(changed[row, column], expected)


def test_substitute_takes_the_precision_of_the_residual_stream() -> None:
    hidden = torch.zeros(1, 2, 3, dtype=torch.bfloat16)
    changed = substitute(hidden, torch.tensor([1]), torch.full((1, 3), 1.00001))
    assert changed.dtype is torch.bfloat16
    assert changed.tolist() == [[[0.0] * 3, [1.0] * 3]]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("3;2,3,4", [[3], [2, 3, 4]]),
        ("0.5; 4,1", [[4], [1, 4]]),
        ("all", [list(range(8))]),
        (6, [[6]]),
        ([[6], [7, 5]], [[6], [5, 7]]),
    ],
)
def test_layer_sets(spec: Any, expected: list[list[int]]) -> None:
    assert parse_layer_sets(spec, 8) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "No layer set was asked for"),
        ("3;9", "Layer 9 is out of range"),
        ("3,4;4,3", "The layer set 3,4 is given twice"),
        ("3;x", "'x' is not a layer"),
    ],
)
def test_wrong_layer_sets(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_layer_sets(spec, 8)
