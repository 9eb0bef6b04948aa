"""How the tests are run; what they share is in `shared`."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# One thread a process, also in those that tests start: the models are far too small for more.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

# Files that take long, the longest first: `make test` gives each file to one process, and a long
# one that comes last leaves the other process idle.
LONGEST = (
    "test_remote_faults",
    "test_remote",
    "test_trait_experiments",
    "test_demo",
    "test_docs",
    "test_wheel",
    "test_attention_knockout",
    "test_architectures",
    "test_persona_patching",
    "test_injection",
    "test_injection_controls",
    "test_compare",
    "test_kv_graft",
    "test_window",
    "test_bundled_models",
    "test_cli",
    "test_concurrency",
    "test_trait_architectures",
    "test_distillation",
)


def pytest_configure(config: pytest.Config) -> None:
    """Load what tests share, but not where tests are only handed out to other processes."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take long first."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))
