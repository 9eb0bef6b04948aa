"""Load a language model as an nnsight model with the same names on every architecture.

Names on the loaded model, whatever the architecture calls them: ``model.layers[L]`` (with
``.attn``, ``.attn.o_proj``, ``.mlp`` and, where it has one, ``.input_norm``), ``model.embed``,
``model.final_norm``, ``model.lm_head``; ``model.output.logits`` are the logits (an architecture
may cap them after ``lm_head``).

Supported, with every name and index checked at load and in the tests: Llama, Qwen2, Qwen3,
Gemma2, Gemma3 (text), Mistral, Phi3, OLMo2 (no input norm: its blocks normalise their outputs),
GPT-2 and GPT-NeoX. Another decoder is loaded if it passes the same checks.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary, finalize

import torch
from nnsight import TransformersModel
from nnsight.modeling.huggingface import _ID_CACHE
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from persona_nns.declarations.record import ModelRecord
from persona_nns.errors import PersonaError, UsageError, one_line
from persona_nns.models.adapters import base_of
from persona_nns.models.checkpoints import (
    DTYPES,
    HUB_ID,
    digest_of,
    find_checkpoint,
    load_tokenizer,
    load_weights,
    read_config,
    version_of,
)
from persona_nns.models.checks import check_model, check_names
from persona_nns.models.gguf import provenance_of, warn_of_origin
from persona_nns.models.memory import keep_freed_memory
from persona_nns.models.servers import Server, read_backend
from persona_nns.prompts.templates import end_of_turn
from persona_nns.tracing.attention import MASKED
from persona_nns.tracing.continuations import end_tokens as end_tokens

#: Precision of a model on somebody's server, until its first job has told.
HOSTED = "hosted"

STANDARD_NAMES = {
    "*.layers": "layers",
    "*.h": "layers",
    "*.embed_tokens": "embed",
    "*.wte": "embed",
    "*.embed_in": "embed",
    "*.norm": "final_norm",
    "*.ln_f": "final_norm",
    "*.final_layer_norm": "final_norm",
    "self_attn": "attn",
    "attention": "attn",
    "attn.c_proj": "attn.o_proj",
    "attention.dense": "attention.o_proj",
    "input_layernorm": "input_norm",
    "ln_1": "input_norm",
    "*.rotary_emb": "rotary_emb",
}


@dataclass(frozen=True)
class HostedModel:
    """Where a model runs that is not loaded here.

    Attributes:
        server: where it runs.
        repo_id: the name it is hosted under.
        key: what nnsight asks the server for.
    """

    server: Server
    repo_id: str
    key: str


_RECORDS: WeakKeyDictionary[TransformersModel, ModelRecord] = WeakKeyDictionary()
_HOSTED: WeakKeyDictionary[TransformersModel, "HostedModel"] = WeakKeyDictionary()


def load_model(
    name: str | Path,
    *,
    backend: str = "local",
    dtype: str | None = None,
    device: str | None = None,
    attention: str | None = None,
    template: str | Path | None = None,
    label: str | None = None,
    allow_float16: bool = False,
    trust_remote_code: bool = False,
) -> TransformersModel:
    """Load a model, give its modules the standard names, and check it at every layer.

    Args:
        name: a bundled model, one that is fetched, a local folder, a GGUF file, or a hub id
            (``org/name``).
        backend: where traces run: ``local``; ``simulate`` (a server process on this machine, as
            NDIF's); ``ndif``, or the URL of such a server. On a server the model's weights are
            never loaded here: its configuration and tokenizer are.
        dtype: ``float32``, ``bfloat16`` or ``float16``. By default float32 for Gemma-2 (as in
            the paper) and for float16 checkpoints, otherwise the checkpoint's own (bfloat16
            for the published Qwen models).
        device: a torch device; by default ``cuda`` where there is one, else ``cpu``.
        attention: how attention is computed: ``eager``, the default, or ``sdpa``, which gives the
            same numbers within rounding.
        template: ``plain``, or a Jinja chat template that replaces the model's own.
        label: the ``model`` coordinate; by default the bundled name, hub id or folder name. On
            NDIF, a folder or bundled model needs one, ``org/name``: the hosted model it is.
        allow_float16: load in float16 although its range is too small for residual streams.
        trust_remote_code: run code that comes with the model; it can do whatever you can.

    Returns:
        The model; no parameter takes gradients.

    Raises:
        UsageError: unknown model, backend, dtype, device or attention, or one that does not go
            with the model.
        PersonaError: the model cannot be loaded, or fails a check.
    """
    where = read_backend(backend)
    if label is not None and not label.strip():
        raise UsageError("The label of the model is empty; give it a name, or none.")
    if where != "local":
        own = {"dtype": dtype, "device": device, "attention": attention}
        if chosen := [name for name, value in own.items() if value is not None]:
            raise UsageError(
                f"A server chooses precision, device and attention itself; leave out --{chosen[0]} "
                f"with the backend {backend!r}."
            )
        server = None if where == "simulate" else where
        return _load_weightless(
            str(name), server, template, label, trust_remote_code=trust_remote_code
        )
    source, shown = find_checkpoint(str(name))
    config = read_config(source, shown, trust_remote_code=trust_remote_code)
    precision = _choose_dtype(shown, config, dtype, allow_float16=allow_float16)
    computed = _choose_attention(shown, config, attention)
    place = _choose_device(device)
    if place.type == "cpu":
        keep_freed_memory()
    module: Any = load_weights(
        name, precision, attention=computed, trust_remote_code=trust_remote_code
    )
    tokenizer = load_tokenizer(name, template, trust_remote_code=trust_remote_code)
    module.eval().requires_grad_(requires_grad=False).to(place)
    _normalise_generation(module)
    try:
        model = TransformersModel(
            module, task="text-generation", tokenizer=tokenizer, rename=STANDARD_NAMES
        )
    except ValueError as error:
        raise PersonaError(
            f"The model {shown!r} ({type(module).__name__}) is not supported: {one_line(error)}"
        ) from error
    check_model(model, shown)
    _warn_of_other_ends(model, shown)
    origin = _origin(model, source, shown)
    _RECORDS[model] = _record(
        model, label or shown, str(name), version_of(source, config), precision, origin
    )
    return model


def _warn_of_other_ends(model: TransformersModel, shown: str) -> None:
    """Warn where the model would not stop at the end of its turn."""
    tokenizer = cast("PreTrainedTokenizerBase", model.tokenizer)
    end, ends = end_of_turn(tokenizer), end_tokens(model)
    if end is not None and end not in ends:
        warnings.warn(
            f"The template ends an answer with {tokenizer.convert_ids_to_tokens(end)!r}, but "
            f"{shown!r} stops at {tokenizer.convert_ids_to_tokens(ends)}: a text runs on behind "
            "its end, and what follows is scored too (eos_token_id in generation_config.json).",
            stacklevel=3,
        )


def _record(
    model: TransformersModel,
    label: str,
    source: str,
    version: str,
    precision: str,
    origin: Mapping[str, Any],
) -> ModelRecord:
    text_config = model.config.get_text_config()
    return ModelRecord(
        label=label,
        source=source,
        version=version,
        architecture=type(model._module).__name__,
        precision=precision,
        attn_implementation=model.config._attn_implementation,
        n_layers=len(model.layers),
        d_model=text_config.hidden_size,
        n_heads=text_config.num_attention_heads,
        provenance=origin,
    )


def _origin(model: TransformersModel, source: str, shown: str) -> Mapping[str, Any]:
    """Where the weights of a model (of an adapter, its base model's) come from; warns of it."""
    origin = provenance_of(base_of(source) or source)
    warn_of_origin(origin, model.tokenizer, shown)
    return origin


def _load_weightless(
    name: str,
    server: Server | None,
    template: str | Path | None,
    label: str | None,
    *,
    trust_remote_code: bool,
) -> TransformersModel:
    """Build the client of a hosted model: names and tokenizer, no weights.

    Args:
        name: a bundled model, a local folder, or a hub id.
        server: the server; None starts one.
        template: as in `load_model`.
        label: as in `load_model`.
        trust_remote_code: as in `load_model`.
    """
    source, shown = find_checkpoint(name)
    repo_id = hosted_name(name, label) if server is not None else f"simulated/{Path(shown).name}"
    config = read_config(source, shown, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(name, template, trust_remote_code=trust_remote_code)
    trusted = {"trust_remote_code": True} if trust_remote_code else {}
    try:
        model = TransformersModel(
            source,
            task="text-generation",
            tokenizer=tokenizer,
            rename=STANDARD_NAMES,
            attn_implementation="eager",
            **trusted,
        )
    except ValueError as error:
        raise PersonaError(f"The model {shown!r} is not supported: {one_line(error)}") from error
    check_names(model, shown)
    _ID_CACHE[source] = repo_id
    origin: Mapping[str, Any] = {}  # nothing is known here of a hosted model's weights
    if server is None:
        origin = _origin(model, source, shown)
        precision, version = _choose_dtype(shown, config, None), version_of(source, config)
        server = simulate(model, source, repo_id, precision)
    else:
        precision, name = HOSTED, repo_id
        version = f"{HOSTED} {_hosted_version(source, config)}"
    _HOSTED[model] = HostedModel(server, repo_id, model.to_model_key())
    _RECORDS[model] = _record(model, label or shown, name, version, precision, origin)
    return model


def simulate(model: TransformersModel, source: str, repo_id: str, precision: str) -> Server:
    """Start a server process for a model, which ends when the model is gone."""
    from persona_nns.models.loopback import LoopbackServer

    server = LoopbackServer(source, repo_id, precision)
    finalize(model, server.stop)  # this also keeps it
    return server.address


def hosted_name(name: str, label: str | None) -> str:
    """The ``org/name`` under which a server is asked for a model.

    Raises:
        UsageError: a folder or bundled model without the name of a hosted one.
    """
    source, shown = find_checkpoint(name)
    if source == name and not Path(name).expanduser().is_dir():
        return name
    if label is None or not HUB_ID.fullmatch(label):
        raise UsageError(
            f"A server is asked for {shown!r} under the name it is hosted under; "
            "add --as org/name (its configuration and tokenizer are read here)."
        )
    return label


def check_hosting(names: Sequence[str], labels: Sequence[str] | None, backend: str) -> None:
    """See that a backend can be asked for some models before anything runs.

    Raises:
        UsageError: no such backend, or a model that it cannot be asked for.
    """
    if isinstance(read_backend(backend), Server):
        for name, label in zip(names, labels or [None] * len(names), strict=True):
            hosted_name(name, label)


def _hosted_version(source: str, config: PreTrainedConfig) -> str:
    """What is known here of a hosted model's version: never its weights."""
    folder = Path(source)
    return digest_of([folder / "config.json"]) if folder.is_dir() else version_of(source, config)


def hosted(model: TransformersModel) -> HostedModel | None:
    """Where a model runs that is not loaded here; None for one that is."""
    return _HOSTED.get(model)


def record_of(model: TransformersModel) -> ModelRecord:
    """What `load_model` wrote down about a model.

    Raises:
        UsageError: the model was not loaded by `load_model`.
    """
    if model not in _RECORDS:
        raise UsageError("This model was not loaded by persona_nns; load it with pn.load_model.")
    return _RECORDS[model]


def _choose_dtype(
    shown: str, config: PreTrainedConfig, dtype: str | None, *, allow_float16: bool = False
) -> str:
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"Unknown dtype {dtype!r}; use {', '.join(DTYPES)}.")
    if dtype == "float16" and not allow_float16:
        raise UsageError(
            f"float16 overflows in the residual stream and gives NaN, so {shown!r} is not loaded "
            "in it; use bfloat16 or float32 (or force it with --allow-float16)."
        )
    if dtype is not None:
        return dtype
    own = str(config.dtype).removeprefix("torch.")
    # Gemma-2 is published in bfloat16 and was measured in float32.
    return "float32" if config.model_type == "gemma2" or own != "bfloat16" else "bfloat16"


def version_and_precision(name: str | Path) -> tuple[str, str]:
    """What determines the numbers of a model beside its prompts, without loading its weights.

    Returns:
        The digest of its files, or ``org/name@commit`` for one on the hub; and the precision that
        `load_model` chooses for it.

    Raises:
        UsageError: unknown model.
        PersonaError: its version cannot be told.
    """
    source, shown = find_checkpoint(str(name))
    config = read_config(source, shown, trust_remote_code=False)
    version = version_of(source, config)
    on_hub = not Path(source).is_dir()
    return f"{source}@{version}" if on_hub else version, _choose_dtype(shown, config, None)


def _choose_attention(shown: str, config: PreTrainedConfig, attention: str | None) -> str:
    if attention not in (None, *MASKED):
        raise UsageError(f"Unknown attention {attention!r}; use {' or '.join(MASKED)}.")
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    if attention == "sdpa" and capped:
        raise UsageError(
            f"The model {shown!r} caps its attention logits, which sdpa cannot; leave out "
            "--attention."
        )
    return attention or MASKED[0]


def _normalise_generation(module: PreTrainedModel) -> None:
    """Generate with a growing cache up to an end token, whatever the checkpoint prefers.

    Without a cache every step gives the residuals of the whole sequence, a static cache refuses
    one that it is given, and stop strings need more than the model. A repetition penalty and the
    like change what is said, and stay.
    """
    module.config.use_cache = True
    generation = cast(GenerationConfig, module.generation_config)
    generation.use_cache = True
    generation.cache_implementation = None
    generation.stop_strings = None
    # Tokens alone come back, whatever else a checkpoint asks for.
    generation.return_dict_in_generate = False
    for extra in ("scores", "logits", "attentions", "hidden_states"):
        setattr(generation, f"output_{extra}", False)


def _choose_device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"The device {device!r} cannot be used: {one_line(error)}") from error
    return place
