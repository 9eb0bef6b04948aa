"""Figures of conversations, and answers in them that are judged."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import xarray as xr

from persona_nns.figures import answers_by_turn, drift_curves, memory_by_turn
from persona_nns.figures.drawing import draw
from persona_nns.traits import JudgeOptions, judge_talks, judging, load_traits
from persona_nns.traits.judges import Answer, Scores

CONDITIONS = ["none", "steered", "clean_kv", "dirty_kv", "system"]
N_TALKS, N_TURNS = 6, 5


def results(experiment: str, own: dict[str, Any], **coords: Any) -> xr.Dataset:
    labels = {
        "model": ["m"],
        "conversation": [f"t{k}" for k in range(N_TALKS)],
        "turn": list(range(N_TURNS)),
        **coords,
    }
    done = (("model", "conversation"), np.ones((1, N_TALKS), dtype=bool))
    ds = xr.Dataset({**own, "completed": done}, labels, {"experiment": experiment, "grid": "talks"})
    return ds.assign_coords(n_layers=("model", [4]))


def drifting(rng: np.random.Generator) -> xr.Dataset:
    values = rng.normal(size=(1, N_TALKS, N_TURNS, 5, 1))
    speakers = np.array(["system", *["user", "assistant"] * 2], dtype=object)
    dims = ("model", "conversation", "turn")
    own = {
        "projection": ((*dims, "layer", "direction"), values),
        "speaker": (dims, np.broadcast_to(speakers, (1, N_TALKS, N_TURNS))),
    }
    return results("persona_drift", own, layer=list(range(5)), direction=["axis"])


def lines_of(axis: Any) -> dict[str, Any]:
    return {
        line.get_label(): line.get_xydata() for line in axis.lines if line.get_label()[0] != "_"
    }


def test_drift_is_drawn_by_speaker_at_three_depths_or_by_domain() -> None:
    ds = drifting(np.random.default_rng(0))
    figure = drift_curves(ds)
    assert [axis.get_title() for axis in figure.axes] == [f"m · layer {k}" for k in (1, 2, 3)]
    for axis, layer in zip(figure.axes, (1, 2, 3), strict=True):
        medians = ds.projection[0, :, :, layer, 0].median("conversation").values
        drawn = lines_of(axis)
        assert set(drawn) == {"system", "user", "assistant"}
        np.testing.assert_allclose(drawn["user"], [[1, medians[1]], [3, medians[3]]])
        np.testing.assert_allclose(drawn["assistant"], [[2, medians[2]], [4, medians[4]]])
    domains = ["coding", "therapy"] * 3
    figure = drift_curves(ds.assign_coords(domain=("conversation", domains)))
    drawn = lines_of(figure.axes[0])
    assert set(drawn) == {"coding", "therapy"}
    own = ds.projection[0, ::2, [2, 4], 1, 0].median("conversation").values
    np.testing.assert_allclose(drawn["coding"], np.stack([[2, 4], own], axis=1))


def test_memory_is_drawn_a_token_and_by_condition() -> None:
    rng = np.random.default_rng(1)
    dims = ("model", "conversation", "turn", "condition", "alpha")
    shape = (1, N_TALKS, N_TURNS, 5, 2)
    answered = np.isin(np.arange(N_TURNS), [2, 4])[:, None, None]
    own: dict[str, Any] = {
        name: (dims, np.where(answered, rng.normal(size=shape), np.nan)) for name in ("logp", "kl")
    }
    own["n_tokens"] = (("model", "conversation", "turn", "alpha"), np.full((1, 6, 5, 2), 4.0))
    given = results("steering_memory", own, condition=CONDITIONS, alpha=[0.0, 2.0])
    figure = memory_by_turn(given)
    top = figure.axes[0]
    assert top.get_title() == "m · α = 2"
    drawn = lines_of(top)
    assert set(drawn) == set(CONDITIONS)
    medians = given.logp.sel(condition="clean_kv", alpha=2)[0].median("conversation").values / 4
    np.testing.assert_allclose(drawn["clean_kv"], [[2, medians[2]], [4, medians[4]]])
    assert answers_by_turn(given) is None
    assert set(draw(given, "steering_memory")) == {"by_turn"}
    judged = given.assign(score=given.logp, coherence=given.kl)
    assert set(draw(judged, "steering_memory")) == {"by_turn", "answers"}


class Counting:
    """A judge that counts letters: of the question for the trait, of the answer for coherence."""

    def scores(self, _trait: Any, given: Sequence[Answer]) -> Scores:
        counts = [[len(each.question) for each in given], [len(each.answer) for each in given]]
        return Scores(*(tuple(map(float, each)) for each in counts))


def test_answers_are_judged_to_what_was_said_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "open_judge", lambda _: Counting())
    texts = np.full((2, 4, 1, 2), "", dtype=object)
    texts[0, 1], texts[0, 3], texts[1, 1] = "Rest.", "Walk now.", "Sit."
    asked = [["What?", "And then, what?"], ["Why not?"]]
    judged = judge_talks(load_traits("terse", "evaluation")[0], asked, texts, JudgeOptions())
    for name, counts in (("score", (5, 15, 8)), ("coherence", (5, 9, 4))):
        expected = np.full(texts.shape, np.nan)
        expected[0, 1], expected[0, 3], expected[1, 1] = counts
        np.testing.assert_array_equal(judged[name], expected)
