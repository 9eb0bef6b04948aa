"""Patching the heads of a block with less work: without these, the same numbers."""

import torch
from nnsight import TransformersModel, save
from torch import Tensor

from persona_nns.tracing.kv.cache import KVCache
from persona_nns.tracing.patching import Unpatched, open_patches
from persona_nns.tracing.residuals import last_columns, take


def patch_common(model: TransformersModel, run: Unpatched, layer: int, n: int) -> KVCache:
    """The first ``n`` columns after one head of a block is patched; [position set × head] rows."""
    n_sets, n_heads = len(run.rows.patched), run.attention.shape[-1]
    row = torch.arange(n_sets * n_heads, device=run.rows.last.device)
    s, q, h = row // n_heads, torch.zeros_like(row), row % n_heads
    patch = open_patches(run, run.heads[layer], layer, s, q, h, width=n)
    with model.trace(patch.window.inputs(cached=True)):
        patch.window.resume(model, layer)
        projection = model.layers[layer].attn.o_proj
        projection.input = torch.where(patch.where, patch.value, projection.input)
        model.lm_head.input = model.lm_head.input[:, -1:]
        kept = save(model.output.past_key_values)
    return patch.window.read_cache(kept)


def finish_last_token(model: TransformersModel, last: Tensor, *, attention_too: bool) -> None:
    """Inside a trace: let the last block work on the last prompt token alone.

    Nothing reads what it makes of the others beyond their keys and values. Its outputs, one
    column wide, are added to every column of the residual, of which the last token's is right.
    """
    block = model.layers[-1]
    if attention_too:
        block.attn.o_proj.input = take(block.attn.o_proj.input, last)
    block.mlp.input = take(block.mlp.input, last)


def finish_last_columns(model: TransformersModel, n: int, *, attention_too: bool) -> None:
    """Inside a trace: let the last block and the head work on the last columns alone.

    Nothing reads what the block makes of the others beyond their keys and values. As above, but
    what it adds to them is nothing.

    Args:
        model: whose ``logits_to_keep`` in this pass is ``n``.
        n: columns.
        attention_too: not where its output projection has been given something already.
    """
    block = model.layers[-1]
    # Rows of a slice do not lie side by side: multiplied as they are, each is multiplied alone.
    for module in (block.attn.o_proj, block.mlp) if attention_too else (block.mlp,):
        width = module.input.shape[1]
        module.input = last_columns(module.input, n).contiguous()
        module.output = last_columns(module.output, width)
    model.lm_head.input = model.lm_head.input.contiguous()
