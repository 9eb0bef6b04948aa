"""Experiment files: found, read, and refused with a reason."""

from collections.abc import Callable
from pathlib import Path

import pytest
from nnsight import TransformersModel

from persona_nns.declarations.catalog import load_experiment
from persona_nns.declarations.shipped import bundled_experiments, summary_of
from persona_nns.errors import PersonaError, UsageError
from persona_nns.runs.run import run


def test_every_bundled_experiment_loads_and_documents_its_variables() -> None:
    assert "localized_positions" in bundled_experiments()
    for name, file in bundled_experiments().items():
        experiment = load_experiment(name)
        assert experiment.name == name
        assert experiment.summary == summary_of(file) != ""
        for variable in experiment.variables.values():
            assert variable.long_name
            assert variable.description
            assert variable.units in {"1", "nat", "token", "byte", "logit"}


def test_localized_positions_declares_what_the_protocol_says() -> None:
    experiment = load_experiment("localized_positions")
    assert experiment.variables["kl"].axes == ("cell", "layer", "position")
    assert experiment.variables["n_eval"].axes == ("cell", "position")
    assert (experiment.layers, experiment.positions) == (
        "0.25,0.40,0.55,0.70,0.85",
        "p_last,g1,g2",
    )
    assert list(experiment.options) == ["n_eval", "rms"]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("import nowhere", "does not run: ModuleNotFoundError: No module named 'nowhere'"),
        ("def measure(model, cells): ...", "has to define 'variables'"),
        (
            "from persona_nns import Variable\nvariables = {'a': Variable('layer', 'a')}\n"
            "def measure(model, cells): ...",
            "dims begin with 'cell'",
        ),
        (
            "from persona_nns import Variable\nvariables = {'a': Variable('cell head', 'a')}\n"
            "def measure(model, cells): ...",
            "has a dimension 'head' without labels",
        ),
        (
            "from persona_nns import Variable\nvariables = {'a': Variable('cell layer', 'a')}\n"
            "def measure(model, cells): ...",
            "has a dimension 'layer' without labels",
        ),
        (
            "from persona_nns import Variable\nvariables = {'depth': Variable('cell', 'a')}\n"
            "def measure(model, cells): ...",
            "cannot call a variable 'depth'",
        ),
        (
            "from persona_nns import Variable\nvariables = {'a': Variable('cell', 'a')}\n"
            "def measure(model, cells, *, store=1): ...",
            "cannot call an option of measure 'store'",
        ),
    ],
)
def test_a_file_that_is_no_experiment_says_why(tmp_path: Path, source: str, sentence: str) -> None:
    file = tmp_path / "bad.py"
    file.write_text(source)
    with pytest.raises(PersonaError, match=sentence):
        load_experiment(file)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"use .*localized_positions"):
        load_experiment("localised_positions")


def test_an_experiment_may_import_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside_it.py").write_text("UNITS = 'nat'")
    file = tmp_path / "own.py"
    file.write_text(
        "from beside_it import UNITS\nfrom persona_nns import Variable\n"
        "variables = {'a': Variable('cell', 'a', units=UNITS)}\ndef measure(model, cells): ..."
    )
    assert load_experiment(file).variables["a"].units == "nat"


def test_an_experiment_may_have_a_grid_of_its_own(
    random_model: Callable[[str], TransformersModel],
) -> None:
    assert load_experiment("host_injection").grid == "review"
    assert load_experiment("localized_positions").grid is None
    with pytest.raises(UsageError, match="'localized_positions' needs a grid, such as"):
        run("localized_positions", random_model("qwen2"))
