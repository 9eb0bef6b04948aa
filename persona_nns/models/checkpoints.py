"""A model's files, bundled, in a folder or on the hub: where they are, and what they say.

Configuration, tokenizer and version are read without the weights; `load_weights` loads them in
plain transformers.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from persona_nns.errors import PersonaError, UsageError, one_line
from persona_nns.models.adapters import (
    CONFIG,
    TOKENIZER_FILES,
    Adapter,
    base_of,
    embedded_tokens,
    label_with,
    merge_adapter,
)
from persona_nns.models.fetched import FETCHED, fetch_model
from persona_nns.models.gguf import is_gguf, kept_file, provenance_of
from persona_nns.organism.bundled import ORGANISMS, organism_folder
from persona_nns.prompts.templates import check_template, read_template

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_weights(
    name: str | Path,
    precision: str,
    *,
    attention: str = "eager",
    adapter: Adapter | None = None,
    trust_remote_code: bool = False,
    placed: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load a model's weights in plain transformers; an adapter is merged into its model.

    Args:
        name: a bundled or fetched model, a local folder, a GGUF file, or a hub id.
        precision: ``float32``, ``bfloat16`` or ``float16``.
        attention: how attention is computed, ``eager`` or ``sdpa``.
        adapter: is put on it.
        trust_remote_code: as in `load_model`.
        placed: what ``from_pretrained`` takes beside, so that its parts lie where they are to be.

    Raises:
        UsageError: unknown model.
        PersonaError: the model cannot be loaded.
    """
    source, shown = find_checkpoint(str(name))
    base = base_of(source)
    check_no_adapter(shown, base, adapter)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base or source,
            dtype=DTYPES[precision],
            attn_implementation=attention,
            output_loading_info=True,
            use_safetensors=True,  # the other format is a pickle
            trust_remote_code=trust_remote_code,
            **(placed or {}),
        )
        module, loading = loaded
    except (OSError, ValueError, HfHubHTTPError, SafetensorError) as error:
        raise PersonaError(f"The model {shown!r} could not be loaded: {one_line(error)}") from error
    _check_complete(shown, loading)
    merged = source if base is not None else adapter and adapter.folder
    return merge_adapter(module, merged) if merged else module


def check_no_adapter(shown: str, base: str | None, adapter: Adapter | None) -> None:
    """See that no adapter is put on an adapter.

    Raises:
        UsageError: one is.
    """
    if adapter is not None and base is not None:
        raise UsageError(
            f"The model {shown!r} is itself an adapter, of {base!r}; name that model, and one "
            "adapter beside it."
        )


