"""How long reuse takes beside the paper's schedule and beside batches without it, in turns.

The other schedules are timed on some of the cells, another sample each turn, and multiplied by the
number of all: that is said in the JSON (``extrapolated_from``). The floor is the larger of two
times: the multiply-adds that the protocol cannot do without at the rate of products measured here,
and the bytes of the weights, read once for each token that a batch is made to say, at the rate of
a copy.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_machine import multiply_rate, read_rate, timed
from nnsight import TransformersModel
from paper_schedule import paper_schedule
from reuse import DEPTHS, N_SAID, POSITIONS, least_multiply_adds

from persona_nns.declarations.catalog import load_experiment
from persona_nns.declarations.sites import parse_layers
from persona_nns.models import fitting_batch_size
from persona_nns.prompts.grids import Cell, load_grid
from persona_nns.prompts.render import render_cell

measure = load_experiment("localized_positions").measure


def compare_schedules(
    model: TransformersModel,
    device: torch.device,
    grid: str,
    attention: str,
    seconds: float,
    *,
    quick: bool,
) -> Any:
    """Times of the schedules on one grid, and the memory that reuse takes.

    Args:
        model: with weights on the device.
        device: where.
        grid: ``short`` or ``long``.
        attention: ``eager`` or ``sdpa``.
        seconds: that it may take; the first turn is finished in any case.
        quick: few cells, one turn.
    """
    model._module.set_attn_implementation(attention)
    cells = list(load_grid(grid).cells)[: 4 if quick else None]
    layers = parse_layers(DEPTHS, len(model.layers))
    prompts = [render_cell(model.tokenizer, cell)["XY"].ids for cell in cells]
    size = fitting_batch_size(model, prompts)
    sites: dict[str, Any] = {"layers": layers, "positions": POSITIONS, "rms": False}

    def reuse() -> None:
        for start in range(0, len(cells), size):
            measure(model, cells[start : start + size], **sites)

    measure(model, cells[:2], **sites)  # what the first pass alone has to do
    plain = model._module
    stop, n_paper = time.monotonic() + seconds, 1 if quick else 2
    times: dict[str, list[float]] = {"reuse": [], "no_reuse": [], "paper": []}
    peak = 0
    for turn in range(1 if quick else 3):
        if turn and time.monotonic() + 1.5 * sum(of[-1] for of in times.values()) > stop:
            break
        _forget_peak(device)
        times["reuse"].append(timed(device, reuse))
        peak = max(peak, _peak(device))
        some = _sample(cells, turn, n_paper)
        whole = len(cells) / len(some)
        times["paper"].append(whole * timed(device, _paper(plain, model.tokenizer, some, layers)))
        batch = _sample(cells, turn, min(size, 4 if quick else 8))
        times["no_reuse"].append(
            len(cells)
            / len(batch)
            * timed(device, lambda batch=batch: measure(model, batch, **sites, reuse=False))
        )
    floor = find_floor(model, device, cells, layers, size)
    ratios = {
        name: statistics.median(
            other / own for other, own in zip(times[name], times["reuse"], strict=True)
        )
        for name in ("no_reuse", "paper")
    }
    return {
        "grid": grid,
        "attention": attention,
        "dtype": str(model.dtype),
        "cells": len(cells),
        "layers": layers,
        "positions": POSITIONS,
        "batch_size": size,
        "longest_prompt": max(map(len, prompts)),
        "seconds": times,
        "extrapolated_from": {"paper": n_paper, "no_reuse": min(size, 4 if quick else 8)},
        "faster_than": ratios,
        "floor": floor,
        "times_the_floor": statistics.median(times["reuse"]) / floor["seconds"],
        "peak_bytes": peak or "left out: it is not told of a CPU",
        "weight_bytes": sum(weight.nbytes for weight in plain.parameters()),
    }


def find_floor(
    model: TransformersModel,
    device: torch.device,
    cells: Sequence[Cell],
    layers: list[int],
    batch_size: int,
) -> dict[str, float]:
    """The least seconds, by what the device was measured to do."""
    work, said = least_multiply_adds(model, cells, layers)
    rate = multiply_rate(device, model.dtype, model.config.hidden_size, 4096)
    weights = sum(weight.nbytes for weight in model._module.parameters())
    reads = read_rate(device, min(weights, 2**31))
    steps = math.ceil(len(cells) / batch_size) * N_SAID
    multiplying, reading = (work + said) / rate, steps * weights / reads
    return {
        "multiply_adds": work + said,
        "multiply_adds_a_second": rate,
        "multiplying_seconds": multiplying,
        "weight_bytes_read": steps * weights,
        "bytes_a_second": reads,
        "reading_seconds": reading,
        "seconds": max(multiplying, reading),
    }


def _sample(cells: Sequence[Cell], turn: int, n: int) -> list[Cell]:
    """Some of the cells, spread over all; others each turn."""
    step = max(1, len(cells) // n)
    return [cells[(turn + k * step) % len(cells)] for k in range(min(n, len(cells)))]


def _paper(plain: Any, tokenizer: Any, cells: list[Cell], layers: list[int]) -> Callable[[], Any]:
    return lambda: paper_schedule(plain, tokenizer, cells, layers, POSITIONS)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
