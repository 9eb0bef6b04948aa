"""What of a function, and of what it uses, makes another version of an experiment."""

import importlib
import linecache
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnsight import TransformersModel

import persona_nns as pn
from persona_nns.declarations import load_experiment, the_experiment

VARIABLES = {"size": pn.Variable("cell", "size")}
BEFORE = '''
import math, re
import numpy as np, torch
from dataclasses import dataclass
from enum import Enum
from functools import partial
from torch.nn.functional import relu as act

K, TABLE, WORD, WEIGHTS = 2.0, {"a": [1, 2]}, re.compile("x+"), np.arange(4.0)
DIRECTION = torch.ones(3, dtype=torch.bfloat16)
unused = object()
class Mode(Enum):
    FAST = 1
@dataclass(frozen=True)
class Part:
    n: int = 1
    def size(self):
        return self.n * K
    @property
    def half(self):
        return self.n / 2
class Plain:
    def __init__(self): self.held = 3
plain, part = Plain(), Part(2)
def helper(x, y=1):
    """Help."""
    return x + y
halved = partial(helper, y=0.5)
def again(n):
    return again(n - 1) if n else Mode.FAST
def power(n):
    def inner(x):
        return x ** n
    return inner
square = power(2)
def experiment(model, cells, *, n: int = 1):
    """Measure."""
    unused = math.sqrt(4)  # a name of its own
    parts = [part, plain, again(2), act, WORD, TABLE, WEIGHTS, DIRECTION]
    return {"size": [halved(K) + square(3) + Part(4).half for _ in cells], "more": parts}
'''
EDITS = {
    "a line": ("for _ in cells]", "for _ in cells * 1]", True),
    "a constant": ("K, TABLE, WORD, WEIGHTS = 2.0", "K, TABLE, WORD, WEIGHTS = 3.0", True),
    "inside a dictionary": ("[1, 2]", "[2, 1]", True),
    "a pattern": ('"x+"', '"x*"', True),
    "an array": ("np.arange(4.0)", "np.arange(4.0) * 2", True),
    "the kind of an array": ("np.arange(4.0)", "np.arange(4)", True),
    "a tensor": ("torch.ones(3,", "torch.zeros(3,", True),
    "an installed function of one name": ("import relu as act", "import gelu as act", True),
    "an enumeration": ("FAST = 1", "FAST = 2", True),
    "a default of a dataclass": ("n: int = 1\n    def", "n: int = 5\n    def", True),
    "a method": ("self.n * K", "self.n + K", True),
    "a property": ("self.n / 2", "self.n / 3", True),
    "an object of a dataclass": ("Part(2)", "Part(3)", True),
    "an object": ("self.held = 3", "self.held = 4", True),
    "a helper": ("return x + y", "return x - y", True),
    "a helper's default": ("y=1", "y=2", True),
    "what a partial holds": ("y=0.5", "y=0.25", True),
    "one that calls itself": ("again(n - 1)", "again(n - 2)", True),
    "what a function closes over": ("power(2)", "power(3)", True),
    "a comment": ("# a name of its own", "# its own", False),
    "a docstring": ("Measure.", "It measures.", False),
    "a helper's docstring": ("Help.", "It helps.", False),
    "blank lines": ("def helper", "\n\n\ndef helper", False),
    "what nothing uses": ("unused = object()", "unused = 3", False),
}  # fmt: skip


@pytest.fixture
def typed() -> Callable[[str], dict[str, Any]]:
    """Run text as the cell of a notebook is run, which keeps it by a name of its own."""

    def run(text: str) -> dict[str, Any]:
        name = f"<typed {hash(text)}>"
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(text, name, "exec"), names)
        return names

    return run


def version(names: dict[str, Any], **more: Any) -> str:
    variables = {**VARIABLES, "more": pn.Variable("cell", "more")}
    return pn.as_experiment(names["experiment"], variables, **more).version


@pytest.mark.parametrize("edit", EDITS)
def test_what_an_edit_changes_of_the_version(typed: Any, edit: str) -> None:
    old, new, changes = EDITS[edit]
    assert old in BEFORE
    before, after = version(typed(BEFORE)), version(typed(BEFORE.replace(old, new)))
    assert (before != after) is changes


def test_how_variables_are_called_does_not_count_and_what_they_are_does(typed: Any) -> None:
    measure = typed(BEFORE)["experiment"]

    def of(**changed: Any) -> str:
        given: dict[str, Any] = {"dims": "cell head", "long_name": "size", **changed}
        given.setdefault("coords", {"head": [0, 1]})
        return pn.as_experiment(measure, {"size": pn.Variable(**given)}).version

    assert of() == of(long_name="another", units="nat", description="Said otherwise.")
    others = {of(kind="int"), of(coords={"head": [0, 2]}), of(dims="cell head layer", coords={
        "head": [0, 1], "layer": [0]})}  # fmt: skip
    assert len(others | {of()}) == 4


