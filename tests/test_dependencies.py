"""Packages of whose inner parts something is used have an upper bound: those parts may change."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FILES = [*(ROOT / "persona_nns").rglob("*.py"), *(ROOT / "experiments").glob("*.py")]
INNER = re.compile(
    r"^\s*(?:from|import) "
    r"(?:(xarray|zarr)\.core\b|(cloudpickle)\.|(\w+)(?:\.\w+)*\._)",
    re.MULTILINE,
)


def requirements() -> dict[str, Requirement]:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = map(Requirement, document["project"]["dependencies"])
    return {requirement.name: requirement for requirement in listed}


def inner_parts() -> set[str]:
    found = (match for file in FILES for match in INNER.findall(file.read_text(encoding="utf-8")))
    return {name for groups in found for name in groups if name} - {"persona_nns"}


def test_inner_parts_are_of_the_packages_that_are_known_for_it() -> None:
    assert inner_parts() == {"anyio", "cloudpickle", "nnsight", "xarray", "zarr"}


@pytest.mark.parametrize("name", sorted(inner_parts()))
def test_a_package_whose_inner_parts_are_used_has_an_upper_bound(name: str) -> None:
    specifier = requirements()[name].specifier
    assert any(part.operator in ("<", "<=", "==") for part in specifier)
    assert version(name) in specifier  # what is tested is allowed
    major = int(version(name).split(".")[0])
    assert f"{major + 1}.0" not in specifier
