"""Adapters that are attached to a hosted model, and how it is known that they are.

A server is told an adapter's name with each request, fetches it and attaches it to the model in
place. Nothing in an answer says whether it did, and with which files. So each job puts a vector
through the adapter's own modules there and compares what comes out with what the files here give:
the modules are called, because a sandboxed job sees no weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from nnsight import TransformersModel, save
from safetensors.torch import load_file

from persona_nns.errors import PersonaError, UsageError, one_line
from persona_nns.models.adapters import WEIGHTS, Adapter, kind_of, require_peft

_PREFIX, _DOWN, _UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Fingerprint:
    """What an adapter makes of a vector in each module that it is attached to.

    Attributes:
        asked: the adapter's name, as the server was told it.
        modules: paths of the modules.
        scalings: by which each multiplies its adapter's output.
        entries: place of the largest number that comes out of each adapter.
        values: that number.
    """

    asked: str
    modules: tuple[str, ...]
    scalings: tuple[float, ...]
    entries: tuple[int, ...]
    values: tuple[float, ...]


def check_attachable(adapter: Adapter) -> None:
    """See that a server can be asked for an adapter.

    Raises:
        UsageError: it is of another kind than those that can be found again there.
    """
    kind, path = kind_of(adapter.folder), f"{adapter.folder}/{WEIGHTS}"
    if kind != "LORA" or not _projections(load_file(path)):
        raise UsageError(
            f"The adapter {adapter.asked!r} ({kind}) has no low-rank projections by which it could "
            "be known on a server; only LoRA adapters of linear layers are attached there."
        )


def attach(model: TransformersModel, adapter: Adapter) -> Fingerprint:
    """Attach an adapter's modules to the client of a hosted model, without their weights.

    Raises:
        UsageError: peft is missing.
        PersonaError: the adapter does not go with the model.
    """
    require_peft()
    try:
        model.load_adapter(adapter.folder)
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        raise PersonaError(
            f"The adapter {adapter.asked!r} does not fit its model: {one_line(error)}"
        ) from error
    model.peft = adapter.asked
    weights = load_file(f"{adapter.folder}/{WEIGHTS}")
    modules = _projections(weights)
    entries: list[int] = []
    values: list[float] = []
    for path in modules:
        down, up = (weights[f"{_PREFIX}{path}{end}"].float() for end in (_DOWN, _UP))
        _check_shapes(model, path, down, up, adapter)
        out = up @ (down @ probe(down.shape[1], down))
        entries.append(int(out.abs().argmax()))
        values.append(float(out[entries[-1]]))
    scalings = tuple(float(model.get(path).scaling["default"]) for path in modules)
    return Fingerprint(adapter.asked, modules, scalings, tuple(entries), tuple(values))


def _projections(weights: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """Paths of the linear modules that an adapter has projections for."""
    ends = [name for name, of in weights.items() if name.endswith(_DOWN) and of.dim() == 2]
    return tuple(sorted(name.removeprefix(_PREFIX).removesuffix(_DOWN) for name in ends))


def _check_shapes(
    model: TransformersModel, path: str, down: torch.Tensor, up: torch.Tensor, adapter: Adapter
) -> None:
    """See that an adapter was made for a module of this width.

    Raises:
        PersonaError: the model has no such module, or one of another width.
    """
    try:
        layer = model.get(path)
        here = layer.in_features, layer.out_features
    except AttributeError as error:
        raise PersonaError(
            f"The adapter {adapter.asked!r} does not fit its model: there is no {path}."
        ) from error
    if here != (down.shape[1], up.shape[0]):
        raise PersonaError(
            f"The adapter {adapter.asked!r} does not fit its model: {path} has "
            f"{here[0]} inputs and {here[1]} outputs, and the adapter {down.shape[1]} and "
            f"{up.shape[0]}."
        )


def probe(n_inputs: int, like: torch.Tensor) -> torch.Tensor:
    """A vector [n_inputs] that is the same everywhere, on the device of another tensor."""
    return torch.arange(1, n_inputs + 1, device=like.device).float().cos()


def check_attached(model: TransformersModel, known: Fingerprint, tolerance: float) -> None:
    """On the server: see that the adapter is attached, and is the one that is known here.

    Args:
        model: the hosted model.
        known: what the adapter makes of `probe`.
        tolerance: relative, of the server's precision.

    Raises:
        PersonaError: it is not.
    """
    # nnsight attaches an adapter as it is trained. In a sandbox this reaches a model without
    # weights only; whether dropout is off where the weights are is seen below.
    model._module.eval()
    try:
        layers = [model.get(path) for path in known.modules]
        ids = torch.tensor([[7, 3, 11, 5]], device=model.device)
        with model.trace(ids, use_cache=False):
            like = model.layers[0].input
            outputs = save([answer_of(layer, like) for layer in layers])
        scalings = [float(layer.scaling["default"]) for layer in layers]
    except Exception as error:
        raise PersonaError(
            f"The server did not attach the adapter {known.asked!r} "
            f"({type(error).__name__}: {' '.join(str(error).split()[:40])})."
        ) from error
    for place, (kept, projected) in enumerate(outputs):
        if not bool((kept == 1).all()):
            raise PersonaError(
                f"The server leaves the dropout of the adapter {known.asked!r} on, so that its "
                "numbers would be random; save the adapter with lora_dropout 0 for it."
            )
        value, expected = float(projected[known.entries[place]]), known.values[place]
        same = abs(scalings[place] - known.scalings[place]) <= 1e-6 * abs(known.scalings[place])
        if not same or not abs(value - expected) <= tolerance * abs(expected) + 1e-12:
            raise PersonaError(
                f"The adapter {known.asked!r} of the server is not the one that is known here "
                f"({known.modules[place]} differs); it may have another revision."
            )


def answer_of(layer: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inside a trace: what a layer's adapter leaves of ones, and makes of `probe`."""
    down, up = layer.lora_A.default, layer.lora_B.default
    vector = probe(down.in_features, like)[None].to(down.weight.dtype)
    kept = layer.lora_dropout.default(torch.ones_like(vector))
    return kept.float(), up(down(vector))[0].float()