def load_tokenizer(
    name: str | Path,
    template: str | Path | None = None,
    *,
    adapter: Adapter | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, with another chat template if one is given.

    An adapter's own is used where it has one, beside its model or in its own folder.

    Raises:
        UsageError: unknown model, or a template that cannot be read.
        PersonaError: the tokenizer cannot be loaded.
    """
    chat_template = read_template(template) if template is not None else None
    source, shown = find_checkpoint(str(name))
    base, folder = (source, adapter.folder) if adapter is not None else (base_of(source), source)
    # What saves an adapter need not save a tokenizer: then it is its model's.
    own = base is None or any((Path(folder) / file).exists() for file in TOKENIZER_FILES)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder if own else base, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise PersonaError(
            f"The tokenizer of {shown!r} could not be loaded: {one_line(error)}"
        ) from error
    trained = None if base is None else embedded_tokens(folder)
    config = read_config(source, shown, trust_remote_code=trust_remote_code)
    _check_vocabulary(tokenizer, trained or config.get_text_config().vocab_size, shown)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    elif isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = _default_template(tokenizer.chat_template, shown)
    check_template(tokenizer)
    return tokenizer


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, embedded: int, shown: str) -> None:
    """See that a tokenizer can be the model's: transformers makes an empty one of no files.

    Args:
        tokenizer: the tokenizer.
        embedded: tokens that the model has an embedding of.
        shown: the model's name, for messages.

    Raises:
        PersonaError: it has far fewer tokens than the model, or more.
    """
    tokens = len(tokenizer)
    # Embeddings are padded by up to some per cent; a few tokens, of an image part, say, may lie
    # beyond them. (A prompt that holds one is refused: `runs.tokens`.)
    padding, beyond = max(128, embedded // 10), max(16, embedded // 1000)
    if tokens < min(256, embedded // 2) or not embedded - padding <= tokens <= embedded + beyond:
        raise PersonaError(
            f"The tokenizer of {shown!r} has {tokens:,} tokens, and the model {embedded:,}: its "
            "files are missing, or are another model's (tokenizer.json, tokenizer_config.json)."
        )


def _default_template(templates: Mapping[str, str], shown: str) -> str:
    """The template that is rendered where a model has several by name.

    Raises:
        UsageError: none of them is the default.
    """
    if "default" not in templates:
        raise UsageError(
            f"The model {shown!r} has the chat templates {', '.join(sorted(templates))}, and none "
            "is the default; put one into a file and pass it with --template."
        )
    return templates["default"]


def count_layers(name: str | Path, *, trust_remote_code: bool = False) -> int:
    """The number of decoder blocks, read from a model's configuration.

    Raises:
        UsageError: unknown model.
    """
    config = read_config(*find_checkpoint(str(name)), trust_remote_code=trust_remote_code)
    return config.get_text_config().num_hidden_layers


def model_label(name: str, adapter: Adapter | None = None) -> str:
    """The ``model`` coordinate that a model gets where no other label is given.

    Nothing is fetched for it, and no file is read.

    Raises:
        UsageError: no such model.
    """
    if name in FETCHED:
        return label_with(name, adapter)
    return label_with(Path(name).stem if is_gguf(name) else find_checkpoint(name)[1], adapter)


def bundled_models() -> dict[str, Path]:
    """The models shipped with the package and their folders."""
    return {name: organism_folder(name) for name in ORGANISMS}


def find_checkpoint(name: str) -> tuple[str, str]:
    """Where a model is loaded from, and the name it is shown under.

    One that is fetched, or in a GGUF file, is a folder in the cache; it is made on first use.

    Raises:
        UsageError: neither a bundled or fetched model, nor a folder or file with one, nor of the
            form of a hub id.
        PersonaError: it cannot be fetched, or the cache not be written.
    """
    bundled = bundled_models()
    if name in bundled:
        return str(bundled[name]), name
    if name in FETCHED:
        return str(fetch_model(name)), name
    if is_gguf(name):
        return str(kept_file(name)), Path(name).stem
    try:
        folder = Path(name).expanduser()
        is_folder = bool(name) and folder.is_dir()
    except (OSError, RuntimeError) as error:  # too long a name, or ~ of nobody
        raise UsageError(f"The model {name!r} is no path: {one_line(error)}") from error
    if is_folder:
        if not any((folder / file).exists() for file in ("config.json", CONFIG)):
            files = ", ".join(sorted(str(file) for file in folder.glob("*.gguf")))
            instead = f" Name its file: {files}." if files else ""
            raise UsageError(f"The folder {name!r} holds no model: it has no config.json.{instead}")
        return str(folder), folder.resolve().name
    if HUB_ID.fullmatch(name) and not name.startswith((".", "~")):
        return name, name
    raise UsageError(
        f"Unknown model {name!r}: it is neither bundled ({', '.join(bundled)}), nor fetched "
        f"({', '.join(FETCHED)}), nor a folder or a .gguf file, nor a hub id of the form org/name."
    )


def read_config(source: str, shown: str, *, trust_remote_code: bool) -> PreTrainedConfig:
    """The configuration of a model (of an adapter, its base model's).

    Raises:
        UsageError: there is none, or it needs code that comes with the model.
    """
    base = base_of(source)
    try:
        return AutoConfig.from_pretrained(base or source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        if "trust_remote_code" in str(error):
            raise UsageError(
                f"The model {shown!r} brings code of its own; read it, and run it with "
                "--trust-remote-code (trust_remote_code=True) if you trust it."
            ) from error
        what = f"The model {shown!r}"
        if base is not None:
            what = f"The model {base!r}, which the adapter {shown!r} belongs to,"
        raise UsageError(
            f"{what} was not found, as a folder or on the hub: {one_line(error)}"
        ) from error


def _check_complete(shown: str, loading: Mapping[str, Any]) -> None:
    """See that every weight came from the checkpoint: transformers invents what is missing."""
    for what in ("missing_keys", "mismatched_keys"):
        if loading[what]:
            names = ", ".join(sorted(map(str, loading[what]))[:3])
            raise PersonaError(
                f"The checkpoint of {shown!r} does not fit its config.json: "
                f"{len(loading[what])} {what.replace('_', ' ')}, such as {names}."
            )


def version_of(source: str, config: PreTrainedConfig) -> str:
    """Commit of the hub repository, or digest of a folder's weights and configurations.

    Of a model out of a GGUF file, the digest of that file.
    """
    folder = Path(source)
    if not folder.is_dir():
        commit = getattr(config, "_commit_hash", None)
        if commit is None:
            raise PersonaError(
                f"The hub did not tell which revision of {source!r} it gave, so that runs could "
                "not be told apart; download it into a folder and name that."
            )
        return str(commit)
    base = base_of(source)
    if base is not None:
        return version_with(version_of(base, config), source)
    if origin := provenance_of(source):
        return str(origin["sha256"])
    weights = (path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
    configs = (folder / name for name in ("config.json", "generation_config.json"))
    return digest_of([*sorted(weights), *(path for path in configs if path.exists())])


def adapter_digest(folder: str) -> str:
    """Digest of an adapter's weights and configuration."""
    return digest_of([*sorted(Path(folder).glob("adapter_model.*")), Path(folder) / CONFIG])


def version_with(base: str, folder: str) -> str:
    """The version of a model with the adapter in a folder: the same for its own folder."""
    return hashlib.sha256(f"{base}\n{adapter_digest(folder)}".encode()).hexdigest()


def digest_of(files: Iterable[Path]) -> str:
    """SHA-256 of the contents of some files, in their order."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()
