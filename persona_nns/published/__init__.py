"""The numbers published with "As X, Do Y" (arXiv 2605.23147), and where their store is."""

from pathlib import Path

#: The ``protocol_version`` of published numbers, which were not computed here.
PUBLISHED_VERSION = "published"

_PACKAGE = Path(__file__).parents[1]


def published_store() -> Path:
    """The store of published numbers: inside an installed package, or beside it in a checkout."""
    shipped = _PACKAGE / "stores" / "published"
    return shipped if shipped.is_dir() else _PACKAGE.parent / "stores" / "published"
