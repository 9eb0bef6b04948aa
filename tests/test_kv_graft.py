"""Grafts against plain transformers (`plain_grafts`), and what is stored of them."""

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from nnsight import TransformersModel
from plain_grafts import Oracle, cut
from random_models import crossed
from transformers import PreTrainedModel

import persona_nns as pn
from persona_nns.declarations.catalog import load_experiment
from persona_nns.errors import PersonaError, UsageError
from persona_nns.figures.drawing import draw
from persona_nns.figures.tables import result_table
from persona_nns.prompts.frames import load_frame
from persona_nns.prompts.grids import Cell, Grid
from persona_nns.prompts.render import render_cell
from persona_nns.tracing import spans_before_last, warn_about_prefixes

pytestmark = pytest.mark.filterwarnings("ignore:The grid has no markers")

EIGHT = ("none", "persona", "task", "tail", "persona+task", "persona+tail", "task+tail", "all")
N_LAYERS = 5
BANDS = {
    **{str(k): range(k, k + 1) for k in range(5)},
    **{f"0:{k}": range(k) for k in (2, 3, 4)},
    **{f"{k}:5": range(k, 5) for k in (1, 2, 3)},
}


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    return sys.modules[load_experiment("kv_graft").measure.__module__]


def odd(grid: Grid) -> list[Cell]:
    """Two cells: a persona longer than the baseline's, and one that is shorter."""
    odd = replace(grid, personas={**grid.personas, "you": "you"})
    return list(odd.select_cells("chef/haiku,you/policy"))


def close(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-3, atol=1e-5)


ROTARY = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "olmo2", "gpt_neox")


