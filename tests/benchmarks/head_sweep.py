"""The full head sweep of persona_patching against one forward pass a patch.

    python tests/benchmarks/head_sweep.py [MODEL] [--pairs 10] [--questions 20]

Both patch every head of every block, at all positions and at the identity, in the same pairs and
questions. The sweep is measured whole, unpatched runs included; the loop is what plain
transformers with a forward hook does for one patch (batch of one, no cache, logits of the last
token only), measured on a share of the patches and multiplied out.
"""

import argparse
import random
import sys
import time
from typing import Any

import torch

import persona_nns as pn
from persona_nns.catalog import load_experiment
from persona_nns.students import Pair, align


def main() -> None:
    """Measure both and print the ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="organism-qwen2")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--sample", type=int, default=300, help="patches that the loop does")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = pn.load_model(arguments.model)
    module = sys.modules[load_experiment("persona_patching").measure.__module__]
    plan = module.plan(model.tokenizer, n_questions=arguments.questions)
    pairs = [pair for pair in plan.units if not pair.is_diagonal]
    pairs = random.Random(0).sample(pairs, arguments.pairs)
    n_layers, n_heads = len(model.layers), model.config.num_attention_heads
    patches = [
        (pair, question, layer, head, position_set)
        for pair in pairs
        for question in range(arguments.questions)
        for layer in range(n_layers)
        for head in range(n_heads)
        for position_set in module.POSITION_SETS
    ]
    with torch.inference_mode():
        sweep_heads(module, model, pairs[0])  # warm up
        started = time.perf_counter()
        swept = [sweep_heads(module, model, pair) for pair in pairs]
        sweep = time.perf_counter() - started

        sample = random.Random(1).sample(patches, min(arguments.sample, len(patches)))
        kept: dict[Any, Any] = {}
        for pair, question, *_ in sample:
            keep_clean(model, pair, question, kept)
        started = time.perf_counter()
        looped = [patch_once(model, kept, *patch) for patch in sample]
        loop = (time.perf_counter() - started) / len(sample) * len(patches)

    error = 0.0
    for (pair, question, layer, head, position_set), logits in zip(sample, looped, strict=True):
        s = module.POSITION_SETS.index(position_set)
        ours = swept[pairs.index(pair)][question, layer, head, s]
        error = max(error, float((ours - logits).abs().max()))
    print(
        f"{arguments.model}: {len(patches)} patches ({arguments.pairs} pairs × "
        f"{arguments.questions} questions × {n_layers} layers × {n_heads} heads × 2 position sets)"
    )
    print(f"sweep {sweep:.1f} s, one forward a patch {loop:.1f} s (from {len(sample)} patches)")
    print(f"ratio {loop / sweep:.1f}, largest difference {error:.1e} logits")


def sweep_heads(module: Any, model: Any, pair: Pair) -> torch.Tensor:
    """What `measure` does for heads, [question, layer, head, position set, letter]."""
    rows = [*pair.asked_clean, *pair.asked_corrupt]
    run = module._run_unpatched(model, rows, reuse=True)
    source, patched = module._partners(run, pair.asked_clean, pair.asked_corrupt)
    return module._patch_heads(model, run, source, patched, list(range(len(model.layers))))


def keep_clean(model: Any, pair: Pair, question: int, kept: dict[Any, Any]) -> None:
    """The clean run's projection inputs: run once for each persona and question, not timed."""
    key = (pair.clean, question)
    if key in kept:
        return
    inputs: list[torch.Tensor] = []
    blocks = [block.attn.o_proj._module for block in model.layers]
    hooks = [
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in blocks
    ]
    ids = torch.tensor([pair.asked_clean[question].ids])
    model._module(input_ids=ids, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    kept[key] = inputs


def patch_once(
    model: Any,
    kept: dict[Any, Any],
    pair: Pair,
    question: int,
    layer: int,
    head: int,
    position_set: str,
) -> torch.Tensor:
    """One forward pass with one head patched; the letters' logits."""
    asked = pair.asked_corrupt[question]
    clean = kept[pair.clean, question][layer]
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
