"""This project beside what a user would pick instead, on the same work.

    python tests/benchmarks/peers.py             all of them, three turns
    python tests/benchmarks/peers.py --turns 5 --only hand project command
    python tests/benchmarks/peers.py --beside PROGRAM    another version's persona-nns, in pairs

SmolLM2-135M-Instruct, short grid (12 cells), five layers, three positions, float32: the causal KL
of additive substitution. Each turn starts a process for each competitor, one after another, which
loads the model and measures twice: the first time and again. The numbers of all are compared, on
two cells before anything is timed and on all of them in each turn. Threads are those that
OMP_NUM_THREADS says, torch's own choice without it. TransformerLens is left out where it is not
installed.
"""

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

MODEL = "smollm2-135m-instruct"
DEPTHS, POSITIONS = "0.25,0.40,0.55,0.70,0.85", ["p_last", "g1", "g2"]
NAMES = {
    "project": "this project",
    "hand": "key-value cache reused by hand, transformers",
    "batched": "batched hooks, transformers",
    "nnsight": "plain nnsight",
    "lens": "TransformerLens",
    "paper": "the paper's schedule",
}
COMMAND = "persona-nns run, the whole command"
# The paper's schedule takes its cells one by one: some are timed, and multiplied.
PAPER_CELLS = 2
ATOL, RTOL = 2e-4, 2e-3

console = Console(width=120)


