"""Several accelerators, pretended on the CPU: numbers are real, and devices do not mix.

A tensor of a pretended device holds a tensor of the CPU, on which each operation is computed, and
says that it is elsewhere. As on a GPU, an operation on tensors of two devices is an error, unless
one is a single number of the CPU or indices of the CPU; and whatever brings data to the host is
counted. So what no machine without a GPU could otherwise show can be tested: that nothing mixes
devices where a model is sharded, and how often a loop waits for its results.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from accelerate import dispatch_model
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from transformers import AutoConfig, AutoModelForCausalLM

from persona_nns.models.checkpoints import find_checkpoint

#: A type that torch knows and that needs nothing installed.
KIND = "pretended"
_aten = torch.ops.aten
_SCALAR = _aten._local_scalar_dense.default
_INDEXED = (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default)
# What needs to know on the host how large its result is, or what a tensor holds.
_WAITING = (_aten.nonzero.default, _aten.equal.default, _aten.masked_select.default)


class Held(Tensor):
    """A tensor that says it is on a pretended device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> "Held":
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
            requires_grad=held.requires_grad,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        return _compute(func, args, kwargs or {}, Counter())

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_tensors(index), value)

    def tolist(self) -> Any:
        """Through the CPU, as of any device."""
        return self.cpu().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Held({self.held!r}, {self.device})"

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.clone()


class _Devices(TorchDispatchMode):
    def __init__(self, waits: "Counter[str]") -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {}, self.waits)


@contextmanager
def pretended() -> Iterator["Counter[str]"]:
    """Let tensors be made on ``pretended:0``, ``pretended:1``, …; counts what waits for them."""
    waits: Counter[str] = Counter()
    real = torch.tensor
    if torch._C._get_privateuse1_backend_name() != KIND:
        backend_registration._setup_privateuseone_for_python_backend(KIND)

    def tensor(data: Any, *, device: Any = None, **how: Any) -> Tensor:
        made = real(data, **how)
        return made if device is None else made.to(device)

    with (
        patch("torch.tensor", tensor),
        patch.object(AutoModelForCausalLM, "from_pretrained", _spread),
        _Devices(waits),
    ):
        yield waits


def halves(model: str) -> dict[str, str]:
    """A device map of a model in two halves, the second on ``pretended:1``.

    What is above the blocks lies with the embedding, as accelerate puts tied weights.
    """
    module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(find_checkpoint(model)[0]))
    inner = module.base_model_prefix
    blocks = "h" if hasattr(getattr(module, inner), "h") else "layers"
    n_layers = module.config.num_hidden_layers
    whole = {
        f"{inner}.{name}" for name, _ in getattr(module, inner).named_children() if name != blocks
    }
    parts = [*whole, *(name for name, _ in module.named_children() if name != inner)]
    return dict.fromkeys(parts, f"{KIND}:0") | {
        f"{inner}.{blocks}.{k}": f"{KIND}:{int(2 * k >= n_layers)}" for k in range(n_layers)
    }


_load = AutoModelForCausalLM.from_pretrained


def _spread(*args: Any, device_map: Any = None, **how: Any) -> Any:
    """Load into main memory and spread then: files cannot be read onto a pretended device."""
    loaded: Any = _load(*args, **how)
    module, loading = loaded
    return (dispatch_model(module, device_map) if device_map else module), loading


def _compute(func: Any, args: Any, kwargs: Mapping[str, Any], waits: "Counter[str]") -> Any:
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    there = _devices(tensors)
    asked = kwargs.get("device")
    device = next(iter(there), None)
    if func in (_aten.copy_.default, _aten._to_copy.default):
        device = args[0].device if asked is None else torch.device(asked)
        if there and device.type == "cpu":
            waits["to the CPU"] += 1
        elif func is _aten.copy_.default:
            device = args[0].device
    else:
        if asked is not None:
            device = torch.device(asked)
        _check_one_device(func, args, tensors, there)
    if there and (func is _SCALAR or func in _WAITING):
        waits[str(func)] += 1
    if func is _aten.index.Tensor and any(
        isinstance(each, Held) and each.dtype is torch.bool for each in args[1]
    ):
        waits["a mask as index"] += 1
    of = {id(each.held): each for each in tensors if isinstance(each, Held)}
    inner, named = _inner((args, kwargs))
    if asked is not None:
        named = {**named, "device": torch.device("cpu")}
    found = func(*inner, **named)
    if device is None or device.type != KIND:
        return found
    return tree_map(
        lambda each: (
            (of[id(each)] if id(each) in of else Held(each, device))
            if isinstance(each, Tensor)
            else each
        ),
        found,
    )


def _tensors(index: Any) -> Any:
    """An index whose lists are tensors: torch would make them by the device's own driver."""
    if isinstance(index, tuple):
        return tuple(map(_tensors, index))
    if not isinstance(index, list):
        return index
    return torch.tensor(index) if index else torch.empty(0, dtype=torch.long)


def _inner(values: Any) -> Any:
    return tree_map(lambda each: each.held if isinstance(each, Held) else each, values)


def _devices(tensors: Any) -> set[torch.device]:
    return {each.device for each in tensors if isinstance(each, Held)}


def _check_one_device(func: Any, args: Any, tensors: Any, there: Any) -> None:
    exempt = tree_flatten(args[1])[0] if func in _INDEXED else []
    exempt = [each for each in exempt if isinstance(each, Tensor) and not isinstance(each, Held)]
    here = [
        each
        for each in tensors
        if not isinstance(each, Held) and each.dim() and not any(each is one for one in exempt)
    ]
    if len(there) > 1 or (there and here):
        devices = sorted({str(each.device) for each in tensors})
        raise RuntimeError(f"{func}: expected all tensors to be on one device, found {devices}")
