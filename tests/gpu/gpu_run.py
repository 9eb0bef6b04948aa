"""All parts of what a GPU has to show; `run.sh` starts it."""

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_agreement import compare_bfloat16, compare_spread, compare_with_cpu
from gpu_machine import exact_float32, tell_machine
from gpu_models import SEVEN, TINY, find_smollm2, shaped_model
from gpu_report import Report
from gpu_speed import compare_schedules

import persona_nns as pn

#: Of eight minutes; the rest is for starting, and for a part that takes longer than it was given.
SECONDS = 430
ORGANISMS = ("organism-qwen2", "organism-gemma2")
GRIDS, ATTENTION = ("short", "long"), ("eager", "sdpa")


def main(arguments: Sequence[str]) -> int:
    """Run the parts; 1 where one of them failed."""
    asked = _asked(arguments)
    device = torch.device(asked.device, 0) if asked.device == "cuda" else torch.device("cpu")
    exact_float32()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    report = Report(asked.output, SECONDS, device=str(device), quick=asked.quick, started=started)
    report.part("machine", 0, lambda _: tell_machine(device))
    smollm2, lacking = find_smollm2(asked.smollm2)
    fine = [_agree(report, device, smollm2, lacking, quick=asked.quick)]
    fine.append(_race(report, device, smollm2, lacking, quick=asked.quick))
    return 0 if all(fine) else 1


def _asked(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/gpu/run.sh", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu.json"), metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="every line, on fewer cells")
    parser.add_argument("--smollm2", type=Path, metavar="FOLDER", help="its GGUF file, or parts")
    asked = parser.parse_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu rehearses")
    return asked


def _agree(
    report: Report, device: torch.device, smollm2: str, lacking: str, *, quick: bool
) -> bool:
    fine = True
    for name in ORGANISMS[: 1 if quick else None]:
        # The first organism is the one that every experiment has to be seen on.
        share = 0.45 if name == ORGANISMS[0] else 0.3
        fine &= report.part(
            f"agreement: {name}",
            10,
            lambda left, name=name, share=share: compare_with_cpu(
                name, device, share * left, quick=quick
            ),
        )
    fine &= report.part("agreement: spread", 5, lambda _: compare_spread(ORGANISMS[0], device))
    if device.type != "cuda" or torch.cuda.device_count() == 1:
        report.leave_out("agreement: spread over several", "there is one device")
    fine &= report.part(
        f"agreement: bfloat16, {ORGANISMS[0]}",
        5,
        lambda _: compare_bfloat16(ORGANISMS[0], device, quick=quick),
    )
    if lacking:
        report.leave_out("agreement: bfloat16, smollm2", lacking)
    else:
        fine &= report.part(
            "agreement: bfloat16, smollm2",
            15,
            lambda _: compare_bfloat16(smollm2, device, quick=quick),
        )
    return fine


def _race(report: Report, device: torch.device, smollm2: str, lacking: str, *, quick: bool) -> bool:
    shape, shown = (SEVEN, "7B") if device.type == "cuda" else (TINY, "tiny, in place of 7B")
    makers: dict[str, Any] = {f"random Qwen2 ({shown})": partial(shaped_model, shape, device)}
    if lacking:
        report.leave_out("speed: smollm2", lacking)
    else:
        # Processors multiply bfloat16 slowly: there it would be another comparison.
        dtype = "bfloat16" if device.type == "cuda" else "float32"
        makers["smollm2"] = partial(pn.load_model, smollm2, device=str(device), dtype=dtype)
    fine, n_left = True, len(makers) * len(GRIDS) * len(ATTENTION)
    for name, make in makers.items():
        kept: list[Any] = []  # made within the first part: it may not fit
        for grid in reversed(GRIDS):  # the long one is what is asked for first
            for attention in ATTENTION:
                fine &= report.part(
                    f"speed: {name}, {grid} grid, {attention}",
                    5,
                    lambda left, make=make, kept=kept, asked=(grid, attention), n=n_left: (
                        compare_schedules(_made(kept, make), device, *asked, left / n, quick=quick)
                    ),
                )
                n_left -= 1
        kept.clear()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return fine


def _made(kept: list[Any], make: Callable[[], Any]) -> Any:
    """What has been made, or is now."""
    if not kept:
        kept.append(make())
    return kept[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
