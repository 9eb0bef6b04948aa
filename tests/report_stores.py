"""Stores for reports that no model has written, and what stands in a report's file."""

import base64
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from persona_nns.declarations.plans import ShownPrompt
from persona_nns.results.shown_prompts import write_shown

HOSTILE = '</script><script>window.hacked = 1</script><img src="x" onerror="window.hacked = 1">'
LAYERS, POSITIONS, CONDITIONS = (
    [0, 4, 8, 12, 16, 20],
    ["p_last", "g1"],
    ["clean", "none", "additive"],
)
MARKERS = ["menu", "pinch of salt", "écru"]


def text_of(cell: str, condition: str) -> str:
    """What is said in a cell: the clean text, one word in it changed, or another text."""
    said = f"Today's menu of {cell} needs a pinch of salt, and nothing else."
    return {"clean": said, "none": said.replace("menu", "list")}.get(
        condition, "Écru menus, they say."
    )


def prompt_of(persona: str, task: str) -> ShownPrompt:
    """A prompt whose tokens are its words."""
    text = f"<user> As {persona}, {task} <model>"
    ends = tuple(match.end() for match in re.finditer(r"\S+\s?", text))
    own = len(persona.split())
    stops = (2, 2 + own, len(ends) - 1, len(ends))
    return ShownPrompt(text, ends, stops, len(ends) - 2)


def write_grid_run(
    store: Path,
    personas: Sequence[str],
    tasks: Sequence[str],
    *,
    experiment: str = "behavioral_markers",
    model: str = "tiny",
    missing: Sequence[int] = (),
    layers: Sequence[int] = LAYERS,
    prompts: bool = True,
    note: str = "of the test",
    run: str = "",
) -> xr.Dataset:
    """Write a run on a grid, each array one chunk; returns what was written.

    Args:
        store: the store, which may be there.
        personas: by key, which is their text too.
        tasks: likewise.
        experiment: name of the experiment.
        model: name of the model.
        missing: places of cells that are not complete.
        layers: labels.
        prompts: keep them.
        note: description of a variable.
        run: name of the run; by default the model's.
    """
    pairs = [(persona, task) for persona in personas for task in tasks]
    cells = [f"{persona}/{task}" for persona, task in pairs]
    rng = np.random.default_rng(len(cells))
    kl = rng.gamma(2.0, size=(1, len(cells), len(layers), len(POSITIONS))).astype(np.float32)
    hit = rng.random((1, len(cells), len(CONDITIONS))) < 0.4
    said = [[text_of(cell, condition) for condition in CONDITIONS] for cell in cells]
    complete = np.ones((1, len(cells)), bool)
    complete[0, list(missing)] = False
    text = np.array([said], dtype=object)
    text[~complete] = ""
    kl[~complete] = np.nan
    at = ("model", "cell")
    of = {"units": "1", "description": note}
    dataset = xr.Dataset(
        {
            "kl": (
                (*at, "layer", "position"),
                kl,
                {**of, "long_name": "causal KL", "units": "nat"},
            ),
            "any_marker": ((*at, "condition"), hit, {**of, "long_name": "any persona marker"}),
            "text": ((*at, "condition"), text, {**of, "long_name": "greedy continuation"}),
            "seconds": (at, np.ones((1, len(cells)), np.float32)),
            "completed": (at, complete),
        },
        coords={
            "model": ("model", np.array([model], object)),
            "cell": ("cell", np.array(cells, object)),
            "persona": ("cell", np.array([persona for persona, _ in pairs], object)),
            "task": ("cell", np.array([task for _, task in pairs], object)),
            "layer": ("layer", list(layers)),
            "position": ("position", np.array(POSITIONS, object)),
            "condition": ("condition", np.array(CONDITIONS, object)),
            "n_layers": ("model", [24]),
        },
        attrs={
            "experiment": experiment,
            "run": run or f"{model}.g.1",
            "identity": f"{model}{experiment}{run}",
            "protocol_version": "1",
            "model": model,
            "model_source": model,
            "precision": "float32",
            "grid": "g",
            "grid_digest": "d",
            "personas": {key: key for key in personas},
            "tasks": {key: key for key in tasks},
            "markers": dict.fromkeys(personas[:-1], MARKERS),
            "parameters": {"layers": list(layers), "positions": POSITIONS},
            "created": "2026-01-02T03:04:05+00:00",
            "variables": ["kl", "any_marker", "text"],
            "every_layer": [],
            "session": {"versions": {"torch": "2.0"}, "python": "3.11"},
            "coordinates": "persona task n_layers",
        },
    )
    group = f"{experiment}/{dataset.attrs['run'].replace('/', '--')}"
    zarr.open_group(store, mode="a").require_group(experiment)
    dataset.to_zarr(store, group=group, mode="w", zarr_format=3, consolidated=False)
    if prompts:
        shown = {cell: prompt_of(*pair) for cell, pair in zip(cells, pairs, strict=True)}
        write_shown(zarr.open_group(store, path=group, mode="a"), shown)
    return dataset


class Page:
    """A report's file, read as its scripts read it."""

    def __init__(self, file: Path) -> None:
        self.text = file.read_text(encoding="utf-8")
        self.index: dict[str, Any] = json.loads(self._element("index"))

    def _element(self, name: str) -> str:
        found = re.search(rf'<script type="[^"]*" id="{name}">([^<]*)</script>', self.text)
        assert found is not None
        return found[1]

    def raw(self, number: int) -> bytes:
        return zlib.decompress(base64.b64decode(self._element(f"blob-{number}")))

    def json(self, number: int) -> Any:
        return json.loads(self.raw(number))

    def numbers(self, number: int, dtype: str) -> Any:
        planes = np.frombuffer(self.raw(number), np.uint8).reshape(np.dtype(dtype).itemsize, -1)
        return np.ascontiguousarray(planes.T).view(dtype).ravel()

    def body(self, run: int = 0) -> dict[str, Any]:
        return self.json(self.index["runs"][run]["body"])

    def values(self, body: Mapping[str, Any], name: str) -> Any:
        """A variable of numbers or texts, whole."""
        (of,) = [each for each in (*body["numbers"], *body["texts"]) if each["name"] == name]
        shape = [len(body["dims"][dim]) for dim in of["dims"]]

        def read(number: int) -> Any:
            if of["kind"] == "text":
                table = self.json(number)
                return np.array([table["texts"][k] for k in table["at"]], dtype=object)
            return self.numbers(number, of["dtype"])

        if "blob" in of:
            return read(of["blob"]).reshape(shape)
        axis = of["dims"].index(of["along"])
        assert axis == 0
        return np.concatenate(
            [read(number).reshape([-1, *shape[1:]]) for number in of["blobs"]], axis=axis
        )
