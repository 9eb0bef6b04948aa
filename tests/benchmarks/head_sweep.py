"""The full head sweep of persona_patching against one forward pass a patch.

    python tests/benchmarks/head_sweep.py [MODEL] [--pairs 10] [--questions 20] [--threads N]

Both patch every head of every block, at all positions and at the identity, in the same pairs and
questions. The loop is what plain transformers with a forward hook does for one patch (batch of
one, no cache, logits of the last token only), measured on a share of each pair's patches and
multiplied out. Both count the unpatched runs of the pair. Pair by pair, one after the other.
"""

import argparse
import random
import statistics
import sys
import time
from typing import Any

import torch

import persona_nns as pn
from persona_nns.declarations.catalog import load_experiment
from persona_nns.prompts.identities import Pair, align
from persona_nns.tracing.patching import chunk_questions


def main() -> None:
    """Measure both and print the ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="organism-qwen2")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--sample", type=int, default=60, help="patches that the loop does")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = pn.load_model(arguments.model)
    module = sys.modules[load_experiment("persona_patching").measure.__module__]
    plan = module.plan(model.tokenizer, n_questions=arguments.questions)
    pairs = [pair for pair in plan.units if not pair.is_diagonal]
    pairs = random.Random(0).sample(pairs, arguments.pairs)
    n_layers, n_heads = len(model.layers), model.config.num_attention_heads
    patches = [
        (question, layer, head, position_set)
        for question in range(arguments.questions)
        for layer in range(n_layers)
        for head in range(n_heads)
        for position_set in module.PATCHED_POSITIONS
    ]
    sweeps: list[float] = []
    loops: list[float] = []
    error = 0.0
    with torch.inference_mode():
        sweep_heads(module, model, pairs[0])  # warm up
        for k, pair in enumerate(pairs):
            started = time.perf_counter()
            swept = sweep_heads(module, model, pair)
            sweeps.append(time.perf_counter() - started)

            started = time.perf_counter()
            kept = [keep_clean(model, pair, question) for question in range(arguments.questions)]
            unpatched = time.perf_counter() - started
            sample = random.Random(k).sample(patches, min(arguments.sample, len(patches)))
            started = time.perf_counter()
            looped = [patch_once(model, kept[patch[0]], pair, *patch) for patch in sample]
            each = (time.perf_counter() - started) / len(sample)
            loops.append(unpatched + each * len(patches))
            for (question, layer, head, position_set), logits in zip(sample, looped, strict=True):
                ours = swept[question, layer, head, module.PATCHED_POSITIONS.index(position_set)]
                error = max(error, float((ours - logits).abs().max()))
    print(
        f"{arguments.model}, {arguments.threads} threads: {arguments.pairs} pairs × "
        f"{arguments.questions} questions × {n_layers} layers × {n_heads} heads × 2 position sets"
    )
    print(f"sweep {sum(sweeps):.1f} s, one forward a patch {sum(loops):.1f} s", end=" ")
    print(f"(from {arguments.sample} of {len(patches)} patches a pair)")
    ratios = sorted(loop / sweep for loop, sweep in zip(loops, sweeps, strict=True))
    print(
        f"ratio {statistics.median(ratios):.1f} (median of the pairs; {ratios[0]:.1f} to "
        f"{ratios[-1]:.1f}), largest difference {error:.1e} logits"
    )


def sweep_heads(module: Any, model: Any, pair: Pair) -> torch.Tensor:
    """What `measure` does for heads, [question, layer, head, position set, letter]."""
    parts, order = [], []
    for chunk in chunk_questions(model, pair):
        run = module.run_unpatched(model, pair.only(chunk), reuse=True)
        parts.append(module._patch_heads(model, run, range(len(model.layers))))
        order += chunk
    return torch.cat(parts)[torch.tensor(order).argsort()]


def keep_clean(model: Any, pair: Pair, question: int) -> list[torch.Tensor]:
    """The projection inputs of the clean run, one forward, and another for the corrupt run."""
    inputs: list[torch.Tensor] = []
    blocks = [block.attn.o_proj._module for block in model.layers]
    hooks = [
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in blocks
    ]
    for asked in (pair.asked_clean[question], pair.asked_corrupt[question]):
        model._module(input_ids=torch.tensor([asked.ids]), use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return inputs[: len(blocks)]


def patch_once(
    model: Any,
    kept: list[torch.Tensor],
    pair: Pair,
    question: int,
    layer: int,
    head: int,
    position_set: str,
) -> torch.Tensor:
    """One forward pass with one head patched; the letters' logits."""
    asked = pair.asked_corrupt[question]
    clean = kept[layer]
    chosen = asked.identity if position_set == "identity" else range(len(asked.ids))
    partner = align(pair.asked_clean[question], asked)
    to = [k for k in chosen if partner[k] >= 0]
    width = clean.shape[-1] // model.config.num_attention_heads
    own = slice(head * width, (head + 1) * width)

    def overwrite(_: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        value = args[0].clone()
        value[0, to, own] = clean[0, [partner[k] for k in to], own]
        return (value,)

    hook = model.layers[layer].attn.o_proj._module.register_forward_pre_hook(overwrite)
    output = model._module(input_ids=torch.tensor([asked.ids]), use_cache=False, logits_to_keep=1)
    hook.remove()
    return output.logits[0, -1, list(asked.letters)]


if __name__ == "__main__":
    main()
