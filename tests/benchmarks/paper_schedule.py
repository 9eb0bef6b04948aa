"""The schedule of the paper's public scripts, frozen: what reuse is compared with.

Written after what v15_localized_positions.py of github.com/xuy/localized-additive-composition
does (fd941b5). One prompt at a time in plain transformers, whole sequences, nothing kept: for
each cell and position a capture pass over each of the four prompts, and for each layer, position
and cell a clean and an intervened pass.
"""

from typing import Any

import torch
from torch import Tensor

from persona_nns.declarations.sites import generated_index
from persona_nns.prompts.grids import Cell
from persona_nns.prompts.positions import position_index
from persona_nns.prompts.render import ROLE_PROMPTS, render_cell


def paper_schedule(
    model: Any, tokenizer: Any, cells: list[Cell], layers: list[int], positions: list[str]
) -> Tensor:
    """Causal KL of additive substitution, [cell, layer, position], the long way."""
    return torch.stack([_one_cell(model, tokenizer, cell, layers, positions) for cell in cells])


@torch.no_grad()
def _one_cell(
    model: Any, tokenizer: Any, cell: Cell, layers: list[int], positions: list[str]
) -> Tensor:
    prompts = render_cell(tokenizer, cell)
    n_prompt = len(prompts["XY"])
    reference = model.generate(
        torch.tensor([prompts["XY"].ids], device=model.device),
        attention_mask=torch.ones(1, n_prompt, dtype=torch.long, device=model.device),
        max_new_tokens=max(map(generated_index, positions)) + 10,
        do_sample=False,
        num_beams=1,
    )[0, n_prompt:].tolist()
    kl = torch.zeros(len(layers), len(positions))
    for p, position in enumerate(positions):
        first = generated_index(position)
        hidden = {}
        for name in ROLE_PROMPTS:
            ids = torch.tensor([[*prompts[name].ids, *reference[:first]]], device=model.device)
            states = model(ids, output_hidden_states=True).hidden_states
            index = position_index(prompts[name], position)
            hidden[name] = [state[0, index] for state in states]
        row = [*prompts["XY"].ids, *reference[: first + 10]]
        ids = torch.tensor([row], device=model.device)
        site = position_index(prompts["XY"], position)
        window = slice(n_prompt - 1 + first, n_prompt + 9 + first)
        for k, layer in enumerate(layers):
            bb, xb, by = (hidden[name][layer] for name in ("BB", "XB", "BY"))
            clean = torch.log_softmax(model(ids).logits[0, window], -1)
            moved = _substituted(model, ids, layer, site, bb + (xb - bb) + (by - bb))
            moved = torch.log_softmax(moved[0, window], -1)
            kl[k, p] = (clean.exp() * (clean - moved)).sum()
    return kl


def _substituted(model: Any, ids: Tensor, layer: int, site: int, value: Tensor) -> Tensor:
    def hook(_module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        changed = arguments[0].clone()
        changed[0, site] = value
        return (changed, *arguments[1:])

    handle = model.model.layers[layer].register_forward_pre_hook(hook)
    try:
        return model(ids).logits
    finally:
        handle.remove()