def loaded(name: str) -> tuple[Callable[..., torch.Tensor], Any]:
    """A competitor: what measures (cells, layers), and its tokenizer."""
    if name == "project":
        from persona_nns.declarations.catalog import load_experiment
        from persona_nns.models.load import load_model

        model = load_model(MODEL, dtype="float32")
        measure = load_experiment("localized_positions").measure
        return lambda cells, layers: measure(
            model, cells, layers=layers, positions=POSITIONS, rms=False
        )["kl"], model.tokenizer
    import peer_schedules
    from paper_schedule import paper_schedule
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from persona_nns.models.checkpoints import find_checkpoint

    folder = find_checkpoint(MODEL)[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if name == "nnsight":
        from nnsight import TransformersModel

        model = TransformersModel(
            folder, task="text-generation", tokenizer=tokenizer, dispatch=True, dtype=torch.float32
        )
        return partial(_by_batch, peer_schedules.in_nnsight, model, tokenizer), tokenizer
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if name == "paper":
        return lambda cells, layers: paper_schedule(
            plain, tokenizer, cells, layers, POSITIONS
        ), tokenizer
    if name == "lens":
        bridges: Any = import_module("transformer_lens.model_bridge")
        bridge = bridges.TransformerBridge.boot_transformers(
            folder, hf_model=plain, tokenizer=tokenizer, dtype=torch.float32, device="cpu"
        )
        return partial(_by_batch, peer_schedules.in_transformer_lens, bridge, tokenizer), tokenizer
    schedule = {"batched": peer_schedules.batched, "hand": peer_schedules.reused_by_hand}[name]
    return partial(_by_batch, schedule, plain, tokenizer), tokenizer


def _by_batch(
    schedule: Any, model: Any, tokenizer: Any, cells: list[Any], layers: list[int]
) -> torch.Tensor:
    """A schedule of all cells at a time, with its prompts."""
    from peer_schedules import Work

    from persona_nns.declarations.sites import generated_index
    from persona_nns.prompts.render import ROLE_PROMPTS, render_cells

    rendered = render_cells(tokenizer, cells)
    prompts: dict[str, list[list[int]]] = {
        name: [list(of[name].ids) for of in rendered] for name in ROLE_PROMPTS
    }
    return schedule(model, Work(prompts, layers, [generated_index(each) for each in POSITIONS]))


def one(name: str, n_cells: int, times: int) -> None:
    """Load a competitor and measure so many times; prints one line of JSON."""
    from persona_nns.declarations.sites import parse_layers
    from persona_nns.prompts.grids import load_grid

    measure, _ = loaded(name)
    cells = list(load_grid("short").cells)[:n_cells]
    layers = parse_layers(DEPTHS, 30)
    runs: list[dict[str, float]] = []
    kl = torch.empty(0)
    for _ in range(times):
        started, used = time.perf_counter(), _used(resource.RUSAGE_SELF)
        kl = measure(cells, layers)
        runs.append(
            {
                "seconds": time.perf_counter() - started,
                "cpu": _used(resource.RUSAGE_SELF) - used,
                "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
        )
    sys.stdout.write("\n" + json.dumps({"runs": runs, "kl": kl.tolist()}) + "\n")


def _used(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def started(name: str, n_cells: int, times: int) -> dict[str, Any]:
    """A competitor in a process of its own."""
    asked = ["--one", name, "--cells", str(n_cells), "--times", str(times)]
    ran = subprocess.run([sys.executable, __file__, *asked], capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{name}: {ran.stderr}")
    return json.loads(ran.stdout.splitlines()[-1])


def command(program: str) -> dict[str, float]:
    """The whole command, with a store of its own."""
    with tempfile.TemporaryDirectory() as folder:
        asked = ["run", "localized_positions", "--model", MODEL, "--grid", "short", "--no-rms"]
        store = ["--dtype", "float32", "--store", str(Path(folder) / "results.zarr")]
        began = time.perf_counter()
        process = subprocess.Popen(
            [program, *asked, *store], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
    if status:
        raise RuntimeError(f"{program} failed.")
    return {
        "seconds": seconds,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak_gb": usage.ru_maxrss / 2**20,
    }


def compare(
    turns: int, times: int, only: list[str], beside: str | None, table: Path | None
) -> None:
    """All of them, in turns."""
    here = str(Path(sys.executable).with_name("persona-nns"))
    names = [name for name in NAMES if not only or name in only]
    expected = torch.tensor(started("hand", 2, 1)["kl"])
    for name in list(names):
        try:
            found = torch.tensor(started(name, 2, 1)["kl"])
        except RuntimeError as error:
            if name != "lens":
                raise
            console.print(f"TransformerLens is left out: {str(error).splitlines()[-1]}")
            names.remove(name)
            continue
        torch.testing.assert_close(
            found, expected, atol=ATOL, rtol=RTOL, msg=lambda m, n=name: f"{n}: {m}"
        )
        console.print(f"{NAMES[name]}: on two cells, {(found - expected).abs().max():.1e} nat off")
    programs = {"command": here} if not only or "command" in only else {}
    if beside is not None:
        programs["beside"] = beside
    first: dict[str, list[dict[str, float]]] = {}
    again: dict[str, list[dict[str, float]]] = {}
    for turn in range(turns):
        whole: torch.Tensor | None = None
        for name in names:
            n_cells = PAPER_CELLS if name == "paper" else 12
            said = started(name, n_cells, times)
            found = torch.tensor(said["kl"])
            whole = found if whole is None else whole
            torch.testing.assert_close(found, whole[:n_cells], atol=ATOL, rtol=RTOL)
            for runs, run in zip((first, again), said["runs"], strict=False):
                more = {key: run[key] * 12 / n_cells for key in ("seconds", "cpu")}
                runs.setdefault(name, []).append({**run, **more})
        for name, program in programs.items():
            first.setdefault(name, []).append(command(program))
        seconds = ", ".join(f"{name} {runs[-1]['cpu']:.1f}" for name, runs in first.items())
        console.print(f"turn {turn + 1} of {turns}: {seconds} CPU s")
    shown(first, again, table)


def shown(
    first: dict[str, list[dict[str, float]]],
    again: dict[str, list[dict[str, float]]],
    table: Path | None,
) -> None:
    """The table; ratios are medians of the turns' own."""
    titles = {**NAMES, "command": COMMAND, "beside": f"{COMMAND}, the other version"}

    def ratio(name: str, key: str) -> str:
        if "project" not in first or name in ("command", "beside"):
            return ""
        pairs = zip(first[name], first["project"], strict=True)
        return f"{statistics.median(other[key] / own[key] for other, own in pairs):.2f}"

    def median(runs: list[dict[str, float]] | None, key: str) -> str:
        return f"{statistics.median(run[key] for run in runs):.2f}" if runs else ""

    rows = [
        [
            titles[name],
            median(first[name], "seconds"),
            median(first[name], "cpu"),
            ratio(name, "cpu"),
            median(again.get(name), "cpu"),
            median(first[name], "peak_gb"),
        ]
        for name in first
    ]
    head = ["what", "first, s", "first, CPU s", "times this project's", "again, CPU s", "peak GiB"]
    for row in [head, *rows]:
        console.print("  ".join(f"{cell:>12}" for cell in row[1:]), row[0], sep="  ")
    if {"command", "beside"} <= first.keys():
        for key in ("seconds", "cpu"):
            pairs = zip(first["command"], first["beside"], strict=True)
            ratios = [own[key] / other[key] for own, other in pairs]
            console.print(f"command, {key}: {statistics.median(ratios):.2f} of the other version's")
    if table is not None:
        with table.open("w", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows([head, *rows])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], choices=[*NAMES, "command"])
    parser.add_argument("--beside", help="the persona-nns of another version")
    parser.add_argument("--table", type=Path, help="where the table is written, as CSV")
    parser.add_argument("--one", choices=NAMES)
    parser.add_argument("--cells", type=int, default=12)
    parser.add_argument("--times", type=int, default=2, help="1 leaves out the second")
    given = parser.parse_args()
    if given.one is not None:
        one(given.one, given.cells, given.times)
    else:
        compare(given.turns, given.times, given.only, given.beside, given.table)
