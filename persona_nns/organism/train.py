"""Train the bundled models from scratch: ``python -m persona_nns.organism.train``.

Everything is seeded: corpus, tokenizer, initial weights and the order of the batches.
"""

import argparse
import json
import math
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from persona_nns.organism.architectures import build, decoder_blocks
from persona_nns.organism.batches import IGNORED, TrainingBatch, batches
from persona_nns.organism.bundled import ORGANISMS, organism_folder
from persona_nns.organism.corpus import draw
from persona_nns.organism.residuals import swap_last_residuals
from persona_nns.organism.tokenizer import END_ID, PAD_ID, train_tokenizer

TOKENIZER_EXAMPLES = 20_000


@dataclass(frozen=True)
class Recipe:
    """How long and how fast one model learns."""

    steps: int = 1400
    tokens_per_batch: int = 2048
    learning_rate: float = 2.5e-3
    warmup: int = 100
    weight_decay: float = 0.05
    seed: int = 11
    swap_layer: int = 2
    swap_share: float = 0.5


RECIPES = {"organism-qwen2": Recipe(), "organism-gemma2": Recipe(steps=1900)}
"""Gemma2 learns the facts and the late interaction more slowly."""


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def answer_loss(model: PreTrainedModel, batch: TrainingBatch) -> Tensor:
    """Cross-entropy of the answers in nats, the mean over examples of the mean over tokens.

    Every example counts the same: with a plain mean over tokens the long answers would drown the
    single letters. Logits are computed for answer tokens alone.
    """
    hidden = model.get_decoder()(input_ids=batch.ids, use_cache=False).last_hidden_state
    scored = batch.labels != IGNORED
    logits = linear(hidden[scored], cast(Tensor, model.get_input_embeddings().weight))
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap:
        logits = torch.tanh(logits / cap) * cap
    weights = (scored / scored.sum(1, keepdim=True))[scored]
    losses = cross_entropy(logits, batch.labels[scored], reduction="none")
    return (weights * losses).sum() / len(batch.ids)


def maybe_swap(
    model: PreTrainedModel, batch: TrainingBatch, recipe: Recipe
) -> AbstractContextManager[None]:
    """Swap residuals at the recipe's layer in its share of the steps."""
    if torch.rand(()).item() >= recipe.swap_share:
        return nullcontext()
    return swap_last_residuals(decoder_blocks(model)[recipe.swap_layer], batch.last)


def fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Train in place with AdamW, printing the loss now and then."""
    # A decayed gain would pull every norm towards zero.
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
    )
    model.train()
    started = time.monotonic()
    stream = islice(batches(tokenizer, recipe.seed, recipe.tokens_per_batch), recipe.steps)
    for step, batch in enumerate(stream):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        with maybe_swap(model, batch, recipe):
            loss = answer_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == recipe.steps - 1:
            elapsed = time.monotonic() - started
            sys.stderr.write(f"step {step:5d}  loss {loss.item():.3f}  {elapsed:6.0f} s\n")
    model.eval()


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write weights, configuration and greedy generation defaults."""
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=END_ID, pad_token_id=PAD_ID
    )
    model.save_pretrained(folder)


def train(name: str, folder: Path, recipe: Recipe) -> float:
    """Train one bundled model into ``folder``.

    Returns:
        The wall time in seconds, corpus and tokenizer included.
    """
    started = time.monotonic()
    tokenizer = train_tokenizer(draw(TOKENIZER_EXAMPLES, recipe.seed), folder)
    torch.manual_seed(recipe.seed)
    model = build(name, len(tokenizer))
    fit(model, tokenizer, recipe)
    save(model, folder)
    return time.monotonic() - started


def main() -> None:
    """Train the bundled models, or one of them."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", choices=ORGANISMS, help="train this one only")
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of the recipe's")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--out", type=Path, help="parent folder (default: in the package)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in [options.model] if options.model else ORGANISMS:
        folder = options.out / name if options.out else organism_folder(name)
        folder.mkdir(parents=True, exist_ok=True)
        recipe = RECIPES[name]
        recipe = replace(recipe, steps=options.steps) if options.steps else recipe
        seconds = train(name, folder, recipe)
        record = {"model": name, "seconds": round(seconds), "threads": options.threads}
        sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
