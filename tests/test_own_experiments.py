"""Experiments of one's own: what is wrong in the file is told with its place, and never stored."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nnsight import TransformersModel

import persona_nns as pn
from persona_nns.errors import PersonaError, UsageError

OWN = '''
"""Numbers of layers."""
import torch
from nnsight import save
from persona_nns import Variable

protocol_version = 1
variables = {"size": Variable("cell layer", "size")}

def measure(model, cells, *, layers: list[int]):
    sizes = torch.tensor([[len(c.label) + 0.5 * layer for layer in layers] for c in cells])
    return {"size": sizes}
'''


@pytest.fixture(scope="module")
def model(random_model: Callable[[str], TransformersModel]) -> TransformersModel:
    return random_model("qwen2")


@pytest.fixture
def measured(tmp_path: Path, model: TransformersModel, small_grid: pn.Grid) -> Callable[..., Any]:
    def run_edited(old: str, new: str, **settings: Any) -> Any:
        assert old in OWN
        (tmp_path / "own.py").write_text(OWN.replace(old, new))
        return pn.run(tmp_path / "own.py", model, small_grid, store=tmp_path / "s.zarr", **settings)

    return run_edited


@pytest.mark.parametrize("layers", ["0,1,2,3", "0,1,2", "0,1", "0,1,2,3,4"])
@pytest.mark.parametrize("batch_size", [None, 2, 3])
def test_a_transposed_array_is_noticed_whatever_the_sizes(
    measured: Callable[..., Any], tmp_path: Path, layers: str, batch_size: int | None
) -> None:
    with pytest.raises(PersonaError, match=r"'size' of shape .* need"):
        measured('"size": sizes', '"size": sizes.T', layers=layers, batch_size=batch_size)
    assert not (tmp_path / "s.zarr").exists()


def test_a_forgotten_return_is_called_that(measured: Callable[..., Any]) -> None:
    with pytest.raises(PersonaError, match=r"returned NoneType .* without a return"):
        measured('    return {"size": sizes}\n', "    sizes\n")


def test_an_error_of_ones_own_says_its_line(measured: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        measured('{"size": sizes}', '{"size": sizes / (1 // 0)}')
    (note,) = caught.value.__notes__
    assert note.startswith(f"{tmp_path / 'own.py'}, line 12: return {{")


def test_an_error_in_a_helper_says_its_line(
    model: TransformersModel, small_grid: pn.Grid, tmp_path: Path
) -> None:
    (tmp_path / "halves.py").write_text("def save(x):\n    return x / 0 // 0\n")
    halved = OWN.replace("from nnsight import save", "from halves import save")
    (tmp_path / "own.py").write_text(halved.replace(": sizes}", ": save(1)}"))
    with pytest.raises(ZeroDivisionError) as caught:
        pn.run(tmp_path / "own.py", model, small_grid, store=tmp_path / "s.zarr")
    assert caught.value.__notes__[0].startswith(f"{tmp_path / 'halves.py'}, line 2: return x")


def test_an_error_while_a_file_is_executed_says_its_line(
    measured: Callable[..., Any],
) -> None:
    with pytest.raises(PersonaError, match=r"ZeroDivisionError: .*own.py, line 7: protocol_ver"):
        measured("protocol_version = 1", "protocol_version = 1 // 0")


def test_a_name_that_was_not_saved_says_save(measured: Callable[..., Any]) -> None:
    with pytest.raises(UnboundLocalError) as caught:
        measured(
            "    return {",
            "    with model.trace(torch.tensor([[5, 6]])):\n"
            "        found = model.layers[0].input\n"
            "    sizes = found\n"
            "    return {",
        )
    assert any("save(" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"size")}', '"size", kind="integer")}', "kind 'integer'; use float, int, bool, text"),
        ('"cell layer"', '("cell", "layer")', "dims of a variable cannot be"),
        ('"cell layer"', '""', "dims of a variable cannot be"),
    ],
)
def test_what_a_variable_cannot_be_is_told_before_anything_is_measured(
    measured: Callable[..., Any], old: str, new: str, message: str
) -> None:
    with pytest.raises(PersonaError, match=message):
        measured(old, new)


def test_a_file_that_is_known_by_what_it_holds_has_to_be_there(
    model: TransformersModel, small_grid: pn.Grid, tmp_path: Path
) -> None:
    option = "layers: list[int], notes: Annotated[list[str] | None, CONTENT] = None"
    imports = "from typing import Annotated\nfrom persona_nns.declarations import CONTENT\nimport"
    own = OWN.replace("import torch", f"{imports} torch").replace("layers: list[int]", option)
    (tmp_path / "own.py").write_text(own)
    note, store = tmp_path / "note.txt", tmp_path / "s.zarr"
    asked: dict[str, Any] = {"store": store, "layers": "0,1", "notes": [str(note)]}
    with pytest.raises(UsageError, match=r"note.txt' cannot be read: No such file"):
        pn.run(tmp_path / "own.py", model, small_grid, **asked)
    for text in ("rain", "rain", "sun"):
        note.write_text(text)
        pn.run(tmp_path / "own.py", model, small_grid, **asked)
    runs = [run.attrs for run in pn.list_runs(store)]
    assert [run["plan_options"] for run in runs] == [{"notes": [str(note)]}] * 2
    assert len({run["parameters"]["notes"][0] for run in runs}) == 2