def test_a_file_named_counts_by_what_it_holds(
    typed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = typed("WHERE = 'data.txt'\ndef experiment(model, cells): return open(WHERE)\n")
    versions: set[str] = set()
    for text in ("a", "b"):
        Path("data.txt").write_text(text)
        versions.add(version(names))
    assert len(versions) == 2


def test_a_version_of_ones_own_stands_for_the_code(typed: Any) -> None:
    names = typed("def experiment(model, cells): return {'size': generator.random(2)}")
    names["generator"] = np.random.default_rng(0)
    with pytest.raises(pn.UsageError, match="uses 'generator', and what a Generator holds"):
        version(names)
    assert version(names, version=3) == "3"


def named(model: Any, cells: list[pn.Cell]) -> dict[str, Any]:
    assert model
    return {"size": torch.zeros(len(cells))}


exec("def unread(model, cells): ...")  # as in a plain Python shell
unread = locals()["unread"]


@pytest.mark.parametrize(
    ("given", "variables", "sentence"),
    [
        (lambda *_: {}, VARIABLES, "is a function with a name"),
        (named, None, r"What named\(\) returns has to be said: variables="),
        (named, {"size": "cell"}, r"What named\(\) returns has to be said"),
        (named, {"size": pn.Variable("layer", "s")}, r"of named\(\) \(.*py, line \d+\) has to"),
        ("localized_positions", VARIABLES, "Variables are given with a function"),
        (unread, VARIABLES, r"The source of unread\(\) is not to be had"),
    ],
)  # fmt: skip
def test_what_is_no_experiment_says_why(given: Any, variables: Any, sentence: str) -> None:
    with pytest.raises(pn.PersonaError, match=sentence):
        the_experiment(given, variables)


def test_a_bundled_name_is_taken() -> None:
    def localized_positions(model: Any, cells: Any) -> None: ...

    with pytest.raises(pn.UsageError, match="'localized_positions' is a bundled experiment"):
        pn.as_experiment(localized_positions, VARIABLES)


def test_an_experiment_and_a_function_go_the_same_way() -> None:
    assert the_experiment("localized_positions") is load_experiment("localized_positions")
    made = pn.as_experiment(named, VARIABLES)
    assert the_experiment(made) is made
    assert (made.name, made.file, made.is_shipped, made.summary) == ("named", None, False, "")


MODULE = """
from nnsight import save
import persona_nns as pn
from measuring.scales import SCALE

def size(model, cells):
    with model.trace("hello"):
        norm = save(model.layers[1].input[:, -1].norm())
    return {"size": (norm * SCALE).expand(len(cells))}

if __name__ == "__main__":
    import sys
    variables = {"size": pn.Variable("cell", "size")}
    ds = pn.run(size, "organism-qwen2", "short", variables=variables, cells="marx/haiku",
                store=sys.argv[1], progress=False)
    print(float(ds["size"].max()))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module of one's own with another beside it, importable and a script at once."""
    package = tmp_path / "measuring"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "scales.py").write_text("SCALE = 1.0\n")
    file = package / "sizes.py"
    file.write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield file
    for name in [name for name in sys.modules if name.partition(".")[0] == "measuring"]:
        del sys.modules[name]


def test_a_module_imported_again_is_measured_as_it_is_now(
    module: Path, random_model: Callable[[str], TransformersModel], small_grid: pn.Grid
) -> None:
    loaded, model = importlib.import_module("measuring.sizes"), random_model("qwen2")

    def measured() -> float:
        results = pn.run(
            loaded.size, model, small_grid, variables=VARIABLES, store=module.with_name("s.zarr"),
            progress=False,
        )  # fmt: skip
        return float(results["size"].max())

    first = measured()
    module.write_text(MODULE.replace(".norm()", ".norm() * 10"))
    with pytest.raises(pn.UsageError, match=r"as it was read; import the file again"):
        measured()
    loaded = importlib.reload(loaded)
    assert measured() == pytest.approx(10 * first, rel=1e-6)
    module.write_text("\n" + MODULE)
    loaded = importlib.reload(loaded)
    assert measured() == first


@pytest.mark.slow
def test_a_script_runs_a_function_of_its_own(module: Path) -> None:
    command = [sys.executable, "-m", "measuring.sizes", str(module.with_name("script.zarr"))]
    done = subprocess.run(command, cwd=module.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    script = [sys.executable, str(module), command[-1]]
    again = subprocess.run(
        script, cwd=module.parent, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(module.parents[1])},
    )  # fmt: skip
    assert again.stdout == done.stdout != ""
    assert len(pn.list_runs(command[-1])) == 1
