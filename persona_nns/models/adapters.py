"""Low-rank adapters in peft's format: a folder that names the model it belongs to.

An adapter's own folder is a model like any other, and an adapter can be put on a model that is
named beside it (`Adapter`). Either way it is added into the model's weights on this machine, so
that modules keep their names and every experiment runs on it as on any model; what it gives equals
an attached one within rounding. (In bfloat16 the sum is rounded to the weights' precision.)
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from persona_nns.errors import PersonaError, UsageError, missing_extra, one_line
from persona_nns.models.fetched import FETCHED, fetch_model
from persona_nns.models.gguf import is_gguf, kept_file
from persona_nns.organism.bundled import ORGANISMS, organism_folder

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
#: Files of a tokenizer, which an adapter may have of its own.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
# Kinds of adapters that are vectors in front of a prompt.
_PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")


@dataclass(frozen=True)
class Adapter:
    """A low-rank adapter beside the model that it is put on.

    Attributes:
        folder: its files on this machine.
        asked: what a server is asked for: a hub id, or the folder's absolute path.
    """

    folder: str
    asked: str

    @property
    def stem(self) -> str:
        """What it adds to the model's name."""
        return Path(self.asked).name


def find_adapter(name: str | Path) -> Adapter:
    """The adapter in a folder or of a hub id, of which configuration and weights are fetched.

    Raises:
        UsageError: there is none.
        PersonaError: it is of a kind that has no weights to add, or holds none.
    """
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            adapter = Adapter(str(folder), str(folder.resolve()))
        else:
            files = [CONFIG, WEIGHTS, "chat_template.jinja", "special_tokens_map.json"]
            fetched = snapshot_download(str(name), allow_patterns=[*files, *TOKENIZER_FILES])
            adapter = Adapter(fetched, str(name))
    except (HFValidationError, HfHubHTTPError, OSError, RuntimeError) as error:
        raise UsageError(
            f"The adapter {str(name)!r} was not found, as a folder or on the hub: {one_line(error)}"
        ) from error
    if not (Path(adapter.folder) / CONFIG).is_file():
        raise UsageError(f"There is no adapter in {str(name)!r}: it has no {CONFIG}.")
    check_mergeable(adapter.folder, str(name))
    return adapter


def label_with(label: str, adapter: Adapter | None) -> str:
    """The name of a model in the results, with that of the adapter that is put on it."""
    return label if adapter is None else f"{label}+{adapter.stem}"


def warn_of_other_base(adapter: Adapter, names: Sequence[str]) -> None:
    """Warn where an adapter says that it belongs to another model than the one it is put on.

    Args:
        adapter: the adapter.
        names: what that model is called: a folder's last part, and upper and lower case, do.
    """
    base = str(_read(adapter.folder).get("base_model_name_or_path") or "")
    named = {Path(name).name.lower() for name in names}
    if base and Path(base).name.lower() not in named:
        warnings.warn(
            f"The adapter {adapter.asked!r} says that it belongs to {base!r}, and is put on "
            f"{names[0]!r}.",
            stacklevel=4,
        )


def base_of(source: str) -> str | None:
    """Folder or hub id of the model that an adapter belongs to; None where it is no adapter.

    Raises:
        PersonaError: the adapter does not say.
    """
    if not (Path(source) / CONFIG).is_file():
        return None
    base = _read(source).get("base_model_name_or_path")
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


def _read(folder: str) -> dict[str, Any]:
    """An adapter's configuration.

    Raises:
        PersonaError: it cannot be read.
    """
    try:
        config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
        return dict(config)
    except (OSError, ValueError, TypeError) as error:
        raise PersonaError(f"The adapter {folder!r} cannot be read: {error}.") from error


def kind_of(folder: str) -> str:
    """What peft calls an adapter's kind, as ``LORA``; empty where it does not say."""
    return str(_read(folder).get("peft_type") or "")


def check_mergeable(folder: str, shown: str) -> None:
    """See that an adapter has weights that can be added to a model's.

    Raises:
        PersonaError: it has none.
    """
    kind = kind_of(folder)
    if not kind:
        raise PersonaError(f"The adapter {shown!r} is not peft's: its {CONFIG} has no peft_type.")
    if kind in _PROMPTS:
        raise PersonaError(
            f"The adapter {shown!r} is of the type {kind}: it puts vectors before the prompt and "
            "has no weights to merge, so that no position would stand where it is said to."
        )
    if not (Path(folder) / WEIGHTS).is_file():
        raise PersonaError(f"The adapter {shown!r} holds no weights ({WEIGHTS}).")


def embedded_tokens(folder: str) -> int | None:
    """How many token embeddings an adapter was trained with; None where it holds none.

    Raises:
        PersonaError: its weights are damaged.
    """
    file = Path(folder) / WEIGHTS
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
    check_mergeable(folder, folder)
    try:
        if (tokens := embedded_tokens(folder)) is not None:
            module.resize_token_embeddings(tokens)
        attached = peft.PeftModel.from_pretrained(module, folder)
        # Once more, for what it returns: weights that find no place are left out without a word.
        loaded = attached.load_adapter(folder, attached.active_adapter)
        # (peft writes resized embeddings twice, and reads them once.)
        unexpected = [key for key in loaded.unexpected_keys if ".modules_to_save." not in key]
        if left := [*unexpected, *loaded.missing_keys]:
            raise ValueError(f"{len(left)} of its weights have no place there, such as {left[0]}")
        return attached.merge_and_unload()
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split()[:60])
        raise PersonaError(f"The adapter {folder!r} does not fit its model: {reason}.") from error
