"""The reference continuation: how long it is, and which of its tokens a position is scored on."""

import warnings

import pytest
import torch

from persona_nns.tracing.continuations import Continuation, read_continuation

END = 2


def read(*rows: list[int], n_tokens: int, n_prompt: int = 3, ends: tuple[int, ...] = (END,)):
    prompt = [END, 7, END]  # end tokens inside the prompt do not count
    generated = torch.tensor([[*prompt[:n_prompt], *row] for row in rows])
    return read_continuation(generated, n_prompt, n_tokens, ends)


def test_a_continuation_without_an_end_is_as_long_as_asked_for() -> None:
    reference = read([10, 11, 12, 13], [20, 21, 22, 23], n_tokens=4)
    assert reference.ids.tolist() == [[10, 11, 12, 13], [20, 21, 22, 23]]
    assert reference.length.tolist() == [4, 4]


def test_a_continuation_ends_with_its_first_end_token_included() -> None:
    reference = read([10, END, 0, END, 0], [20, 21, 22, 23, END], n_tokens=5)
    assert reference.length.tolist() == [2, 5]


def test_a_first_token_that_ends_the_text_leaves_one_token() -> None:
    reference = read([END, 0, 0], [20, 21, 22], n_tokens=3)
    assert reference.length.tolist() == [1, 3]
    assert reference.scored("p_last", 3).tolist() == [[True, False, False], [True] * 3]
    assert reference.scored("g1", 2).tolist() == [[False, False], [True, True]]
    assert reference.reaches("g1").tolist() == [True, True]
    assert reference.reaches("g2").tolist() == [False, True]


def test_a_batch_in_which_every_row_ended_early_is_filled_up() -> None:
    # generate stops as soon as every row has ended: two columns instead of six.
    reference = read([10, END], [END, 0], n_tokens=6)
    assert reference.ids.tolist() == [[10, END, 0, 0, 0, 0], [END, 0, 0, 0, 0, 0]]
    assert reference.length.tolist() == [2, 1]
    assert reference.scored("p_last", 6).sum(1).tolist() == [2, 1]


@pytest.mark.parametrize("end", [0, END])
def test_what_fills_a_row_up_is_never_taken_for_an_end(end: int) -> None:
    # Token 0 fills up; where it is an end token too, only a token that was said ends the text.
    reference = read([10, 11], n_tokens=5, ends=(end,))
    assert reference.ids.tolist() == [[10, 11, 0, 0, 0]]
    assert reference.length.tolist() == [2]


def test_a_model_without_end_tokens_never_ends() -> None:
    reference = read([10, END, 0], n_tokens=3, ends=())
    assert reference.length.tolist() == [3]


def test_its_first_tokens_are_those_of_a_shorter_continuation() -> None:
    rows = [10, 11, END, 0, 0], [10, 11, 12, 13, 14], [END, 0, 0, 0, 0]
    long, short = read(*rows, n_tokens=5), read(*rows, n_tokens=3)
    first = long.first(3)
    assert first.ids.tolist() == short.ids.tolist()
    assert first.length.tolist() == short.length.tolist() == [3, 3, 1]


def test_any_of_several_end_tokens_ends_the_text() -> None:
    reference = read([10, 9, 0, 0], [10, 11, END, 0], [8, 9, END, 5], n_tokens=4, ends=(END, 9))
    assert reference.length.tolist() == [2, 3, 2]


def test_more_generated_tokens_than_asked_for_are_cut() -> None:
    reference = read([10, 11, 12, END, 14], n_tokens=3)
    assert reference.ids.tolist() == [[10, 11, 12]]
    assert reference.length.tolist() == [3]


def test_the_window_of_a_prompt_position_is_tokens_one_to_n() -> None:
    reference = Continuation(ids=torch.zeros(3, 12), length=torch.tensor([12, 10, 4]))
    for position in ("p_user_last", "p_last", "p_last-2"):
        counts = reference.scored(position, 10).sum(1)
        assert counts.tolist() == [10, 10, 4]
    assert reference.scored("p_last", 10)[2].tolist() == [True] * 4 + [False] * 6


def test_the_window_of_a_generated_position_is_the_tokens_after_it() -> None:
    reference = Continuation(ids=torch.zeros(4, 12), length=torch.tensor([12, 11, 4, 1]))
    assert reference.scored("g1", 10).sum(1).tolist() == [10, 10, 3, 0]
    assert reference.scored("g2", 10).sum(1).tolist() == [10, 9, 2, 0]
    assert reference.scored("g4", 8).sum(1).tolist() == [8, 7, 0, 0]
    assert reference.scored("g2", 10)[2].tolist() == [True, True] + [False] * 8


def test_a_generated_position_exists_up_to_the_end_token() -> None:
    reference = Continuation(ids=torch.zeros(3, 12), length=torch.tensor([12, 2, 1]))
    assert reference.reaches("p_last").tolist() == [True, True, True]
    assert reference.reaches("g1").tolist() == [True, True, True]
    assert reference.reaches("g2").tolist() == [True, True, False]
    assert reference.reaches("g3").tolist() == [True, False, False]


def test_cells_whose_continuation_ends_early_are_named_with_their_length() -> None:
    reference = Continuation(ids=torch.zeros(3, 12), length=torch.tensor([12, 11, 3]))
    with pytest.warns(UserWarning, match=r"end before 12 tokens .*: b/y \(11\), c/z \(3\)\.$"):
        reference.warn_if_short(["a/x", "b/y", "c/z"], 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reference.warn_if_short(["a/x", "b/y", "c/z"], 3)
