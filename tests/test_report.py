"""A report: the numbers and texts in its file are the store's, and the file can do no harm."""

import base64
import hashlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import zarr
from nnsight import TransformersModel
from report_stores import HOSTILE, Page, prompt_of, write_grid_run
from store_writer import write_all
from typer.testing import CliRunner

import persona_nns as pn
from persona_nns.cli.commands import app
from persona_nns.errors import UsageError
from persona_nns.prompts.grids import Grid
from persona_nns.report import write_report
from persona_nns.report.page import default_file
from persona_nns.results.reading import list_runs, open_results
from persona_nns.results.shown_prompts import read_shown

PERSONAS, TASKS = ["chef", "yoda"], ["haiku", "policy", "plan"]


def test_the_numbers_are_those_of_the_results(tmp_path: Path) -> None:
    write_grid_run(tmp_path / "s.zarr", PERSONAS, TASKS, missing=[1, 4])
    written = write_report(tmp_path / "s.zarr")
    assert written.file == tmp_path / "s.report.html"
    assert written.size == written.file.stat().st_size
    page, results = Page(written.file), open_results(tmp_path / "s.zarr", "behavioral_markers")
    (run,), body = page.index["runs"], page.body()
    assert (run["completed"], run["of"], run["model"]) == (4, 6, "tiny")
    assert {"kl", "any_marker"} == {of["name"] for of in body["numbers"]}
    for name in ("kl", "any_marker"):
        expected = results[name].values[0].astype(float)
        assert np.isnan(expected[[1, 4]]).all()
        np.testing.assert_array_equal(page.values(body, name), expected)
    np.testing.assert_array_equal(page.values(body, "text"), results["text"].values[0])
    kl = body["numbers"][0]
    assert (kl["units"], kl["long_name"], kl["description"]) == ("nat", "causal KL", "of the test")
    assert (kl["measured"], kl["size"]) == (4 * 12, 6 * 12)
    assert body["dims"]["layer"] == results.layer.values.tolist()
    assert body["along"]["persona"] == results.persona.values.tolist()
    assert any("Not complete: 4 of 6 cells" in said for said in run["warnings"])
    assert any("without markers, whose words say nothing: yoda." in w for w in run["warnings"])
    prompts = body["prompts"]
    assert prompts["source"] == "stored"
    block = page.json(prompts["blobs"][0])
    shown = prompt_of("yoda", "policy")
    place = prompts["labels"].index("yoda/policy")
    assert block[place] == [shown.text, [*shown.ends], [*shown.stops], shown.user_last]


def test_many_cells_are_summarised_here_and_stand_in_blocks(tmp_path: Path) -> None:
    personas, tasks = [f"p{k}" for k in range(100)], [f"t{k}" for k in range(100)]
    layers = list(range(14))
    written = write_grid_run(
        tmp_path / "s.zarr", personas, tasks, layers=layers, missing=range(2500, 2600)
    )
    page = Page(write_report(tmp_path / "s.zarr").file)
    body = page.body()
    (kl,) = [of for of in body["numbers"] if of["name"] == "kl"]
    values = written["kl"].values[0]
    np.testing.assert_array_equal(page.values(body, "kl"), values)
    np.testing.assert_array_equal(page.values(body, "text"), written["text"].values[0])
    assert len(kl["blobs"]) > 3
    shape = (len(layers), 2)
    quartiles = page.numbers(kl["summaries"][""], "float64").reshape(4, 1, *shape)
    for place, share in enumerate((0.5, 0.25, 0.75)):
        expected = np.nanquantile(values.astype(float), share, axis=0)
        np.testing.assert_allclose(quartiles[place, 0], expected, rtol=1e-12)
    assert (quartiles[3] == 9900).all()
    of_persona = page.numbers(kl["summaries"]["persona"], "float64").reshape(4, 100, *shape)
    expected = np.median(values[300:400].astype(float), axis=0)
    np.testing.assert_allclose(of_persona[0, 3], expected, rtol=1e-12)
    assert np.isnan(of_persona[:3, 25]).all()
    assert not of_persona[3, 25].any()
    of_task = page.numbers(kl["summaries"]["task"], "float64").reshape(4, 100, *shape)
    expected = np.nanmedian(values[7::100].astype(float), axis=0)
    np.testing.assert_allclose(of_task[0, 7], expected, rtol=1e-12)
    assert len(body["prompts"]["labels"]) == 10000


def test_what_does_not_fit_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persona_nns.report.blobs.MOST", 10)
    monkeypatch.setattr("persona_nns.report.arrays._WHOLE", 100)
    write_grid_run(tmp_path / "s.zarr", PERSONAS, TASKS)
    shown = CliRunner().invoke(app, ["report", str(tmp_path / "s.zarr")])
    assert "Summaries alone, for want of room: tiny.g.1: kl." in shown.output.replace("\n", " ")
    page = Page(tmp_path / "s.report.html")
    assert page.body()["numbers"][0]["blobs"] is None
    assert page.index["runs"][0]["left_out"] == ["kl"]
    assert any("Too large for a page" in said for said in page.index["runs"][0]["warnings"])


