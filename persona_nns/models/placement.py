"""Models that one device is too small for: spread over several, or with weights of four bits.

Both are transformers' own; what is chosen is passed on to it.
"""

import hashlib
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from nnsight import TransformersModel
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from persona_nns.errors import PersonaError, UsageError, missing_extra
from persona_nns.models.checkpoints import DTYPES

#: How parts are dealt onto devices, as accelerate does it, where they are not named one by one.
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
#: How weights are kept in fewer bits.
QUANTISED = ("nf4",)

DeviceMap = str | Mapping[str, str | int]


def placing(
    shown: str,
    config: PreTrainedConfig,
    precision: str,
    place: torch.device,
    device_map: DeviceMap | None,
    quantise: str | None,
    *,
    has_adapter: bool,
) -> dict[str, Any]:
    """What transformers loads a model with, so that its parts lie where they are to be.

    Args:
        shown: the model's name, for messages.
        config: of the model.
        precision: what quantised weights are multiplied in.
        place: the device of a model that is not spread.
        device_map: how it is spread over devices.
        quantise: how its weights are kept in fewer bits.
        has_adapter: whether an adapter is added into its weights.

    Returns:
        Arguments of ``from_pretrained``; none for a whole model on one device, which is moved
        there once it is loaded.

    Raises:
        UsageError: there is no such way, or not of this model.
    """
    check_placing(device_map, quantise)
    if quantise is None:
        return {} if device_map is None else {"device_map": _as_given(device_map)}
    if has_adapter:
        raise UsageError(
            f"An adapter is added into whole weights, so that {shown!r} cannot be quantised with "
            "one; name a model into which it has been merged."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(
            f"The weights of {shown!r} are quantised already; leave out --quantise {quantise}."
        )
    if find_spec("bitsandbytes") is None:
        raise missing_extra("Weights in nf4 need bitsandbytes", "quantise")
    return {
        "device_map": {"": place} if device_map is None else _as_given(device_map),
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantise,
            bnb_4bit_compute_dtype=DTYPES[precision],
        ),
    }


def check_placing(device_map: DeviceMap | None, quantise: str | None) -> None:
    """See that there are such ways to spread and to quantise a model.

    Raises:
        UsageError: there are not.
    """
    if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
        raise UsageError(f"Unknown device map {device_map!r}; use {', '.join(DEVICE_MAPS)}.")
    if quantise is not None and quantise not in QUANTISED:
        raise UsageError(f"Unknown quantisation {quantise!r}; use {', '.join(QUANTISED)}.")


def quantised_version(version: str, quantise: str | None) -> str:
    """The version of a model whose weights are kept in fewer bits: other numbers, another model."""
    if quantise is None:
        return version
    return hashlib.sha256(f"{version}\nquantised {quantise}".encode()).hexdigest()


def settle(
    module: PreTrainedModel, shown: str, place: torch.device, placed: Mapping[str, Any]
) -> None:
    """Move a loaded model to its device; see of one that was placed that it is on some.

    Args:
        module: the model.
        shown: its name, for messages.
        place: its device.
        placed: what `placing` gave; none for a model that is not on its device yet.

    Raises:
        PersonaError: it does not fit.
    """
    if not placed:
        try:
            module.to(place)  # type: ignore[arg-type] - transformers wraps it
        except torch.OutOfMemoryError as error:
            raise PersonaError(
                f"The model {shown!r} does not fit into the memory of {place}; use a smaller dtype "
                "(--dtype bfloat16), several devices (--device-map auto) or four bits "
                "(--quantise nf4)."
            ) from error
    elif next(module.parameters()).is_meta:
        raise PersonaError(
            f"The model {shown!r} does not fit onto the devices: even its embedding would be "
            "fetched anew for each pass; use a smaller one, or four bits (--quantise nf4)."
        )


def devices_of(model: TransformersModel) -> str:
    """The device of a model, or those that it is spread over."""
    return ", ".join(sorted(map(str, model.devices)))


def _as_given(device_map: DeviceMap) -> str | dict[str, str | int]:
    return device_map if isinstance(device_map, str) else dict(device_map)
