"""The prompts of a run's cells, in a group below its own: what a reader sees without a tokenizer.

The group ``<run>/prompts`` holds the prompt of each cell as ``text``, where its tokens end in it
(``ends``) and the token after the last of each span (``stops``). Each array is one chunk. None of
it is in a run's identity, which has the token ids, and `open_results` does not see it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import zarr

from persona_nns.declarations.plans import SPANS, ShownPrompt
from persona_nns.declarations.variables import Kind
from persona_nns.results.chunks import label_array, write_chunks
from persona_nns.results.groups import DAMAGED, open_group, require_arrays, require_group

_GROUP = "prompts"
# In place of an index where there is none.
_NONE = -1


def write_shown(group: zarr.Group, shown: Mapping[str, ShownPrompt]) -> None:
    """Write the prompts of a run's cells; whoever does so writes the same.

    Args:
        group: the run's.
        shown: by label of the cell.
    """
    if not shown:
        return
    prompts = [*shown.values()]
    longest = max(len(prompt.ends) for prompt in prompts)
    ends = np.full((len(prompts), longest), _NONE)
    for row, prompt in zip(ends, prompts, strict=True):
        row[: len(prompt.ends)] = prompt.ends
    last = [_NONE if prompt.user_last is None else prompt.user_last for prompt in prompts]
    said: dict[str, tuple[Kind, Sequence[str], object, str, str]] = {
        "cell": ("text", ["cell"], [*shown], "persona/task", "1"),
        "span": ("text", ["span"], SPANS, "span", "1"),
        "ends": ("int", ["cell", "token"], ends, "end of a token in the text", "character"),
        "stops": ("int", ["cell", "span"], [p.stops for p in prompts], "end of a span", "token"),
        "user_last": ("int", ["cell"], last, "last token before the generation header", "token"),
        "text": ("text", ["cell"], [p.text for p in prompts], "prompt XY", "1"),
    }
    values = {
        name: np.asarray(of, dtype=object if kind == "text" else None)
        for name, (kind, _, of, _, _) in said.items()
    }
    arrays = require_arrays(
        require_group(group, _GROUP),
        {
            name: label_array(
                kind, dims, values[name].shape, {"long_name": long_name, "units": units}
            )
            for name, (kind, dims, _, long_name, units) in said.items()
        },
    )
    for name, array in arrays.items():
        write_chunks(array, tuple(map(slice, array.shape)), values[name])


def has_shown(group: zarr.Group) -> bool:
    """Whether a run's group has its prompts below it."""
    return _GROUP in group


def read_shown(store: str | Path, experiment: str, run: str) -> dict[str, ShownPrompt]:
    """The prompts of a run's cells by label; none where the run is older than they are.

    Args:
        store: path or URL of the store.
        experiment: name of the experiment.
        run: name of the run's group.
    """
    group = open_group(store, f"{experiment}/{run}/{_GROUP}", "r")
    if group is None:
        return {}
    try:
        cells, texts, ends, stops, last = (
            np.asarray(group[name][...]).tolist()  # type: ignore[index]
            for name in ("cell", "text", "ends", "stops", "user_last")
        )
    except (KeyError, *DAMAGED):  # what was cut off while it was written
        return {}
    return {
        cell: ShownPrompt(
            text,
            tuple(end for end in of_tokens if end != _NONE),
            tuple(of_spans),
            None if user_last == _NONE else user_last,
        )
        for cell, text, of_tokens, of_spans, user_last in zip(
            cells, texts, ends, stops, last, strict=True
        )
        if text
    }
