"""From system prompts to weights, on a bundled model: the whole of it in under ten minutes."""

import time
from pathlib import Path

import pytest

import persona_nns as pn
from persona_nns.figures.drawing import draw, save_figure
from persona_nns.models.load import load_model
from persona_nns.organism.trait_questions import QUESTIONS

MODEL, TRAIT = "organism-gemma2", "sycophantic"
STUDENTS = ("r8", "full")


@pytest.mark.slow
def test_a_trait_is_extracted_steered_with_and_distilled(tmp_path: Path) -> None:
    started = time.monotonic()
    store = str(tmp_path / "traits.zarr")
    model = load_model(MODEL)
    ask = {"trait": TRAIT, "store": store, "max_new_tokens": 64, "progress": False}

    pn.run("trait_vectors", model, **ask)
    asked = pn.open_results(store, "trait_responses").score.mean(("question", "pair", "sample"))
    separation = float((asked.sel(label="pos") - asked.sel(label="neg")).squeeze())
    assert separation >= 50

    sweep = pn.run(
        "trait_steering",
        model,
        vector=store,
        alphas="0,1.5,2,3",
        position_sets="prompt",
        top_p=0.95,
        **ask,
    )
    mean = sweep[["score", "coherence"]].mean(("question", "sample")).squeeze()
    gain = (mean.score - mean.score.sel(alpha=0)).where(mean.coherence >= 85)
    assert float(gain.max()) >= 50
    best = gain.stack(site=("layer", "alpha")).idxmax("site").item()

    found = pn.run(
        "trait_distillation",
        model,
        vector=store,
        layer=int(best[0]),
        alpha=float(best[1]),
        position_set="prompt",
        students=",".join(STUDENTS),
        trajectories="50,200",
        n_samples=3,
        steps=50,
        rows=8,
        accumulation=1,
        lora_learning_rate=2e-3,
        full_learning_rate=5e-4,
        output=str(tmp_path / "students"),
        **ask,
    )
    ds = found.isel(model=0, trait=0)
    score, coherence = (ds[name].mean(("question", "sample")) for name in ("score", "coherence"))
    steered = float(score.sel(condition="steered"))
    assert steered - float(score.sel(condition="baseline")) >= 50
    assert float(coherence.sel(condition="steered")) >= 70
    for student in STUDENTS:
        label = f"{student}/200"
        assert float(score.sel(condition=label)) >= 0.8 * steered
        assert float(ds.kl.sel(condition=label)) <= 0.2 * float(ds.kl.sel(condition="baseline"))
        assert bool(ds.token_kl.sel(condition=label).notnull().any("token").all())
    assert ds.question_text.values.tolist() == list(QUESTIONS[TRAIT, "evaluation"])
    figures = draw(found, "trait_distillation")
    assert save_figure(figures["curves"], tmp_path / "curves.png")
    folder = next((tmp_path / "students").glob("*/r8-200-*"))
    assert load_model(folder).layers[0] is not None
    assert time.monotonic() - started < 600