@pytest.mark.parametrize("name", crossed("qwen2", "gemma3", "gpt_neox", among=ROTARY))
def test_every_graft_and_band_equals_plain_transformers(
    random_model: Callable[[str], TransformersModel],
    plain_model: Callable[[str], PreTrainedModel],
    experiment: ModuleType,
    small_grid: Grid,
    name: str,
) -> None:
    model, cells = random_model(name), odd(small_grid)
    result = experiment.measure(model, cells, n_tokens=1)
    kl, labels = result["kl"], experiment.LABELS
    assert labels[:8] == EIGHT
    oracles = [Oracle(plain_model(name), model.tokenizer, cell) for cell in cells]
    lengths = [[len(o.spans[p]["persona"]) for p in ("XY", "BY")] for o in oracles]
    assert lengths[0][0] > lengths[0][1]
    assert lengths[1][0] < lengths[1][1]
    for c, oracle in enumerate(oracles):
        expected = [oracle.graft(label) for label in EIGHT]
        close(kl[c, :8, 0], expected)
        assert min(expected[:6]) > 1e-4
        assert len({round(value, 6) for value in expected[:7]}) > 3
        close(kl[c, 0, 0], oracle.kl(oracle.uncached("BY")))
        assert float(kl[c, 7, 0]) < 1e-6
        close(kl[c, 8, 0], oracle.graft("persona", cached="XB"))
        close(kl[c, 9, 0], oracle.additive())
        close(kl[c, 1, 1:], [oracle.band(band) for band in BANDS.values()])
    assert kl[:, [k for k in range(10) if k != 1], 1:].isnan().all()
    sources = experiment.read_sources(model, cells)
    reference = experiment.read_reference(model, cells, sources, 10)
    ends = [range(0), range(len(model.layers))]
    for reuse in (True, False):
        bands = experiment.score_in_bands(model, sources, reference, ends, reuse=reuse)
        torch.testing.assert_close(bands, kl[:, :2, 0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result["closure"][:, :, 0], 1 - kl[:, :, 0] / kl[:, :1, 0])


@pytest.mark.parametrize("frame", ["system", "later"])
@pytest.mark.parametrize("name", crossed("qwen2", "gemma3"))
def test_a_whole_graft_is_the_clean_run_in_other_frames(
    random_model: Callable[[str], TransformersModel],
    plain_model: Callable[[str], PreTrainedModel],
    experiment: ModuleType,
    small_grid: Grid,
    name: str,
    frame: str,
) -> None:
    model, grid = random_model(name), small_grid.put_in(load_frame(frame))
    kl = experiment.measure(model, list(grid.cells), n_tokens=1, grafts="none,all")["kl"][:, :, 0]
    assert float(kl[:, 1].max()) < 1e-6
    for c, cell in enumerate(grid.cells):
        oracle = Oracle(plain_model(name), model.tokenizer, cell)
        messages = [
            {"role": message.role, "content": message.content}
            for message in grid.frame.fill(cell.persona_text, cell.task_text)
        ]
        text = model.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert list(oracle.prompts["XY"].ids) == ids
        close(kl[c, 0], oracle.kl(oracle.uncached("BY")))
        assert float(kl[c, 0]) > 1e-4


@pytest.mark.parametrize(
    "name", crossed("qwen2", "gemma3", among=("qwen2", "gemma2", "gemma3", "gpt_neox"))
)
def test_a_batch_gives_the_numbers_of_single_cells_and_reuse_those_of_none(
    random_model: Callable[[str], TransformersModel],
    experiment: ModuleType,
    small_grid: Grid,
    name: str,
) -> None:
    model, cells = random_model(name), list(small_grid.cells)
    together = experiment.measure(model, cells, n_tokens=4)
    single = [experiment.measure(model, [cell], n_tokens=4) for cell in cells]
    plain = experiment.measure(model, cells, n_tokens=4, reuse=False)
    for name in ("kl", "cache_bytes", "n_eval", "distinct_markers", "any_marker"):
        alone = torch.cat([result[name] for result in single])
        for other in (alone, plain[name]):
            torch.testing.assert_close(together[name], other, rtol=1e-3, atol=1e-5, equal_nan=True)
    assert together["text"] == [result["text"][0] for result in single] == plain["text"]


def test_a_token_across_prefix_and_persona_is_said(
    random_model: Callable[[str], TransformersModel], small_grid: Grid
) -> None:
    model = random_model("qwen2")
    cells = list(small_grid.cells)[:1]
    prompts = [render_cell(model.tokenizer, cell) for cell in cells]
    spans = [{name: spans_before_last(p[name]) for name in p} for p in prompts]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_about_prefixes(cells, prompts, spans)
    host = prompts[0]["BY"]
    joined = replace(host, ids=(host.ids[0] + 1, *host.ids[1:]))
    with pytest.warns(UserWarning, match=f"In {cells[0].label} the tokens before the persona"):
        warn_about_prefixes(cells, [{**prompts[0], "BY": joined}], spans)


def test_learned_positions_allow_only_what_does_not_move(
    random_model: Callable[[str], TransformersModel],
    plain_model: Callable[[str], PreTrainedModel],
    experiment: ModuleType,
    small_grid: Grid,
) -> None:
    model, cells = random_model("gpt2"), odd(small_grid)
    with pytest.raises(PersonaError, match=r"gpt2 model cannot be moved.* --grafts none,all"):
        experiment.measure(model, cells, n_tokens=1)
    result = experiment.measure(model, cells, n_tokens=1, grafts="none,all")
    assert float(result["kl"][:, 1, 0].max()) < 1e-6
    for c, cell in enumerate(cells):
        oracle = Oracle(plain_model("gpt2"), model.tokenizer, cell)
        close(result["kl"][c, 0, 0], oracle.graft("none"))
    # A persona as long as the baseline's moves nothing.
    (cell,) = small_grid.select_cells("yoda/haiku")
    oracle = Oracle(plain_model("gpt2"), model.tokenizer, cell)
    assert len(oracle.spans["BY"]["persona"]) == len(oracle.spans["XY"]["persona"])
    grafts = ",".join(EIGHT)
    kl = experiment.measure(model, [cell], n_tokens=1, grafts=grafts)["kl"]
    close(kl[0, :, 0], [oracle.graft(label) for label in EIGHT])
    close(kl[0, 1, 1:], [oracle.band(band) for band in BANDS.values()])


def test_bytes_are_those_of_the_grafted_tokens(
    random_model: Callable[[str], TransformersModel], experiment: ModuleType, small_grid: Grid
) -> None:
    model, cells = random_model("gemma2"), odd(small_grid)
    sizes = experiment.measure(model, cells, n_tokens=1)["cache_bytes"]
    token = 2 * 2 * 8 * 4  # key and value, 2 heads of 8 numbers of 4 bytes
    for c, cell in enumerate(cells):
        spans = {name: cut(p) for name, p in render_cell(model.tokenizer, cell).items()}
        n = {name: len(tokens) for name, tokens in spans["XY"].items()}
        persona, rest = n["persona"], n["task"] + n["tail"]
        whole = [0, persona, n["task"], n["tail"], persona + n["task"], persona + n["tail"]]
        whole += [rest, persona + rest, persona]
        aligned = min(len(spans["BB"]["task"]), n["task"]) + n["tail"]
        assert (sizes[c, :, 0] / (5 * token)).tolist() == [*whole, aligned]
        assert (sizes[c, 1, 1:] / token).tolist() == [persona * len(b) for b in BANDS.values()]
    assert (sizes[:, 2:, 1:] == -1).all()


def test_the_continuation_of_a_whole_graft_is_the_clean_one(
    golden_model: Callable[[str], TransformersModel], experiment: ModuleType
) -> None:
    model, cells = golden_model("gemma2"), list(pn.load_grid("review").cells[:4])
    result = experiment.measure(model, cells, n_tokens=20)
    labels = list(experiment.LABELS)
    for c, cell in enumerate(cells):
        prompts = render_cell(model.tokenizer, cell)
        for label, prompt in (("all", prompts["XY"]), ("none", prompts["BY"])):
            ids = torch.tensor([prompt.ids])
            said = model._module.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False
            )
            words = model.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
            assert result["text"][c][labels.index(label)] == words
        assert [bool(text) for text in result["text"][c]] == [
            label in ("none", "persona", "all") for label in labels
        ]
    assert (result["distinct_markers"] >= 0).sum(1).tolist() == [3] * 4


