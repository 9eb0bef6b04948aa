"""Experiments in the cells of a notebook, in a real kernel: as from a file, bit for bit."""

import sys
from collections.abc import Iterator
from pathlib import Path

import kernels
import numpy as np
import pytest
import xarray as xr
from kernels import Kernel

import persona_nns as pn
from persona_nns.cli import main
from persona_nns.runs.verify import verify_store

HEAD = """
import torch
from nnsight import save
import persona_nns as pn
"""
HELPER = """
SCALE = 2.0
def scaled(value):
    return value * SCALE
"""
SIZE = '''
def size(model, cells: list[pn.Cell], *, layers: list[int], power: float = 1.0):
    """How large the stream is."""
    batch = pn.left_pad([pn.render_cell(model.tokenizer, cell)["XY"].ids for cell in cells])
    with model.trace(batch.tokens, position_ids=batch.position_ids, use_cache=False):
        sizes = save([model.layers[k].input[:, -1].norm(dim=-1) for k in layers])
    return {"size": scaled(torch.stack(sizes).T) ** power}
'''
VARIABLES = 'variables = {"size": pn.Variable("cell layer", "size", description="Of p_last.")}\n'
RUN = """
ds = pn.run(
    size, model, "short", cells=CELLS, layers="2,5,7", variables=variables, store=store
)
"""
CELLS = ["marx/haiku", "yoda/haiku", "yoda/policy", "buffett/policy"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def kernel(folder: Path) -> Iterator[Kernel]:
    """A notebook with a model, a helper, and an experiment that was run."""
    with kernels.started() as kernel:
        kernel.runs(f"{HEAD}\nmodel = pn.load_model('organism-qwen2')")
        kernel.runs(f"store, CELLS = {str(folder / 's.zarr')!r}, {CELLS}")
        kernel.runs(HELPER)
        kernel.runs(SIZE + VARIABLES)
        yield kernel


@pytest.fixture(scope="module")
def file_run(folder: Path) -> xr.Dataset:
    """The same code from a file, in another process."""
    file = folder / "size.py"
    source = SIZE.replace("def size", "def measure")
    file.write_text(f'"""Size."""\n{HEAD}{HELPER}{source}{VARIABLES}')
    return pn.run(
        file, "organism-qwen2", "short", cells=CELLS, layers="2,5,7",
        store=folder / "file.zarr", progress=False,
    )  # fmt: skip


def measured(folder: Path, store: str = "s.zarr") -> np.ndarray:
    """What the last run holds of the cells."""
    return pn.open_results(folder / store, "size", run="latest")["size"].sel(cell=CELLS).values


def test_a_cell_measures_what_a_file_measures(
    kernel: Kernel, folder: Path, file_run: xr.Dataset
) -> None:
    shown = kernel.runs(RUN)
    np.testing.assert_array_equal(measured(folder), file_run["size"].sel(cell=CELLS).values)
    start, bar = shown.displays
    assert start["text/plain"].startswith("organism-qwen2 · short: 4 cells, ")
    assert "4 of 4 cells" in bar["text/plain"]
    assert bar["text/plain"].endswith("complete")
    assert '<progress value="4" max="4"></progress>' in bar["text/html"]
    assert bar["text/html"].endswith("complete</div>")


def test_the_same_cell_again_computes_nothing(kernel: Kernel) -> None:
    kernel.runs(RUN)
    for cell in (SIZE + VARIABLES, SIZE.replace("How large", "# so\n    How large"), ""):
        (line,) = kernel.runs(f"{cell}\n{RUN}").displays
        assert line["text/plain"].strip().endswith("4 of 4 cells complete, nothing computed")


@pytest.mark.parametrize(
    ("edit", "factor"),
    [
        (SIZE.replace(".norm(dim=-1)", ".norm(dim=-1) * 3"), 3.0),  # at the same line
        (SIZE.replace("    batch", "    # moved\n\n    batch"), 1.0),
        ("SCALE = 5.0", 2.5),
        ("def scaled(value):\n    return value * 8", 4.0),
        ("batch = sizes = cells = 3; another = model", 1.0),  # what it does not use
        (SIZE.replace("): ", ", unused: int = 1):"), 1.0),
    ],
)
def test_an_edited_cell_is_measured_as_it_is_now(
    kernel: Kernel, folder: Path, file_run: xr.Dataset, edit: str, factor: float
) -> None:
    kernel.runs(HELPER + SIZE)
    shown = kernel.runs(f"{edit}\n{RUN}")
    assert ("nothing computed" in str(shown.displays)) is (factor == 1.0)
    now = pn.open_results(
        folder / "s.zarr", "size", run=kernel.runs("print(ds.run)").printed.strip()
    )
    sizes = now["size"].sel(cell=CELLS).values
    np.testing.assert_allclose(sizes, factor * file_run["size"].sel(cell=CELLS).values, rtol=1e-6)


@pytest.mark.parametrize("magic", ["%%time\n", "%%capture\n", "!echo hello\n", "%precision 3\n"])
def test_magic_words_are_in_nobodys_way(kernel: Kernel, magic: str) -> None:
    kernel.runs("del size, scaled, ds")
    kernel.runs(f"{magic}{HELPER}{SIZE}{RUN}")
    kernel.runs(RUN)
    assert kernel.runs("print(int(ds.completed.sum()))").printed == "4\n"


@pytest.mark.slow  # a server starts
def test_a_server_measures_what_a_cell_says(
    kernel: Kernel, folder: Path, file_run: xr.Dataset
) -> None:
    kernel.runs(HELPER + SIZE)
    kernel.runs("served = pn.load_model('organism-qwen2', backend='simulate')")
    kernel.runs(RUN.replace("model,", "served,").replace("store=store", "store=store + '2'"))
    sizes = measured(folder, "s.zarr2")
    np.testing.assert_allclose(sizes, file_run["size"].sel(cell=CELLS).values, rtol=1e-4)


SLOW = """
import time
def slow(model, cells):
    time.sleep(0.2)
    with model.trace("hello"):
        last = save(model.layers[0].input[:, -1].norm())
    return {"last": last.expand(len(cells))}
"""
RUN_SLOW = (
    'ds = pn.run(slow, model, "short", batch_size=1, store=store,'
    ' variables={"last": pn.Variable("cell", "last")})'
)


def test_an_interrupted_run_is_kept_and_goes_on(kernel: Kernel, folder: Path) -> None:
    kernel.runs(SLOW)
    stopped = kernel.tries(RUN_SLOW, stop="3 of 12 cells")
    sentence = "Interrupted; 3 of 12 cells are complete and kept, and the same call goes on."
    assert stopped.error == ("Interrupted", sentence, sentence)
    assert "3 of 12 cells" in stopped.displays[-1]["text/plain"]
    assert stopped.displays[-1]["text/plain"].endswith("stopped")
    assert int(pn.open_results(folder / "s.zarr", "slow").completed.sum()) == 3
    again = kernel.runs(RUN_SLOW.replace("batch_size=1", "batch_size=5"))
    assert again.displays[0]["text/plain"].startswith(
        "organism-qwen2 · short: 9 cells, 5 at a time"
    )
    assert again.displays[-1]["text/plain"].endswith("complete")
    assert kernel.runs("print(int(ds.completed.sum()))").printed == "12\n"


def test_an_error_names_the_line_of_the_cell(kernel: Kernel) -> None:
    kernel.runs(HELPER + SIZE.replace("** power", "/ [1]"))
    failed = kernel.tries(RUN.replace("CELLS", "CELLS[:1]"))
    assert failed.error is not None
    assert failed.error[0] == "TypeError"
    assert 'line 10: return {"size": scaled(torch.stack(sizes).T) / [1]}' in failed.error[2]
    kernel.runs(SIZE)
    wrong = kernel.tries(
        RUN.replace("variables=variables", "variables={'size': pn.Variable('cell', 'a')}")
    )
    assert wrong.error is not None
    assert wrong.error[1].startswith("size() returned 'size' of shape (")


def test_a_store_is_read_where_the_function_is_not(
    kernel: Kernel,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kernel.runs(HELPER + SIZE + RUN.replace("store=store", "store=store + '3'"))
    store = str(folder / "s.zarr3")
    for command in (["show"], ["plot"]):
        monkeypatch.setattr(sys, "argv", ["persona-nns", *command, store, "size"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "median" in said
    assert (folder / said.split()[-1]).is_file()
    (verdict,) = verify_store(store)
    assert verdict.state == "not checked"
    assert "made with a function size()" in verdict.not_checked
    results = pn.open_results(store, "size")
    assert "return value * SCALE" in results.attrs["code"]
    assert "def size(model" in results.attrs["code"]
