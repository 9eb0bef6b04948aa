"""A sandbox's boundary in one process: what crosses between a trace and its model is a copy.

NDIF may run a trace beside a model without weights, in a process of its own. Values go to it and
back through a socket, each read with everything that it holds: who reads a block's input has been
sent a copy of the cache among its arguments, and the block goes on with a copy of that copy.
"""

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from nnsight import TransformersModel
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.interleaver import Event, Mediator


class _WithoutUs(pickle.Pickler):
    """Refuses what only this package defines: the model's process does not have it."""

    def reducer_override(self, obj: Any) -> Any:
        kind = obj if isinstance(obj, type) else type(obj)
        if kind.__module__.startswith(("persona_nns", "_persona_nns")):
            raise pickle.PicklingError(f"{kind.__name__} cannot cross to the model.")
        return NotImplemented


class _Pickle:
    Pickler = _WithoutUs
    dump, loads, load = pickle.dump, pickle.loads, pickle.load


def _cross(value: Any) -> Any:
    sent = io.BytesIO()
    torch.save(value, sent, pickle_module=_Pickle)
    return torch.load(io.BytesIO(sent.getvalue()), weights_only=False)


@contextmanager
def sandboxed(model: TransformersModel) -> Iterator[None]:
    """Let a model seem to have no weights, and copy what crosses between it and a trace."""
    switch, interleave = Mediator.switch, Envoy.interleave
    behind: dict[Mediator, Any] = {}  # where a worker waits while its last read is written back

    def copying_switch(self: Mediator, *arguments: Any) -> Any:
        if self in behind:
            return behind.pop(self)
        read, given = self.pending, _cross(arguments)
        parked = switch(self, *given)
        if parked is not None and parked.event is Event.SWAP:
            parked = parked._replace(value=_cross(parked.value))
        if not given or read is None or read.event is not Event.VALUE:
            return parked
        behind[self] = parked
        return read._replace(event=Event.SWAP, value=_cross(given[0]))

    def copying_interleave(self: Envoy, fn: Any, *arguments: Any, **named: Any) -> Any:
        batcher = named.pop("batcher", None)
        if batcher is not None:
            batcher.invokes = _cross(batcher.invokes)
        arguments, named = _cross((arguments, named))
        return _cross(interleave(self, fn, *arguments, batcher=batcher, **named))

    kind = type(model)
    weightless = {"parameters": lambda _: iter([torch.empty(0, device="meta")])}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mediator, "switch", copying_switch)
        patch.setattr(Envoy, "interleave", copying_interleave)
        patch.setattr(model, "__class__", type(kind.__name__, (kind,), weightless))
        yield