def test_nothing_of_a_store_can_become_a_script(tmp_path: Path) -> None:
    write_grid_run(
        tmp_path / "s.zarr", [HOSTILE, "yoda"], TASKS, model=HOSTILE, note=HOSTILE, run="r"
    )
    text = write_report(tmp_path / "s.zarr").file.read_text()
    assert "window.hacked" in text  # in the index, as text
    assert "<script>window.hacked" not in text
    assert "<img" not in text
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 1
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy[1]
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "script-src 'unsafe-inline'" not in policy[1]
    assert "http" not in policy[1]


def test_a_run_that_kept_no_prompts_is_rendered_anew_where_its_tokenizer_is(
    random_model: Callable[[str], TransformersModel], small_grid: Grid, tmp_path: Path
) -> None:
    store = tmp_path / "s.zarr"
    model = random_model("qwen2")
    pn.run("localized_positions", model, small_grid, store=store, layers="1", positions="p_last")
    (info,) = list_runs(store)
    shown = read_shown(store, info.experiment, info.run)
    kept = Page(write_report(store).file)
    group = zarr.open_group(store, path=f"{info.experiment}/{info.run}", mode="a")
    del group["prompts"]
    anew = Page(write_report(store).file)
    assert kept.body()["prompts"]["source"] == "stored"
    assert anew.body()["prompts"]["source"] == "rendered"
    assert [page.json(page.body()["prompts"]["blobs"][0]) for page in (kept, anew)] == [
        [[p.text, [*p.ends], [*p.stops], p.user_last] for p in shown.values()]
    ] * 2
    group.update_attributes({"model_source": "not/here"})
    without = Page(write_report(store).file)
    assert without.body()["prompts"]["source"] == "texts"
    assert without.body()["prompts"]["personas"]["yoda"] == "Yoda"
    # Layers that were not asked for are absent, not missing.
    numbers = {of["name"]: of for of in kept.body()["numbers"]}
    assert 1 not in numbers["kl"]["absent"]["layer"]
    assert len(numbers["kl"]["absent"]["layer"]) == len(kept.body()["dims"]["layer"]) - 1
    assert "absent" not in numbers["cos_additive"]


def test_what_is_as_wide_as_a_model_is_drawn_as_lengths(tmp_path: Path) -> None:
    write_all(tmp_path / "s.zarr", 2, 2)
    group = zarr.open_group(tmp_path / "s.zarr", path="e/m.g.i", mode="a")
    wide = group.create_array(
        "wide", shape=(1, 2, 3), dtype="f4", dimension_names=["model", "cell", "d_model"]
    )
    wide[...] = np.arange(6).reshape(1, 2, 3)
    variables = cast("list[str]", group.attrs["variables"])
    group.update_attributes({"variables": [*variables, "wide"]})
    page = Page(write_report(tmp_path / "s.zarr").file)
    body = page.body()
    np.testing.assert_allclose(page.values(body, "wide"), [5**0.5, 50**0.5], rtol=1e-6)
    assert body["numbers"][-1]["wide"] is True


def test_the_command_says_what_it_wrote_and_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = str(tmp_path / "s.zarr")

    def call(*arguments: str) -> tuple[int, str]:
        answer = CliRunner().invoke(app, ["report", *arguments])
        return answer.exit_code, str(answer.exception or "") + answer.output

    assert "There is no Zarr store at" in call(store)[1]
    zarr.open_group(store, mode="w")
    assert call(store)[1] == f"The store {store!r} holds no runs."
    write_grid_run(Path(store), PERSONAS, TASKS)
    write_grid_run(Path(store), PERSONAS, TASKS, experiment="localized_positions")
    code, said = call(store, "-o", str(tmp_path / "out" / "r.html"))
    assert code == 0
    assert re.search(r"r\.html \(2\.\d MB, 2 runs\)", said.replace("\n", ""))
    one = call(store, "--experiment", "localized_positions")[1].replace("\n", "")
    assert "1 run)" in one
    assert [of["experiment"] for of in Page(tmp_path / "s.report.html").index["runs"]] == [
        "localized_positions"
    ]
    assert call(store, "--experiment", "kv_graft")[1] == (
        f"The store {store!r} holds no results of 'kv_graft'; it has behavioral_markers, "
        "localized_positions."
    )
    assert "cannot be written" in call(store, "-o", str(tmp_path / "s.zarr"))[1]
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    needed = "Reports need plotly, which is not installed: pip install 'persona-nns[report]'."
    with pytest.raises(UsageError) as raised:
        write_report(store)
    assert str(raised.value) == needed


def test_a_report_stands_beside_its_store_or_here_for_one_at_a_url(tmp_path: Path) -> None:
    assert default_file(f"{tmp_path}/s.zarr/") == tmp_path / "s.report.html"
    assert default_file("s3://bucket/folder/my.zarr") == Path("my.report.html")
