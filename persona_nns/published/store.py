"""Where the store of the published numbers is."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def published_store() -> Path:
    """The store of published numbers: inside an installed package, or beside it in a checkout."""
    shipped = _PACKAGE / "stores" / "published"
    return shipped if shipped.is_dir() else _PACKAGE.parent / "stores" / "published"
