"""A process without models that writes cells of a run through the library, to be killed or raced.

``python store_writer.py STORE N_CELLS BATCH SECONDS [PER_CHUNK]`` measures cells whose values
follow from their labels, a batch in SECONDS, and prints the batches that it measured.
"""

import secrets
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from persona_nns.declarations.plans import Plan, Unit
from persona_nns.declarations.variables import Variable
from persona_nns.prompts.grids import Cell
from persona_nns.results.block import Block
from persona_nns.results.claims import Claims
from persona_nns.runs.queue import Queue

VARIABLES = {
    "kl": Variable("cell layer position", "causal KL", units="nat", description="of the test"),
    "n_eval": Variable("cell position", "scored tokens", units="token", kind="int"),
    "text": Variable("cell", "what was said", kind="text"),
    "hit": Variable("cell condition", "hit", kind="bool", coords={"condition": ["clean", "bare"]}),
}


def cells_of(indices: Iterable[int]) -> list[Cell]:
    return [Cell(f"p{index:03}", "t", "someone", "something", "a", "b") for index in indices]


def plan_of(n_cells: int) -> Plan:
    cells = cells_of(range(n_cells))
    return Plan(
        name="g",
        units=cells,
        axes={"cell": [cell.label for cell in cells]},
        unit_axes=("cell",),
        content={},
        token_ids={},
        digest="d",
        coords={"persona": ("cell", [c.persona for c in cells]), "task": ("cell", ["t"] * n_cells)},
    )


def block_of(n_cells: int, identity: str = "i", per_chunk: int | None = None) -> Block:
    parameters = {"layers": [1, 3], "positions": ["p_last", "g1"]}
    return Block(
        experiment="e",
        run=f"m.g.{identity}",
        model="m",
        n_layers=4,
        d_model=3,
        precision="float32",
        plan=plan_of(n_cells),
        layers=[1, 3],
        positions=["p_last", "g1"],
        variables=VARIABLES,
        attrs={
            "model": "m",
            "grid": "g",
            "grid_digest": "d",
            "precision": "float32",
            "protocol_version": "1",
            "parameters": parameters,
            "created": "2026-01-01T00:00:00+00:00",
            "experiment": "e",
            "identity": identity,
        },
        per_chunk=per_chunk,
    )


def values_of(cells: Sequence[Unit]) -> dict[str, Any]:
    """Arrays that follow from the labels alone."""
    labels = [cell.label for cell in cells]
    index = np.array([int(label[1:].partition("/")[0]) for label in labels])
    kl = index[:, None, None] + np.array([[0.25, 0.5], [0.75, 1.0]])
    return {
        "kl": kl.astype(np.float32),
        "n_eval": np.stack([index, index + 1], axis=1),
        "text": np.array([f"naïve “text” {label}" for label in labels], dtype=object),
        "hit": np.array([[True, False]] * len(labels)),
    }


def write_all(
    store: str | Path,
    n_cells: int,
    batch_size: int,
    seconds: float = 0.0,
    on_batch: Callable[[list[str]], object] = lambda _labels: None,
    identity: str = "i",
    *,
    shared: bool = False,
    per_chunk: int | None = None,
) -> list[list[str]]:
    """Measure and write what is missing; returns the batches that were measured."""
    block = block_of(n_cells, identity, per_chunk)
    claims = Claims(store, [block], secrets.token_hex(4), {})
    batches: list[list[str]] = []
    if shared:
        claims.begin()
    for batch in Queue(block.plan.units, batch_size, claims):
        time.sleep(seconds)
        labels = [cell.label for cell in batch]
        batches.append(labels)
        claims.write(batch, values_of(batch), seconds / len(batch))
        on_batch(labels)
    claims.end("now")
    return batches


def values_are_right(results: xr.Dataset) -> bool:
    """Whether every complete cell holds its values, and every other nothing."""
    done = results.completed.values[0]
    expected = values_of(plan_of(len(done)).units)
    numbers = {
        name: np.where(done.reshape(-1, *[1] * (expected[name].ndim - 1)), expected[name], np.nan)
        for name in ("kl", "n_eval", "hit")
    }
    return np.array_equal(results.text[0], np.where(done, expected["text"], "")) and all(
        np.array_equal(results[name][0].astype(float), values, equal_nan=True)
        for name, values in numbers.items()
    )


if __name__ == "__main__":
    store, n_cells, batch_size, seconds, *more = sys.argv[1:]
    written = write_all(
        store,
        int(n_cells),
        int(batch_size),
        float(seconds),
        per_chunk=int(more[0]) if more else None,
    )
    print(*map(",".join, written))
