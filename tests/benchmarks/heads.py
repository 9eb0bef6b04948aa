"""The exact effects of head_budget against one full forward a head.

    python tests/benchmarks/heads.py [MODEL] [--cells 3] [--sample 30] [--threads N]

Both patch every head of every block at the places of a cell and give its KL from the clean run.
The forward is what plain transformers with a hook does for one head: the whole row of the host,
without a cache, of one row; with the logits of every token, as a forward gives them, and with
those of the scored tokens alone. Sampled heads, of different layers, stand for all. Everything is
measured in turns in one process, cell by cell, so that what else the machine does meets both.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import persona_nns as pn
from persona_nns.declarations.catalog import load_experiment
from persona_nns.prompts.twins import Twins, find_twins
from persona_nns.tracing.heads import TwinRuns
from persona_nns.tracing.metrics import log_probabilities, summed_kl


def main() -> None:
    """Measure both and print the ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--cells", type=int, default=3)
    parser.add_argument("--sample", type=int, default=30, help="heads that the forwards do")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = pn.load_model(arguments.model, dtype="float32")
    module = sys.modules[load_experiment("head_budget").measure.__module__]
    cells = random.Random(0).sample(pn.load_grid("review").cells, arguments.cells)
    ratios: dict[int, list[float]] = {0: [], 1: []}
    for k, (label, twins) in enumerate(find_twins(model.tokenizer, cells).items()):
        runs = module.run_twins(model, [twins], 10, reuse=True)[label]
        if not k:
            module.patch_alone(model, runs, 0, [0])  # warm up
        heads = [
            (layer, head) for layer in range(len(model.layers)) for head in range(runs.n_heads)
        ]
        sample = random.Random(k).sample(heads, arguments.sample)
        taken, of_layer = {}, {}
        # In turns: some layers of ours, some forwards.
        share = -(-len(sample) // len(model.layers))
        spent = {0: 0.0, 1: 0.0, "ours": 0.0}
        error = 0.0
        for layer in range(len(model.layers)):
            patch = partial(module.patch_alone, model, runs, layer, range(runs.n_heads))
            of_layer[layer], seconds = timed(patch)
            spent["ours"] += seconds
            for at in sample[layer * share : (layer + 1) * share]:
                for keep in (0, 1):
                    once = partial(forward, model, runs, twins, *at, keep=bool(keep))
                    taken[at], seconds = timed(once)
                    spent[keep] += seconds
        for (layer, head), kl in taken.items():
            error = max(error, abs(float(of_layer[layer][head]) - kl))
        each = {keep: spent[keep] / len(sample) for keep in (0, 1)}
        for keep, seconds in each.items():
            ratios[keep].append(seconds * len(heads) / spent["ours"])
        print(
            f"{label}: {len(heads)} heads, {runs.n_places} places of {len(host_of(runs, twins))} "
            f"tokens: {spent['ours']:.1f} s; one forward a head {each[0] * len(heads):.1f} s, with "
            f"the scored logits alone {each[1] * len(heads):.1f} s; ratio {ratios[0][-1]:.1f} and "
            f"{ratios[1][-1]:.1f}; largest difference {error:.1e} nat"
        )
    whole, scored = (statistics.median(ratios[keep]) for keep in (0, 1))
    print(
        f"{arguments.model}, {torch.get_num_threads()} threads: ratio {whole:.1f}, with the scored "
        f"logits alone {scored:.1f} (medians over {arguments.cells} cells)"
    )


def timed(measure: Callable[[], Any]) -> tuple[Any, float]:
    """What is measured, and how many seconds that took."""
    started = time.perf_counter()
    return measure(), time.perf_counter() - started


def host_of(runs: TwinRuns, twins: Twins) -> list[int]:
    """The tokens of the host's whole row."""
    return [*twins.host, *runs.host.window.input_ids[0, twins.n_shared :].tolist()]


@torch.no_grad()
def forward(
    model: Any, runs: TwinRuns, twins: Twins, layer: int, head: int, *, keep: bool
) -> float:
    """One forward pass with one head patched; KL from the clean run."""
    clean = runs.clean.heads[layer]
    width = clean.shape[-1] // runs.n_heads
    own = slice(head * width, (head + 1) * width)

    def overwrite(_: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        value = args[0].clone()
        value[:, -runs.n_places :, own] = clean[:, -runs.n_places :, own]
        return (value,)

    hook = model.layers[layer].attn.o_proj._module.register_forward_pre_hook(overwrite)
    n_scored = runs.clean.predicted.shape[1]
    row = torch.tensor([host_of(runs, twins)])
    logits = model._module(row, use_cache=False, logits_to_keep=n_scored if keep else 0).logits
    hook.remove()
    predicted = log_probabilities(logits[:, -n_scored:])
    scored = torch.ones(predicted.shape[:2], dtype=torch.bool)
    return float(summed_kl(runs.clean.predicted, predicted, scored))


if __name__ == "__main__":
    main()
