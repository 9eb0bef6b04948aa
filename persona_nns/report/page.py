"""The page: an index, pieces of data, plotly's script and ours, in one file that needs no other.

Nothing in it may reach the network or run but the scripts that were put into it here: a policy in
its head says so by their hashes. What a store holds is text, which the scripts never make HTML of.
"""

import base64
import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from persona_nns.errors import UsageError, missing_extra
from persona_nns.report.blobs import Blobs, as_json
from persona_nns.report.runs import describe_run
from persona_nns.results.exporting import in_place
from persona_nns.results.reading import list_runs

# In the order in which they are put into the page.
_SCRIPTS = (
    "data",
    "statistics",
    "selection",
    "choices",
    "traces",
    "figures",
    "tables",
    "differences",
    "prompts",
    "text_choices",
    "texts",
    "runs",
    "page",
)


@dataclass(frozen=True)
class Written:
    """A report that was written.

    Attributes:
        file: where it is.
        size: its bytes.
        n_runs: how many runs it shows.
        left_out: variables of runs of which it has only summaries.
    """

    file: Path
    size: int
    n_runs: int
    left_out: Sequence[str]


def write_report(
    store: str | Path, output: str | Path | None = None, *, experiments: Sequence[str] = ()
) -> Written:
    """Write a store as one HTML file, which opens from disk.

    Args:
        store: path or URL of the store.
        output: the file; by default ``<store>.report.html`` beside the store, or here of one at a
            URL.
        experiments: only runs of these; by default of all.

    Raises:
        UsageError: no store, no runs, no plotly, or a file that cannot be written.
    """
    plotly = _plotly()
    file = Path(output).expanduser() if output is not None else default_file(store)
    runs = list_runs(store)
    if not runs:
        raise UsageError(f"The store {str(store)!r} holds no runs.")
    known = dict.fromkeys(info.experiment for info in runs)
    for name in experiments:
        if name not in known:
            raise UsageError(
                f"The store {str(store)!r} holds no results of {name!r}; it has {', '.join(known)}."
            )
    chosen = [info for info in runs if not experiments or info.experiment in experiments]
    blobs = Blobs()
    described = [describe_run(store, info, blobs) for info in chosen]
    index = {
        "store": Path(str(store).rstrip("/")).name,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": metadata.version("persona-nns"),
        "runs": described,
    }
    page = _page(index, blobs, plotly)
    with in_place(file) as path:
        path.write_text(page, encoding="utf-8")
    left_out = [f"{of['run']}: {name}" for of in described for name in of["left_out"]]
    return Written(file, file.stat().st_size, len(chosen), left_out)


def default_file(store: str | Path) -> Path:
    """Where the report of a store goes when nobody says where."""
    address = str(store).rstrip("/")
    name = f"{Path(address).stem}.report.html"
    return Path(name) if "://" in address else Path(address).expanduser().with_name(name)


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise missing_extra("Reports need plotly", "report") from None
    return get_plotlyjs()


def _page(index: Any, blobs: Blobs, plotly: str) -> str:
    here = resources.files("persona_nns") / "report"

    def read(name: str) -> str:
        return (here / name).read_text(encoding="utf-8")

    script = '"use strict";\n' + "\n".join(read(f"{name}.js") for name in _SCRIPTS)
    packed = base64.b64encode(zlib.compress(plotly.encode(), 9)).decode()
    parts = {
        "policy": _policy(script, plotly),
        "title": _escaped(f"{index['store']} · persona-nns report"),
        "style": read("page.css"),
        "index": embedded(index),
        "plotly": packed,
        "script": script,
    }
    head, _, tail = read("page.html").partition("{{blobs}}")
    return _filled(head, parts) + "".join(blobs.elements()) + _filled(tail, parts)


def _filled(text: str, parts: dict[str, str]) -> str:
    """A text with parts in its slots, whatever these hold themselves."""
    pieces = text.split("{{")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        filled += [parts[name], rest]
    return "".join(filled)


def _policy(*scripts: str) -> str:
    """What the page may do: run these scripts, and nothing over the network."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def embedded(value: Any) -> str:
    """A value as JSON that may stand in an element of a page: it cannot end it."""
    return as_json(value).replace("<", "\\u003c")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
