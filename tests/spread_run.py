"""Run experiments on a model in two halves, on pretended devices, beside the whole model.

    python tests/spread_run.py FOLDER MODEL [--waits] CASE …

In a process of its own: torch keeps what it is told of pretended devices. Prints JSON: by case, the
largest difference, or what went wrong. With ``--waits``: how often saying 4 and 14 tokens waits.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import everywhere
import torch
from pretended_devices import halves, pretended

import persona_nns as pn
from persona_nns.tracing import Prefilled, left_pad, say

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, everywhere.on_grid(name)) for name in everywhere.ON_A_GRID},
    **{str(case): (case.experiment, case.options) for case in everywhere.CASES},
}


def main(folder: str, model: str, *asked: str) -> dict[str, Any]:
    """Run the cases in a folder."""
    whole = pn.load_model(model, device="cpu")
    os.chdir(folder)
    everywhere.write_inputs(whole)
    with pretended():
        spread = pn.load_model(model, device_map=halves(model))
    told: dict[str, Any] = {"devices": sorted(map(str, spread.devices))}
    for shown in asked:
        if shown == "--waits":
            told["waits"] = [count_waits(spread, n) for n in (4, 14)]
            told["of transformers"] = [count_plain_waits(spread, n) for n in (4, 14)]
            continue
        name, options = CASES[shown]
        here = pn.run(name, whole, store=f"{shown}-here.zarr", progress=False, **options)
        try:
            with pretended():
                there = pn.run(name, spread, store=f"{shown}.zarr", progress=False, **options)
            told[shown] = everywhere.compare(here, there, atol=1e-5)
        except (RuntimeError, AssertionError, pn.PersonaError):
            told[shown] = traceback.format_exc()
    return told


def count_waits(model: Any, n_tokens: int) -> int:
    """How often the host waits for a device while a model says so many tokens."""
    with pretended() as waits:
        say(model, Prefilled([[7, 3, 11], [5, 9]], None), n_tokens)
    return waits.total()


def count_plain_waits(model: Any, n_tokens: int) -> int:
    """The same of ``generate`` of transformers alone."""
    with pretended() as waits, torch.no_grad():
        batch = left_pad([[7, 3, 11], [5, 9]], device=model.device)
        model._module.generate(**batch.tokens, max_new_tokens=n_tokens, do_sample=False)
    return waits.total()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], str(Path(sys.argv[2]).resolve()), *sys.argv[3:])))
