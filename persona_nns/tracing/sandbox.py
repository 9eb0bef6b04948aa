"""A trace beside a model without weights, as NDIF may run it: what stays true there, and how.

The trace runs in a process of its own, and what it reads and writes crosses to the model's as a
copy. So

- a cache that a pass is given does not grow here: it is taken from what the pass returns;
- a module whose inputs are read goes on with copies of them. A block or an attention module has
  the cache among its inputs, and what it adds to a copy is lost to later passes. What enters a
  block is therefore read and written as the `entry` before it puts it out, wherever the cache is
  read afterwards or the model goes on to generate;
- an object that only this package knows cannot be handed to the model, such as a logits
  processor (see `Draw`).
"""

from typing import Any

from nnsight import TransformersModel


def has_weights(model: TransformersModel) -> bool:
    """Whether the model computes in this process; not so in a sandbox."""
    return not next(model.parameters()).is_meta


def entry(model: TransformersModel, layer: int) -> Any:
    """The module whose output enters a block, [row, column, d_model]: the same tensor."""
    if layer:
        return model.layers[layer - 1]
    return model.embed_dropout if hasattr(model, "embed_dropout") else model.embed
