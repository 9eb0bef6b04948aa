"""Low-rank adapters in peft's format: a folder that names the model it belongs to."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from persona_nns.errors import PersonaError, missing_extra, one_line

CONFIG = "adapter_config.json"


def base_of(source: str) -> str | None:
    """Folder or hub id of the model that an adapter belongs to; None where it is no adapter.

    Raises:
        PersonaError: the adapter does not say.
    """
    file = Path(source) / CONFIG
    if not file.is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError) as error:
        raise PersonaError(f"The adapter {source!r} cannot be read: {error}.") from error
    if not base:
        raise PersonaError(f"The adapter {source!r} does not say which model it belongs to.")
    return str(base)


def require_peft() -> Any:
    """The module ``peft``.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise missing_extra("Low-rank adapters need peft", "distill") from error
    return peft


def merge_adapter(module: PreTrainedModel, folder: str) -> PreTrainedModel:
    """The model with the adapter added into its weights.

    Args:
        module: the model that the adapter belongs to; changed.
        folder: of the adapter.

    Raises:
        PersonaError: peft is missing, or the adapter does not go with the model.
    """
    peft = require_peft()
    try:
        return peft.PeftModel.from_pretrained(module, folder).merge_and_unload()
    except (RuntimeError, ValueError, OSError) as error:
        raise PersonaError(f"The adapter {folder!r} cannot be loaded: {one_line(error)}") from error
