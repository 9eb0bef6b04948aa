"""How much prefix reuse and layer resume save, side by side in one run.

    python tests/benchmarks/reuse.py small       the bundled model, long grid, all layers
    python tests/benchmarks/reuse.py real        SmolLM2-135M-Instruct, short and long grid
    python tests/benchmarks/reuse.py large       24 layers, 896 wide (random), short grid, 5 layers
    python tests/benchmarks/reuse.py long        the same on long prompts
    python tests/benchmarks/reuse.py growth      time against cells, layers, positions and length
    python tests/benchmarks/reuse.py memory      memory over 200 batches

Medians of ratios; every schedule of a comparison runs in the same process, in turns.
"""

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from least_schedule import count_beginnings, least_schedule
from nnsight import TransformersModel
from paper_schedule import paper_schedule
from rich.console import Console
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from persona_nns.declarations.catalog import load_experiment
from persona_nns.declarations.sites import parse_layers
from persona_nns.models.load import load_model
from persona_nns.prompts.grids import Cell, load_grid
from persona_nns.prompts.render import render_cell

GOLDEN = Path(__file__).parents[1] / "golden" / "qwen2"
POSITIONS = ["p_last", "g1", "g2"]
DEPTHS = "0.25,0.40,0.55,0.70,0.85"
N_SAID = 12  # reference tokens: ten scored, and two that g1 and g2 are forced on

console = Console()
measure = load_experiment("localized_positions").measure


def small() -> None:
    """The bundled model on the long grid at all layers."""
    model = load_model("organism-qwen2")
    cells = list(load_grid("long").cells)
    compare(model, cells, parse_layers("all", len(model.layers)), sample=12)


def real() -> None:
    """A language model, on both grids of the paper at its five depths."""
    model = load_model("smollm2-135m-instruct", dtype="float32")
    for grid in ("short", "long"):
        cells = list(load_grid(grid).cells)
        layers = parse_layers(DEPTHS, len(model.layers))
        compare(model, cells, layers, sample=2, turns=3, batched=False)


