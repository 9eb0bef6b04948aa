"""Every experiment on the real server gives the numbers that it gives here.

The server computes attention by sdpa, the model here by eager. What was seen goes into the table
of the page on servers.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
from everywhere import CASES, HERE_ONLY, ON_A_GRID, Case, compare, on_grid, run_both, write_inputs
from nnsight import TransformersModel

TABLE = Path(__file__).parents[2] / "docs" / "guides" / "verified.csv"
COLUMNS = ("simulate", "trusted", "sandbox")
ALL = [*(Case(name) for name in ON_A_GRID), *CASES]


@pytest.fixture(scope="session")
def seen() -> Iterator[dict[tuple[str, str], float]]:
    """Largest difference by experiment and server; written down where none is missing."""
    differences: dict[tuple[str, str], float] = {}
    yield differences
    if len(differences) < len(ALL) * len(COLUMNS):
        return
    with TABLE.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["experiment", "local", *COLUMNS])
        for case in ALL:
            cells = [f"{differences[str(case), column]:.0e}" for column in COLUMNS]
            table.writerow([str(case), "0", *cells])
        for name in HERE_ONLY:
            table.writerow([name, "0", *["trains, here only"] * len(COLUMNS)])


@pytest.mark.parametrize("case", ALL, ids=str)
def test_the_numbers_are_those_of_this_machine(
    case: Case,
    mode: str,
    local: TransformersModel,
    remote: TransformersModel,
    seen: dict[tuple[str, str], float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_inputs(local)
    options = case.options or on_grid(case.experiment)
    here, there = run_both(case.experiment, local, remote, tmp_path, **options)
    seen[str(case), mode] = compare(here, there, atol=5e-5)
