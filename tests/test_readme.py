"""What the README shows works as it stands there."""

from readme_example import EXAMPLE, README


def test_the_example_experiment_is_short() -> None:
    assert len(EXAMPLE.strip().splitlines()) < 30


def test_the_readme_names_the_two_commands() -> None:
    text = README.read_text(encoding="utf-8")
    assert "make demo" in text
    assert "make test" in text
