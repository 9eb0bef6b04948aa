"""Left padding: where tokens stand, what is masked, and which positions the model is told."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_nns.tracing.batches import left_pad


def test_rows_are_padded_on_the_left_to_the_longest() -> None:
    batch = left_pad([[5, 6, 7], [8], [9, 10]])
    assert batch.input_ids.tolist() == [[5, 6, 7], [0, 0, 8], [0, 9, 10]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 0, 0], [0, 0, 1]]
    assert batch.padding.tolist() == [0, 2, 1]


def test_everything_is_an_integer_tensor_on_the_device() -> None:
    batch = left_pad([(5, 6), (7,)], device=torch.device("cpu"))
    for tensor in (batch.input_ids, batch.attention_mask, batch.position_ids, batch.padding):
        assert tensor.dtype is torch.int64
        assert tensor.device.type == "cpu"


def test_what_a_model_is_given_is_ids_and_mask() -> None:
    batch = left_pad([[5, 6], [7]])
    assert set(batch.tokens) == {"input_ids", "attention_mask"}
    assert batch.tokens["input_ids"] is batch.input_ids
    assert batch.tokens["attention_mask"] is batch.attention_mask


_ROWS = st.lists(st.lists(st.integers(0, 1023), min_size=1, max_size=9), min_size=1, max_size=6)


@settings(max_examples=100)
@given(rows=_ROWS)
def test_token_i_of_a_row_stands_in_column_padding_plus_i(rows: list[list[int]]) -> None:
    batch = left_pad(rows)
    width = max(map(len, rows))
    assert batch.input_ids.shape == (len(rows), width)
    for row, ids in enumerate(rows):
        padding = int(batch.padding[row])
        assert padding == width - len(ids)
        assert batch.input_ids[row, padding:].tolist() == ids
        assert batch.position_ids[row, padding:].tolist() == list(range(len(ids)))
        assert batch.attention_mask[row].tolist() == [0] * padding + [1] * len(ids)
