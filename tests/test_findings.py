"""The findings: tables are what the kept store holds; test_docs looks numbers of the page up."""

import re
import tarfile
from pathlib import Path

import pandas as pd
import pytest
from readme_example import README

ROOT = Path(__file__).parents[1]
FOLDER, PAGE = ROOT / "docs" / "findings", ROOT / "docs" / "findings.md"
TABLES = sorted(FOLDER.glob("*.csv"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tables, written anew."""
    folder = tmp_path_factory.mktemp("findings")
    with tarfile.open(ROOT / "stores" / "findings.tar.xz") as archive:
        archive.extractall(folder / "findings.zarr", filter="data")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        from tables import write_tables  # type: ignore[import-not-found]
    write_tables(str(folder / "findings.zarr"), folder / "tables")
    return folder / "tables"


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.stem)
def test_a_table_is_what_the_store_holds(written: Path, table: Path) -> None:
    assert (written / table.name).read_text("utf-8") == table.read_text("utf-8")


def test_the_page_shows_every_table(written: Path) -> None:
    shown = re.findall(r":file: findings/(\w+\.csv)", PAGE.read_text("utf-8"))
    assert sorted(shown) == [table.name for table in TABLES]
    assert {file.name for file in written.iterdir()} == set(shown)


def test_the_first_table_of_the_readme_is_of_a_real_model() -> None:
    text = README.read_text("utf-8")
    first = next(re.finditer(r"^\| layer .*?(?=^$|^[^|])", text, re.MULTILINE | re.DOTALL))[0]
    assert text.index("| layer ") < text.index("make demo")
    known = pd.read_csv(FOLDER / "additivity.csv", dtype=str)
    known = known[(known["model"] == "smollm2-135m-instruct") & (known["grid"] == "short")]
    columns = ["layer", "KL p_last", "KL g1", "KL g2", "cosine"]
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in first.splitlines()]
    assert rows[2:] == known[columns].values.tolist()
