"""What a cell prints, as it was printed: myst-nb makes a line of each part in which it arrives."""

from typing import Any

from myst_nb.core import render
from sphinx.application import Sphinx

_merged = render.coalesce_streams


def _joined(outputs: list[Any]) -> list[Any]:
    """The outputs of a cell with the parts of each stream put together."""
    kept: list[Any] = []
    streams: dict[str, Any] = {}
    for output in outputs:
        name = output.get("name", "")
        if name in streams:
            streams[name]["text"] += output["text"]
            continue
        kept.append(output)
        if output["output_type"] == "stream":
            streams[name] = output
    return _merged(kept)


def setup(_: Sphinx) -> dict[str, Any]:
    """Take the place of myst-nb's own."""
    render.coalesce_streams = _joined
    return {"parallel_read_safe": True, "parallel_write_safe": True}
