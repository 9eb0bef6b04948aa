"""Low-rank adapters in peft's format: a folder that names the model it belongs to."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from persona_nns.errors import PersonaError, missing_extra, one_line
from persona_nns.models.fetched import FETCHED, fetch_model
from persona_nns.models.gguf import is_gguf, kept_file
from persona_nns.organism.bundled import ORGANISMS, organism_folder

CONFIG = "adapter_config.json"
# Kinds of adapters that are vectors in front of a prompt.
_PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING")


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
    if str(base) in ORGANISMS:
        return str(organism_folder(str(base)))
    if str(base) in FETCHED:
        return str(fetch_model(str(base)))
    if is_gguf(str(base)):
        beside = Path(source) / str(base)
        return str(kept_file(str(beside if beside.is_file() else base)))
    beside = Path(source) / str(base)
    return str(beside) if not Path(base).is_dir() and beside.is_dir() else str(base)


def _check_mergeable(folder: str) -> None:
    """See that an adapter has weights that can be added to a model's.

    Raises:
        PersonaError: it has none.
    """
    kind = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8")).get("peft_type", "")
    if kind in _PROMPTS:
        raise PersonaError(
            f"The adapter {folder!r} is of the type {kind}: it puts vectors before the prompt and "
            "has no weights to merge, so that no position would stand where it is said to."
        )
    if not any(Path(folder).glob("adapter_model.*")):
        raise PersonaError(f"The adapter {folder!r} holds no weights (adapter_model.safetensors).")


def embedded_tokens(folder: str) -> int | None:
    """How many token embeddings an adapter was trained with; None where it holds none.

    Raises:
        PersonaError: its weights are damaged.
    """
    file = Path(folder) / "adapter_model.safetensors"
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as weights:
            rows = {
                weights.get_slice(name).get_shape()[0]
                for name in weights.keys()  # noqa: SIM118
                if name.endswith(("embed_tokens.weight", "lm_head.weight"))
            }
    except (SafetensorError, OSError) as error:
        raise PersonaError(
            f"The weights of the adapter {folder!r} cannot be read: {one_line(error)}"
        ) from error
    return rows.pop() if len(rows) == 1 else None


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
    _check_mergeable(folder)
    try:
        if (tokens := embedded_tokens(folder)) is not None:
            module.resize_token_embeddings(tokens)
        return peft.PeftModel.from_pretrained(module, folder).merge_and_unload()
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split()[:60])
        raise PersonaError(f"The adapter {folder!r} does not fit its model: {reason}.") from error
