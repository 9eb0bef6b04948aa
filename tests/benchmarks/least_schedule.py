"""The passes that the protocol cannot do without, in bare transformers: what reuse could come to.

No tracing, no reading, no writing, no logits that are not scored, and random tokens: each pass
has the shape that the least work needs, and every token is run once. The first is a row of as many
tokens as the prompts have distinct beginnings; then what is said, one step after another; the three
other prompts on the tokens they are forced on; and ten tokens a cell and position from each layer
up. What this takes is not the machine's matrix-product rate but what a model makes of it: a
schedule of whole passes can hardly be faster.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from persona_nns.prompts.grids import Cell
from persona_nns.prompts.render import ROLE_PROMPTS, render_cell


def count_beginnings(tokenizer: Any, cells: Sequence[Cell]) -> int:
    """How many tokens prompts have, where what several begin with counts once."""
    prompts = [render_cell(tokenizer, cell) for cell in cells]
    rows = {prompt[name].ids for prompt in prompts for name in ROLE_PROMPTS}
    return len({row[:stop] for row in rows for stop in range(1, len(row) + 1)})


@torch.no_grad()
def least_schedule(
    model: Any, tokenizer: Any, cells: Sequence[Cell], layers: list[int], n_positions: int
) -> None:
    """Run the passes.

    Args:
        model: a plain transformers model of the Qwen2 kind.
        tokenizer: its tokenizer.
        cells: whose prompts are counted.
        layers: where interventions are made.
        n_positions: the last prompt token, and generated ones from the first on.
    """
    width = sum(len(render_cell(tokenizer, cell)["XY"]) for cell in cells) // len(cells)
    n_forced, n_eval = n_positions - 1, 10
    config, blocks = model.config, model.model.layers
    n_layers = config.num_hidden_layers  # it is less while a pass begins at a layer
    kv_heads = config.num_key_value_heads
    d_head = config.hidden_size // config.num_attention_heads

    def held(n_rows: int) -> DynamicCache:
        shape = (n_rows, kv_heads, width, d_head)
        return DynamicCache([(torch.randn(shape), torch.randn(shape)) for _ in range(n_layers)])

    def tokens(n_rows: int, n_columns: int) -> Tensor:
        return torch.randint(config.vocab_size, (n_rows, n_columns))

    model(tokens(1, count_beginnings(tokenizer, cells)), use_cache=True, logits_to_keep=1)
    said = held(len(cells))
    for _ in range(n_forced + n_eval - 1):
        model(tokens(len(cells), 1), past_key_values=said)
    if n_forced:
        others = 3 * len(cells)
        model(tokens(others, n_forced), past_key_values=held(others), logits_to_keep=1)
    n_rows = n_positions * len(cells)
    for layer in layers:
        model.model.layers = blocks[layer:]
        config.num_hidden_layers = n_layers - layer
        try:
            model(tokens(n_rows, n_eval), past_key_values=held(n_rows))
        finally:
            model.model.layers, config.num_hidden_layers = blocks, n_layers