def test_a_continuation_that_ends_early_is_scored_up_to_its_end(
    random_folder: Callable[[str], Path], experiment: ModuleType, small_grid: Grid
) -> None:
    model = pn.load_model(random_folder("qwen2"))
    cells = odd(small_grid)
    oracle = Oracle(model._module, model.tokenizer, cells[0])
    model._module.generation_config.eos_token_id = oracle.said[3]
    stop = oracle.said.index(oracle.said[3]) + 1
    with pytest.warns(UserWarning, match="end before 10 tokens"):
        result = experiment.measure(model, cells[:1], n_tokens=5, grafts="none,persona")
    assert result["n_eval"].tolist() == [stop]
    distribution = oracle.uncached("BY")
    per_token = (oracle.clean.exp() * (oracle.clean - distribution)).sum(-1)
    close(result["kl"][0, 0, 0], per_token[:stop].sum())


def test_results_are_labelled(
    tmp_path: Path, random_model: Callable[[str], TransformersModel], small_grid: Grid
) -> None:
    model, store = random_model("qwen2"), tmp_path / "s.zarr"
    ds = pn.run("kv_graft", model, small_grid, store=store, n_tokens=2, grafts="persona, all")
    assert ds.kl.dims == ("model", "cell", "graft", "layer_band")
    assert ds.graft.values.tolist() == ["none", "persona", "all"]
    assert ds.layer_band.values.tolist() == ["all", *BANDS]
    assert float(ds.kl.sel(graft="all", layer_band="all").max()) < 1e-6
    assert float(ds.closure.sel(graft="none", layer_band="all").max()) == 0
    assert set(draw(ds, "kv_graft")) == {"closure_heatmap", "closure_by_graft", "closure_by_band"}
    # A table of all grafts has a row for each pair that was measured.
    every = pn.run("kv_graft", model, small_grid, store=store, n_tokens=2)
    table = result_table(every, "closure")
    assert [str(column.header) for column in table.columns] == [
        "model",
        "graft",
        "layer band",
        "value",
    ]
    assert table.row_count == len(every.graft) + len(BANDS)
    with pytest.raises(UsageError, match="there is no graft personas; use none, persona, "):
        pn.run("kv_graft", model, small_grid, store=store, grafts="personas")


@pytest.mark.parametrize("name", crossed("gemma2", among=("qwen2", "gemma2")))
def test_no_graft_is_no_injection(
    golden_model: Callable[[str], TransformersModel], experiment: ModuleType, name: str
) -> None:
    model, cells = golden_model(name), list(pn.load_grid("review").cells[:6])
    injection = load_experiment("host_injection").measure(
        model, cells, layer_sets=[[2]], n_tokens=2
    )
    ours = experiment.measure(model, cells, n_tokens=2, grafts="none")["kl"][:, 0, 0]
    assert float(ours.min()) > 0.01
    torch.testing.assert_close(ours, injection["kl"][:, 0, 0], rtol=1e-4, atol=1e-5)
