"""The prompts of a run's cells for a page: as they were kept, or rendered anew, or their texts."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from persona_nns.declarations.plans import SPANS, ShownPrompt
from persona_nns.errors import PersonaError
from persona_nns.report.blobs import Blobs
from persona_nns.results.reading import RunInfo
from persona_nns.results.shown_prompts import read_shown

_EACH = 400


def describe_prompts(store: str | Path, info: RunInfo, blobs: Blobs) -> dict[str, Any] | None:
    """The prompts of a run on a grid; None of a run on other inputs.

    Args:
        store: path or URL of the store.
        info: the run.
        blobs: takes the prompts.
    """
    personas, tasks = (info.attrs.get(name) for name in ("personas", "tasks"))
    if not (isinstance(personas, Mapping) and isinstance(tasks, Mapping)):
        return None
    said: dict[str, Any] = {"personas": personas, "tasks": tasks, "spans": SPANS}
    shown, source = read_shown(store, info.experiment, info.run), "stored"
    if not shown:
        shown, source = _render(info), "rendered"
    if not shown:
        return {**said, "source": "texts"}
    labels = [*shown]
    pieces = [
        blobs.add_json([_piece(shown[label]) for label in labels[start : start + _EACH]])
        for start in range(0, len(labels), _EACH)
    ]
    return {**said, "source": source, "labels": labels, "each": _EACH, "blobs": pieces}


def _piece(prompt: ShownPrompt) -> list[Any]:
    return [prompt.text, prompt.ends, prompt.stops, prompt.user_last]


def _render(info: RunInfo) -> dict[str, ShownPrompt]:
    """The prompts of a run that kept none, where its model's tokenizer is on this machine."""
    attrs = info.attrs
    source = _tokenizer_here(str(attrs["model"]), str(attrs.get("model_source", "")))
    if source is None:
        return {}
    from persona_nns.prompts.frames import ROLE, Frame, Message
    from persona_nns.prompts.grids import Grid
    from persona_nns.prompts.render import render_cells

    messages = tuple(Message(**message) for message in attrs.get("frame", ()))
    frame = Frame(messages, "stored") if messages else ROLE
    cells = Grid(str(attrs["grid"]), attrs["personas"], attrs["tasks"], frame=frame).cells
    try:
        tokenizer = _tokenizer(source, str(attrs.get("template", "")))
        rendered = render_cells(tokenizer, cells, ["XY"])
    except (PersonaError, OSError, ValueError, KeyError):  # it is another model's by now
        return {}
    return {cell.label: of["XY"].shown for cell, of in zip(cells, rendered, strict=True)}


def _tokenizer_here(model: str, source: str) -> str | None:
    """What `load_tokenizer` takes without any network: a bundled or fetched name, or a folder."""
    from persona_nns.models.checkpoints import bundled_models
    from persona_nns.models.fetched import fetched_models

    fetched = fetched_models()
    if model in bundled_models() or (model in fetched and fetched[model].folder.is_dir()):
        return model
    return source if source and Path(source).is_dir() else None


@lru_cache(maxsize=4)
def _tokenizer(source: str, template: str) -> Any:
    import warnings

    from persona_nns.models.checkpoints import load_tokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to warn of was said when it ran
        tokenizer = load_tokenizer(source)
    if template:
        tokenizer.chat_template = template
    return tokenizer
