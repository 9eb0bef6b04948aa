"""Edit the file, run again, in one process: fresh numbers, and old ones where they hold."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from nnsight import TransformersModel

import persona_nns as pn
from persona_nns.declarations import load_experiment
from persona_nns.declarations.source import Code

LENS = '''
"""How large the stream is."""
import torch
from nnsight import save
from scaling import scale
from drawing import draw
from persona_nns import Cell, Variable, left_pad, render_cell

variables = {"size": Variable("cell layer", "size", description="Of the last token.")}

def measure(model, cells: list[Cell], *, layers: list[int]):
    """Measure.

    Args:
        layers: where.
    """
    batch = left_pad([render_cell(model.tokenizer, cell)["XY"].ids for cell in cells])
    with model.trace(batch.tokens, position_ids=batch.position_ids, use_cache=False):
        sizes = save([model.layers[k].input[:, -1].norm(dim=-1) for k in layers])
    return {"size": torch.stack(sizes).T * scale()}  # one row a cell

figures = {"size": draw}
'''
FILES = {
    "lens.py": LENS,
    "scaling.py": "from units_of import K\ndef scale(): return K\ndef other(): return 3\n",
    "units_of.py": "K = 2.0\n",
    "drawing.py": "def draw(results):\n    return None\n",
}
#: Edits: file, what, by what; and by how much the numbers change, None where they are kept.
EDITS = {
    "a line": ("lens.py", ".norm(dim=-1)", ".abs().sum(dim=-1)", True),
    "a line that moves": ("lens.py", "    batch =", "\n\n    2 * 3\n    batch =", True),
    "a helper": ("scaling.py", "return K", "return 2 * K", True),
    "a helper's helper": ("units_of.py", "2.0", "3.0", True),
    "an import that acts": ("drawing.py", "def", "import units_of; units_of.K = 5\ndef", True),
    "dimensions": ("lens.py", '"cell layer"', '"cell  layer"', True),
    "a comment": ("lens.py", "# one row a cell", "# a row a cell", False),
    "a docstring": ("lens.py", "Measure.", "It measures.", False),
    "help": ("lens.py", "layers: where.", "layers: at which.", False),
    "a blank line": ("lens.py", "variables =", "\n\nvariables =", False),
    "a description": ("lens.py", "Of the last token.", "At p_last.", False),
    "a figure": ("lens.py", 'figures = {"size": draw}', "figures = {}", False),
    "a figure's helper": ("drawing.py", "return None", "return 1", False),
    "what nothing uses": ("scaling.py", "return 3", "return 4", False),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize("edit", EDITS)
def test_what_an_edit_changes_of_the_version(folder: Path, edit: str) -> None:
    file, old, new, changes = EDITS[edit]
    before = Code(folder / "lens.py").digest
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    assert (Code(folder / "lens.py").digest != before) is changes


def test_numbers_are_fresh_after_each_edit(
    folder: Path, random_model: Callable[[str], TransformersModel], small_grid: pn.Grid
) -> None:
    model = random_model("qwen2")

    def measured() -> tuple[str, float]:
        results = pn.run(
            folder / "lens.py", model, small_grid, cells="chef/haiku", layers="2",
            store=folder / "s.zarr", progress=False,
        )  # fmt: skip
        return results.attrs["run"], float(results["size"].sel(cell="chef/haiku").max())

    run, size = measured()
    edited: dict[str, float] = {}
    for edit in ("a helper", "a helper's helper", "a line", "a comment"):
        file, old, new, changes = EDITS[edit]
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace(old, new))
        now, edited[edit] = measured()
        assert (now != run) is changes, edit
        (folder / file).write_text(text)
    assert edited["a helper"] == pytest.approx(2 * size, rel=1e-6)
    assert edited["a helper's helper"] == pytest.approx(1.5 * size, rel=1e-6)
    assert edited["a comment"] == size
    assert edited["a line"] > 2 * size
    assert measured() == (run, size)


def test_a_file_is_executed_again_only_where_it_changed(folder: Path) -> None:
    (folder / "drawing.py").write_text("print('executed')\ndef draw(results):\n    return None\n")
    first = load_experiment(folder / "lens.py")
    assert load_experiment(folder / "lens.py") is first
    (folder / "elsewhere").mkdir()
    for name, text in FILES.items():
        (folder / "elsewhere" / name).write_text(text)
    second = load_experiment(folder / "elsewhere" / "lens.py")
    assert second.measure.__module__ != first.measure.__module__
    assert load_experiment(folder / "lens.py") is first


IN_IPYTHON = """
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
def cell(code):
    shell.run_cell(code).raise_error()
cell("import persona_nns as pn; from pathlib import Path; model = pn.load_model('organism-qwen2')")
cell("def measured():\\n"
     "    results = pn.run('lens.py', model, 'short', cells='marx/haiku', layers='2',\\n"
     "                     store='s.zarr', progress=False)\\n"
     "    return float(results['size'].max())")
cell("sizes = [measured()]")
for edit in ("'lens.py', '.norm(dim=-1)', '.norm(dim=-1) * 2'", "'units_of.py', '2.0', '6.0'"):
    cell(f"file, old, new = {edit}; text = Path(file).read_text()")
    cell("Path(file).write_text(text.replace(old, new)); sizes.append(measured())")
cell("%load_ext autoreload")
cell("%autoreload 2")
cell("Path('scaling.py').write_text('def scale(): return 1.0\\\\n'); sizes.append(measured())")
print(*(size / shell.user_ns["sizes"][0] for size in shell.user_ns["sizes"]))
"""


@pytest.mark.slow
def test_numbers_are_fresh_after_each_edit_in_ipython(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_IPYTHON], cwd=folder, capture_output=True, text=True, check=True
    )
    ratios = [float(ratio) for ratio in done.stdout.split()[-4:]]
    assert ratios == pytest.approx([1.0, 2.0, 6.0, 1.0], rel=1e-6)
