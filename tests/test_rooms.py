"""The rooms of the package: who imports whom, what the faces promise, which former names stay."""

import ast
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nnsight import TransformersModel
from store_writer import write_all

import persona_nns as pn

ROOT = Path(pn.__file__).parents[1]
PACKAGE, EXPERIMENTS = ROOT / "persona_nns", ROOT / "experiments"
STUBS = sorted(PACKAGE.rglob("__init__.pyi"))
ROOMS = [stub.parent.name for stub in STUBS if stub.parent.parent == PACKAGE]
FACES = {"persona_nns", "persona_nns.errors", *(f"persona_nns.{room}" for room in ROOMS)}
MOST_LINES = 400


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules of the package that are imported anywhere in a tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "persona_nns")


@pytest.mark.parametrize("file", sorted(EXPERIMENTS.glob("*.py")), ids=lambda file: file.stem)
def test_an_experiment_imports_faces_alone(file: Path) -> None:
    assert set(imported(ast.parse(file.read_text()))) <= FACES


@pytest.mark.parametrize("file", sorted((PACKAGE / "tracing").rglob("*.py")), ids=str)
def test_what_travels_to_a_server_imports_nothing_of_ours_in_a_function(file: Path) -> None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    functions = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, kinds)]
    assert not [name for function in functions for name in imported(function)]


@pytest.mark.parametrize("stub", STUBS, ids=lambda stub: stub.parent.name)
def test_every_name_of_a_face_is_that_of_its_module(stub: Path) -> None:
    name = ".".join(stub.parent.relative_to(ROOT).parts)
    face, promised = importlib.import_module(name), set()
    for node in ast.parse(stub.read_text()).body:
        assert isinstance(node, ast.ImportFrom)
        home = importlib.import_module(f"{name}.{node.module}")
        for alias in node.names:
            assert getattr(face, alias.name) is getattr(home, alias.name)
            promised.add(alias.name)
    assert promised == set(face.__all__)
    assert promised <= set(dir(face))


DRAW = """
import sys
import persona_nns.results, persona_nns.figures
from persona_nns.results import list_runs, open_results
ds = open_results(sys.argv[1], "e")
persona_nns.figures.lines_by_layer(ds, ["kl"])
persona_nns.figures.cells_heatmap(ds, "kl", by="persona")
persona_nns.figures.result_table(ds, "n_eval")
print(len(list_runs(sys.argv[1])), sorted({"torch", "transformers", "nnsight"} & set(sys.modules)))
"""


def test_a_store_is_read_and_drawn_without_torch(tmp_path: Path) -> None:
    write_all(tmp_path / "s.zarr", 2, 2)
    answer = subprocess.run(
        [sys.executable, "-c", DRAW, str(tmp_path / "s.zarr")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.stdout == "1 []\n", answer.stderr


@pytest.mark.parametrize(
    ("former", "names", "room"),
    [
        ("batches", "Batch left_pad similar_rows", "tracing"),
        ("jobs", "read_jobs", "runs"),
        (
            "kv",
            "KVCache Piece Rotation read_cache read_rotation running_cache splice stack",
            "tracing.kv",
        ),
        ("kv.labelled", "label_cache open_cache write_cache", "results"),
        ("kv.labelled", "unlabel_cache", "tracing.kv"),
        ("units", "Plan Unit content_digest noun_of", "declarations"),
    ],
)
def test_a_former_module_gives_its_names_and_says_where_they_are(
    former: str, names: str, room: str
) -> None:
    module = importlib.import_module(f"persona_nns.{former}")
    face = importlib.import_module(f"persona_nns.{room}")
    for name in names.split():
        with pytest.warns(DeprecationWarning, match=f"from persona_nns.{room} import {name}`"):
            assert getattr(module, name) is getattr(face, name)
    with pytest.raises(AttributeError, match="had no 'nonesuch'"):
        _ = module.nonesuch


FORMER = '''
"""Lengths of prompts, with the imports of before the rooms."""
from persona_nns.batches import left_pad
from persona_nns.prompts import render_cell
from persona_nns.units import Plan
from persona_nns import Cell, Variable, load_grid

variables = {"length": Variable("cell", "tokens of the prompt", kind="int")}

def plan(tokenizer, *, asked: str = "yoda/haiku,marx/policy") -> Plan:
    cells = load_grid("short").select_cells(asked)
    ids = {cell.label: {"XY": render_cell(tokenizer, cell)["XY"].ids} for cell in cells}
    return Plan(
        name="lengths", units=cells, axes={"cell": list(ids)}, unit_axes=("cell",),
        content={"cells": list(ids)}, token_ids=ids, digest="0",
    )

def measure(model, cells: list[Cell]) -> dict:
    rows = [render_cell(model.tokenizer, cell)["XY"].ids for cell in cells]
    return {"length": left_pad(rows).attention_mask.sum(1)}
'''


def test_a_users_file_with_former_imports_runs(
    random_model: Callable[[str], TransformersModel], tmp_path: Path
) -> None:
    (tmp_path / "lengths.py").write_text(FORMER)
    with pytest.warns(DeprecationWarning, match=r"persona_nns\.(batches|units) moved") as caught:
        ds = pn.run(tmp_path / "lengths.py", random_model("qwen2"), store=tmp_path / "s.zarr")
    assert {Path(w.filename).name for w in caught if "moved" in str(w.message)} == {"lengths.py"}
    assert (ds.length > 10).all()


def test_no_file_is_too_long_to_be_read() -> None:
    files = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.js"), *EXPERIMENTS.glob("*.py")]
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}
    assert {name: n for name, n in lengths.items() if n > MOST_LINES} == {}


def contracts_of(copy: Path) -> subprocess.CompletedProcess[str]:
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache", "--config", str(ROOT / "pyproject.toml")],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_imports_against_the_rules_are_found(tmp_path: Path) -> None:
    copy = tmp_path / "persona_nns"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    kept = contracts_of(tmp_path)
    assert kept.returncode == 0, kept.stdout + kept.stderr
    for file, line, contract in (
        ("results/measured.py", "import torch", "What knows Zarr never sees a model"),
        ("tracing/batches.py", "import persona_nns.runs", "The data goes one way"),
    ):
        before = (copy / file).read_text()
        (copy / file).write_text(f"{before}\n{line}\n")
        broken = contracts_of(tmp_path)
        (copy / file).write_text(before)
        assert broken.returncode == 1, broken.stdout + broken.stderr
        (named,) = [line for line in broken.stdout.splitlines() if line.endswith("BROKEN")]
        assert named.startswith(contract)
