"""In a sandbox: a job whose model lies in another process, and which has no weights of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from nnsight import TransformersModel, save


@contextmanager
def standing_in(model: TransformersModel) -> Iterator[None]:
    """Give a model without weights the device and the precision of the one that computes.

    NDIF may run a job in a process of its own. What stands for the model there lies on torch's
    meta device, where a tensor has no data; tensors that an experiment makes on `model.device`
    have to lie where the residuals come from.
    """
    if model.device is None or model.device.type != "meta":
        yield
        return
    token = torch.full((1, 1), 7)
    with model.trace({"input_ids": token, "attention_mask": torch.ones_like(token)}):
        entering = save(model.layers[0].input)
    kind = type(model)
    # `device` is a property of nnsight's, and has no setter.
    own = {"device": entering.device, "dtype": entering.dtype}
    model.__class__ = type(kind.__name__, (kind,), own)
    try:
        yield
    finally:
        model.__class__ = kind