def large() -> None:
    """A random model of 24 layers on the short grid at five layers."""
    model = random_model()
    cells = list(load_grid("short").cells)
    compare(model, cells, parse_layers(DEPTHS, 24), sample=1, turns=len(cells), least=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    weights = sum(p.numel() * p.element_size() for p in model._module.parameters()) / 2**30
    console.print(f"peak memory of the process {peak:.2f} GiB, weights {weights:.2f} GiB")


def long() -> None:
    """The same model on the long grid."""
    cells = list(load_grid("long").cells)
    compare(random_model(), cells, parse_layers(DEPTHS, 24), sample=1, batched=False)


def compare(
    model: TransformersModel,
    cells: list[Cell],
    layers: list[int],
    sample: int,
    turns: int = 3,
    *,
    batched: bool = True,
    least: bool = False,
) -> None:
    """Reuse against the paper's schedule, against batches without reuse, and the floor.

    The paper's schedule takes its cells one by one, so each turn times it on another sample of
    them and multiplies; batches without reuse are timed in the first turn. The schedule makes one
    intervention at a site, so the two of other size are left out.

    Args:
        model: from `load_model`.
        cells: the whole grid.
        layers: where the KL is measured.
        sample: cells that the paper's schedule is timed on in a turn.
        turns: how often all schedules are timed.
        batched: time batches without reuse.
        least: time the passes that the protocol cannot do without, in bare transformers.
    """
    sites: dict[str, Any] = {"layers": layers, "positions": POSITIONS, "rms": False}
    plain = model._module
    measure(model, cells[:2], **sites)
    names = ("reuse", "batched", "paper", "least", "floor")
    times: dict[str, list[float]] = {name: [] for name in names}
    work, said = least_multiply_adds(model, cells, layers)
    rows: list[float] = []
    for turn in range(turns):
        some = cells[turn * sample : (turn + 1) * sample]
        times["reuse"].append(timed(lambda: measure(model, cells, **sites)))
        rate, slow = (matmul_rate(model.config.hidden_size, n) for n in (512, len(cells)))
        times["floor"].append((work + said) / rate)
        rows.append(work / rate + said / slow)
        if batched and turn == 0:
            times["batched"].append(timed(lambda: measure(model, cells, **sites, reuse=False)))
        seconds = timed(
            lambda some=some: paper_schedule(plain, model.tokenizer, some, layers, POSITIONS)
        )
        times["paper"].append(seconds * len(cells) / sample)
        if least:
            passes = partial(least_schedule, plain, model.tokenizer, cells, layers, len(POSITIONS))
            times["least"].append(timed(passes))
    ours = measure(model, cells, **sites)["kl"]
    theirs = paper_schedule(plain, model.tokenizer, cells[:1], layers, POSITIONS)
    longest = max(len(render_cell(model.tokenizer, cell)["XY"]) for cell in cells)
    console.print(
        f"{model.config.num_hidden_layers} layers, {len(cells)} cells, {len(layers)} layers asked, "
        f"{len(POSITIONS)} positions, prompts of up to {longest} tokens; medians of {turns} turns"
    )
    median = {name: statistics.median(of) for name, of in times.items() if of}
    for name in median:
        of = times[name]
        pairwise = statistics.median(
            other / own for other, own in zip(of, times["reuse"], strict=False)
        )
        shown = ", ".join(f"{seconds:.2f}" for seconds in of)
        console.print(f"  {name:8} {median[name]:8.2f} s  {pairwise:7.2f} x reuse  ({shown})")
    difference = float((ours[0] - theirs[0]).abs().max())
    console.print(f"  reuse is {median['reuse'] / median['floor']:.2f} x the floor")
    if least:
        ratio = statistics.median(map(float.__truediv__, times["paper"], times["least"]))
        console.print(
            f"  the least passes in bare transformers are {ratio:.2f} x faster than the paper's "
            "schedule (median of pairs)"
        )
    bound = statistics.median(rows)
    console.print(
        f"  floor with what is said at the rate of products of {len(cells)} rows {bound:.2f} s: "
        f"at most {median['paper'] / bound:.1f} x faster than the paper's schedule"
    )
    console.print(f"  largest difference from the paper's schedule in a KL {difference:.1e}")


def growth() -> None:
    """Time for one more layer, cell and position, and for longer prompts."""
    model = random_model()
    cells = list(load_grid("short").cells)
    more = [replace(cell, persona=f"{cell.persona}{k}") for k in range(8) for cell in cells]
    measure(model, cells, layers=[8], positions=["p_last"])
    long = list(load_grid("long").cells)
    few, several = [8], [8, 9, 10, 11, 12]
    cases: dict[str, tuple[list[Cell], list[int], list[str]]] = {
        "12 cells": (more[:12], few, ["p_last"]),
        "48 cells": (more[:48], few, ["p_last"]),
        "96 cells": (more[:96], few, ["p_last"]),
        "48 cells, 5 layers": (more[:48], several, ["p_last"]),
        "48 cells, 3 positions": (more[:48], few, POSITIONS),
        "48 cells of the long grid": (long, few, ["p_last"]),
    }
    measured: dict[str, tuple[float, int]] = {}
    for name, (asked, layers, positions) in cases.items():
        sites: dict[str, Any] = {"layers": layers, "positions": positions, "rms": False}
        with counted(model) as work:
            measure(model, asked, **sites)
        times = [timed(lambda a=asked, s=sites: measure(model, a, **s)) for _ in range(3)]
        seconds, n = statistics.median(times), work[0]
        measured[name] = seconds, n
        each = f"{1e6 * seconds / n:.0f} µs each"
        console.print(f"{name}: {seconds:.2f} s, {n} token-layers, {each}")
    for name, base in (
        ("48 cells", "12 cells"),
        ("96 cells", "48 cells"),
        ("48 cells, 5 layers", "48 cells"),
        ("48 cells, 3 positions", "48 cells"),
        ("48 cells of the long grid", "48 cells"),
    ):
        (seconds, n), (less, fewer) = measured[name], measured[base]
        more_each = 1e6 * (seconds - less) / (n - fewer)
        console.print(f"from {base} to {name}: {more_each:.0f} µs for each further token-layer")


def memory() -> None:
    """Resident memory over 200 batches of a small model."""
    model = load_model(GOLDEN)
    cells = list(load_grid("short").cells)
    for batch in range(201):
        measure(model, cells, layers=[2, 4], positions=["p_last", "g1"])
        if batch % 50 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            console.print(f"after batch {batch}: {pages * 4096 / 2**20:.0f} MiB")


def counted(model: TransformersModel) -> Any:
    """Count token-layers (the context manager of the tests)."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from test_window import counted_work

    return counted_work(model)


def timed(call: Callable[[], Any]) -> float:
    """Wall-clock seconds of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def random_model() -> TransformersModel:
    """24 layers, 896 wide, 0.36 billion parameters, random, with the golden tokenizer."""
    config = Qwen2Config(
        vocab_size=1024,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:  # of 1.4 GB
        Qwen2ForCausalLM(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(GOLDEN).save_pretrained(folder)
        return load_model(folder, label="random-24x896")


def least_multiply_adds(
    model: TransformersModel, cells: Sequence[Cell], layers: list[int]
) -> tuple[float, float]:
    """Multiply-adds of the linear layers that the protocol cannot do without.

    Returns:
        Those that can be made for many tokens at a time, and those of the tokens that the model
        says, one step after another.
    """
    config = model.config
    d, n = config.hidden_size, config.num_hidden_layers
    kv = config.num_key_value_heads * d // config.num_attention_heads
    block = 2 * d * d + 2 * d * kv + 3 * d * config.intermediate_size
    clean = (count_beginnings(model.tokenizer, cells) + len(cells) * 3 * 2) * n * block
    said = len(cells) * (N_SAID - 1) * (n * block + d * config.vocab_size)
    moved = len(cells) * len(POSITIONS) * sum(10 * (n - layer) for layer in layers) * block
    scored = len(cells) * (1 + 10 * len(POSITIONS) * len(layers)) * d * config.vocab_size
    return clean + moved + scored, said


def matmul_rate(width: int, n_rows: int) -> float:
    """Multiply-adds a second of a float32 product of the model's shape, over sixteen of them.

    As in a model, each weight is another one than the last: none stays in the processor's cache.
    """
    weights = [torch.randn(5 * width, width) for _ in range(16)]
    rows = torch.randn(n_rows, width)

    def pass_over() -> None:
        for weight in weights:
            torch.nn.functional.linear(rows, weight)

    seconds = statistics.median(timed(pass_over) for _ in range(9))
    return len(weights) * rows.numel() * 5 * width / seconds


if __name__ == "__main__":
    wanted = {each.__name__: each for each in (small, real, large, long, growth, memory)}
    if len(sys.argv) != 2 or sys.argv[1] not in wanted:
        sys.exit(f"usage: reuse.py {'|'.join(wanted)}")
    wanted[sys.argv[1]]()
