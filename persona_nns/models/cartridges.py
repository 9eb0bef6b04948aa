"""Cartridges in files: ``.safetensors`` with ``keys``, ``values``, and what is known of them."""

import json
import secrets
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from nnsight import TransformersModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from persona_nns.declarations.record import ModelRecord
from persona_nns.errors import UsageError, one_line
from persona_nns.models.hosting import hosted
from persona_nns.models.records import record_of
from persona_nns.tracing.kv.cartridge import FORMS, Cartridge

_TENSORS = ("keys", "values")
# What a file says in words.
_ABOUT = tuple(each.name for each in fields(Cartridge) if each.name not in _TENSORS)


def save_cartridge(cartridge: Cartridge, file: str | Path) -> None:
    """Write a cartridge, whole or not at all; the folder is made.

    Args:
        cartridge: what is written.
        file: a path that ends in ``.safetensors``.
    """
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {name: _write(getattr(cartridge, name)) for name in _ABOUT}
    tensors = {name: getattr(cartridge, name).cpu().contiguous() for name in _TENSORS}
    part = path.with_name(f"{path.stem}.{secrets.token_hex(4)}.part")
    try:
        save_file(tensors, part, metadata={**about, "slots": str(cartridge.slots)})
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_cartridge(file: str | Path, record: ModelRecord | None = None) -> Cartridge:
    """Read a cartridge, on the CPU.

    Args:
        file: from `save_cartridge`.
        record: of the model that it is for (`record_of`); None reads one for any model.

    Raises:
        UsageError: the file cannot be read, holds something else, or a cartridge for another
            model.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise UsageError(f"The cartridge {str(file)!r} does not exist.")
    try:
        with safe_open(path, "pt") as opened:
            about = dict(opened.metadata() or {})
            tensors = {name: opened.get_tensor(name) for name in _TENSORS}
        known: dict[str, Any] = {name: _read(name, about[name]) for name in _ABOUT}
    except KeyError as error:
        raise UsageError(
            f"The file {str(file)!r} is not a cartridge: it says nothing of {error.args[0]!r}; use "
            "one that persona_cartridge has written."
        ) from error
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"The cartridge {str(file)!r} cannot be read: {one_line(error)} Use a file that "
            "persona_cartridge has written."
        ) from error
    if known["form"] not in FORMS:
        raise UsageError(
            f"The cartridge {str(file)!r} has the unknown form {known['form']!r}; "
            f"forms are {', '.join(FORMS)}."
        )
    cartridge = Cartridge(**tensors, **known)
    keys, values = cartridge.keys.shape, cartridge.values.shape
    if len(keys) != 4 or keys[:3] != values[:3] or len(values) != 4:
        raise UsageError(
            f"The cartridge {str(file)!r} holds keys of shape {tuple(keys)} and values of shape "
            f"{tuple(values)}; both have to be [layer, kv_head, slot, d_head]."
        )
    if record is not None:
        cartridge.check_model(record)
    return cartridge


def check_cartridges(files: Sequence[str], model: TransformersModel) -> None:
    """See that a model can be given some cartridges, and each persona one.

    Raises:
        UsageError: the model is on a server; or a file cannot be read, is for another model, or a
            second one of a persona.
    """
    if files and hosted(model) is not None:
        raise UsageError(
            f"The cartridge {str(files[0])!r} goes with weights that are on this machine; use the "
            "backend 'local'."
        )
    read: dict[str, str] = {}
    for file in files:
        persona = load_cartridge(file, record_of(model)).persona
        if persona in read:
            raise UsageError(
                f"The cartridges {read[persona]!r} and {str(file)!r} are both of the persona "
                f"{persona!r}; give one of them."
            )
        read[persona] = str(file)


def _write(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _read(name: str, text: str) -> Any:
    if name in ("start", "seed"):
        return int(text)
    return tuple(json.loads(text)) if name in ("tasks", "losses") else text
