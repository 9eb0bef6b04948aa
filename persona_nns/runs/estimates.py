"""What is known of a run's work before it starts: arrays, prompts, jobs, earlier runs."""

import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from nnsight import TransformersModel

from persona_nns.declarations.plans import Plan, Unit
from persona_nns.declarations.variables import Kind
from persona_nns.results.block import Block, bookkeeping
from persona_nns.results.groups import open_root
from persona_nns.results.reading import RunInfo, list_runs
from persona_nns.runs.remote.job_book import Job
from persona_nns.runs.remote.sizing import units_per_job

_BYTES: dict[Kind, int] = {"float": 4, "int": 8, "bool": 1, "text": 0}
# What zstd and its checksum can add to a chunk, and an inner chunk of a large one with its index.
_BYTES_OF_CHUNK, _BYTES_OF_INNER_CHUNK = 32, 64


@dataclass(frozen=True)
class Written:
    """What units write into a store.

    Attributes:
        n_bytes: at most, texts aside: of numbers before they are compressed, and of their chunks.
        n_numbers: bytes of the results alone.
        n_chunks: one for each unit and array.
        n_texts: values that are texts.
        n_judged: values that a judge is asked for.
    """

    n_bytes: int
    n_numbers: int
    n_chunks: int
    n_texts: int
    n_judged: int


def written(blocks: Sequence[Block], units: Sequence[Unit]) -> Written:
    """What some units write into the groups of a run."""
    n_bytes = n_numbers = n_chunks = n_texts = n_judged = 0
    for block in blocks:
        variables = {**block.variables, **bookkeeping(block.plan)}
        axes = {name: variable.axes for name, variable in variables.items()}
        cut = len(block.layers) * max(1, len(block.positions))
        for unit in units:
            for name in block.plan.names_written(unit, axes):
                own = [axis for axis in axes[name] if axis not in unit.place]
                size = math.prod(len(block.labels(variables[name], axis)) for axis in own)
                numbers = size * _BYTES[variables[name].kind]
                n_bytes += numbers + _BYTES_OF_CHUNK
                n_numbers += numbers if name in block.variables else 0
                n_bytes += _BYTES_OF_INNER_CHUNK * cut if 8 * size > 2**20 else 0
                n_chunks += 1
                n_texts += size if variables[name].kind == "text" else 0
                n_judged += size if variables[name].judged else 0
    return Written(n_bytes, n_numbers, n_chunks, n_texts, n_judged)


@dataclass(frozen=True)
class Read:
    """The prompts that a plan renders.

    Attributes:
        n_prompts: different ones.
        n_tokens: of all of them.
        n_shared: of all of them, with each beginning that several share counted once.
    """

    n_prompts: int
    n_tokens: int
    n_shared: int


def read(plan: Plan, units: Sequence[Unit]) -> Read:
    """The prompts of some units; of all, where a plan does not say which are whose."""
    labels = [unit.label for unit in units]
    keys = labels if plan.token_ids.keys() >= set(labels) else list(plan.token_ids)
    rows = sorted({tuple(ids) for key in keys for ids in plan.token_ids[key].values()})
    n_tokens = sum(map(len, rows))
    repeated = sum(_common(*pair) for pair in pairwise(rows))
    return Read(len(rows), n_tokens, n_tokens - repeated)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two prompts begin with in common."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def job_sizes(
    n_units: int, batch_size: int | None, unit_bytes: float, unit_seconds: float = 0.0
) -> list[int]:
    """Units of each job, where the server takes all of them."""
    sizes: list[int] = []
    done: list[Job] = []
    while (left := n_units - sum(sizes)) > 0:
        size = min(left, units_per_job(done, batch_size))
        sizes.append(size)
        job = Job(
            id=str(len(sizes)),
            host="",
            units=("",) * size,
            compressed=True,
            request_bytes=0,
            submitted=f"{len(sizes):09}",
            state="written",
            result_bytes=int(size * unit_bytes),
            seconds=size * unit_seconds,
        )
        done.append(job)
    return sizes


@dataclass(frozen=True)
class Rate:
    """How fast units were measured.

    Attributes:
        seconds: of one.
        of: what was measured, and where.
    """

    seconds: float
    of: str


def earlier_rate(store: str | Path, block: Block) -> Rate | None:
    """How long a unit took in the likest earlier run of the same experiment and model."""
    if open_root(store) is None:
        return None
    alike = [
        (_likeness(info, block), info.attrs["created"], info)
        for info in list_runs(store, block.experiment)
        if info.n_completed and info.attrs["model_version"] == block.attrs["model_version"]
    ]
    if not alike:
        return None
    likeness, _, info = max(alike, key=lambda each: each[:2])
    taken = [float(s) for s in info.group.seconds().ravel().tolist() if not math.isnan(s)]
    settings = "" if likeness else f" with other settings ({info.configuration})"
    there = info.attrs["session"].get("platform")
    where = "" if there == platform.platform() else f", on another machine ({there})"
    noun = info.noun if len(taken) == 1 else f"{info.noun}s"
    return Rate(
        float(np.median(taken)), f"{len(taken)} {noun} of the run {info.run}{settings}{where}"
    )


def _likeness(info: RunInfo, block: Block) -> int:
    """2 of the same run, 1 of one that differs in its inputs alone, else 0."""
    if info.attrs["identity"] == block.attrs["identity"]:
        return 2
    same = ("parameters", "precision", "protocol_version")
    return int(all(info.attrs.get(name) == block.attrs[name] for name in same))


@contextmanager
def counted(model: TransformersModel) -> Iterator[Callable[[], int]]:
    """Count token-layers: tokens (padding included) that each block runs, summed over blocks."""
    work = 0

    def count(_module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal work
        hidden = named["hidden_states"] if "hidden_states" in named else arguments[0]
        work += hidden.shape[0] * hidden.shape[1]

    blocks = [layer.attn._module for layer in model.layers]
    handles = [block.register_forward_pre_hook(count, with_kwargs=True) for block in blocks]
    try:
        yield lambda: work
    finally:
        for handle in handles:
            handle.remove()
