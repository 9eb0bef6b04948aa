"""Load a language model as an nnsight model with the same names on every architecture.

Supported, with every name and index checked at load and in the tests: Llama, Qwen2, Qwen3,
Gemma2, Gemma3 (text), Mistral, Phi3, OLMo2 (no input norm: its blocks normalise their outputs),
GPT-2 and GPT-NeoX. Another decoder is loaded if it passes the same checks.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

from nnsight import TransformersModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from persona_nns.declarations.record import ModelRecord as ModelRecord
from persona_nns.errors import PersonaError, UsageError, one_line
from persona_nns.models.adapters import base_of, find_adapter, label_with, warn_of_other_base
from persona_nns.models.checkpoints import (
    find_checkpoint,
    load_tokenizer,
    load_weights,
    read_config,
    version_of,
)
from persona_nns.models.checks import check_model
from persona_nns.models.choices import choose_attention, choose_device, choose_dtype
from persona_nns.models.choices import version_and_precision as version_and_precision
from persona_nns.models.hosting import HostedModel as HostedModel
from persona_nns.models.hosting import check_hosting as check_hosting
from persona_nns.models.hosting import hosted as hosted
from persona_nns.models.hosting import hosted_name as hosted_name
from persona_nns.models.hosting import load_weightless
from persona_nns.models.hosting import simulate as simulate
from persona_nns.models.memory import keep_freed_memory
from persona_nns.models.names import STANDARD_NAMES as STANDARD_NAMES
from persona_nns.models.placement import DeviceMap, check_placing, placing, settle
from persona_nns.models.records import HOSTED as HOSTED
from persona_nns.models.records import origin_of, write_record
from persona_nns.models.records import record_of as record_of
from persona_nns.models.servers import Server, read_backend
from persona_nns.prompts.templates import end_of_turn
from persona_nns.tracing.continuations import end_tokens as end_tokens


def load_model(
    name: str | Path,
    *,
    adapter: str | Path | None = None,
    revision: str | None = None,
    backend: str = "local",
    dtype: str | None = None,
    device: str | None = None,
    device_map: DeviceMap | None = None,
    quantise: str | None = None,
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
        adapter: folder or hub id of a low-rank adapter (peft's) that is put on it. Here it is
            added into the weights; a server fetches it itself, and attaches it for each request.
        revision: branch, tag or commit of the hosted model; by default the one that the server
            loads for its name alone.
        backend: where traces run: ``local``; ``simulate`` (a server process on this machine, as
            NDIF's); ``ndif``, or the URL of such a server. On a server the model's weights are
            never loaded here: its configuration and tokenizer are.
        dtype: ``float32``, ``bfloat16`` or ``float16``. By default float32 for Gemma-2 (as in
            the paper) and for float16 checkpoints, otherwise the checkpoint's own (bfloat16
            for the published Qwen models).
        device: a torch device; by default ``cuda`` where there is one, else ``cpu``.
        device_map: how a model is spread over several devices, by transformers: ``auto``,
            ``balanced``, ``balanced_low_0``, ``sequential``, or devices by the names of its parts.
        quantise: ``nf4`` keeps the weights in four bits (bitsandbytes); ``dtype`` is what they
            are multiplied in. Its numbers are another model's.
        attention: how attention is computed: ``eager``, the default, or ``sdpa``, which gives the
            same numbers within rounding.
        template: ``plain``, or a Jinja chat template that replaces the model's own.
        label: the ``model`` coordinate; by default the bundled name, hub id or folder name, with
            ``+`` and the adapter's. On NDIF, a folder or bundled model needs one, ``org/name``:
            the hosted model it is.
        allow_float16: load in float16 although its range is too small for residual streams.
        trust_remote_code: run code that comes with the model; it can do whatever you can.

    Returns:
        The model; no parameter takes gradients.

    Raises:
        UsageError: unknown model, adapter, backend, dtype, device or attention, or one that does
            not go with the model.
        PersonaError: the model cannot be loaded, or fails a check.
    """
    own = {"dtype": dtype, "device": device, "attention": attention}
    own |= {"device_map": device_map, "quantise": quantise}
    where = _check_asked(backend, label, revision, own)
    beside = None if adapter is None else find_adapter(adapter)
    if where != "local":
        server = None if where == "simulate" else where
        return load_weightless(
            str(name),
            server,
            template,
            label,
            beside,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    source, shown = find_checkpoint(str(name))
    if beside is not None:
        warn_of_other_base(beside, [shown, source])
    config = read_config(source, shown, trust_remote_code=trust_remote_code)
    precision = choose_dtype(shown, config, dtype, allow_float16=allow_float16)
    computed = choose_attention(shown, config, attention)
    place = choose_device(device)
    has_adapter = beside is not None or base_of(source) is not None
    placed = placing(shown, config, precision, place, device_map, quantise, has_adapter=has_adapter)
    if place.type == "cpu":
        keep_freed_memory()
    module: Any = load_weights(
        name,
        precision,
        attention=computed,
        adapter=beside,
        trust_remote_code=trust_remote_code,
        placed=placed,
    )
    tokenizer = load_tokenizer(name, template, adapter=beside, trust_remote_code=trust_remote_code)
    module.eval().requires_grad_(requires_grad=False)
    settle(module, shown, place, placed)
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
    origin = origin_of(model, source, shown)
    version = version_of(source, config)
    label = label or label_with(shown, beside)
    write_record(model, label, str(name), version, precision, origin, beside, quantise)
    return model


def outline_model(
    name: str | Path,
    *,
    adapter: str | Path | None = None,
    revision: str | None = None,
    backend: str = "local",
    dtype: str | None = None,
    device: str | None = None,
    device_map: DeviceMap | None = None,
    quantise: str | None = None,
    attention: str | None = None,
    template: str | Path | None = None,
    label: str | None = None,
    allow_float16: bool = False,
    trust_remote_code: bool = False,
) -> TransformersModel:
    """The outline of a model: its names, tokenizer and record, without weights or a server.

    What a run of it would be can be told from it (`explain`), and nothing be measured. The
    arguments are those of `load_model`.

    Raises:
        UsageError: as `load_model`.
        PersonaError: as `load_model`.
    """
    own = {"dtype": dtype, "device": device, "attention": attention}
    own |= {"device_map": device_map, "quantise": quantise}
    where = _check_asked(backend, label, revision, own)
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    beside = None if adapter is None else find_adapter(adapter)
    if isinstance(where, Server):  # its weights are never loaded here
        how: dict[str, Any] = {"revision": revision, "backend": backend, "template": template}
        return load_model(name, adapter=adapter, label=label, **how, **trust)
    source, shown = find_checkpoint(str(name))
    config = read_config(source, shown, **trust)
    precision = choose_dtype(shown, config, dtype, allow_float16=allow_float16)
    computed = choose_attention(shown, config, attention)
    tokenizer = load_tokenizer(name, template, adapter=beside, **trust)
    try:
        model = TransformersModel(
            base_of(source) or source,
            task="text-generation",
            tokenizer=tokenizer,
            rename=STANDARD_NAMES,
            attn_implementation=computed,
            **({"trust_remote_code": True} if trust_remote_code else {}),
        )
    except ValueError as error:
        raise PersonaError(f"The model {shown!r} is not supported: {one_line(error)}") from error
    origin, version = origin_of(model, source, shown), version_of(source, config)
    label = label or label_with(shown, beside)
    write_record(model, label, str(name), version, precision, origin, beside, quantise)
    return model


def _check_asked(
    backend: str, label: str | None, revision: str | None, own: Mapping[str, Any]
) -> Literal["local", "simulate"] | Server:
    """Where a model is to run, once what is asked of it goes with that.

    Args:
        backend: as it was asked for.
        label: of the model.
        revision: of the model.
        own: what is chosen of a model here alone, by its name.

    Raises:
        UsageError: it does not.
    """
    where = read_backend(backend)
    if label is not None and not label.strip():
        raise UsageError("The label of the model is empty; give it a name, or none.")
    if revision is not None and not isinstance(where, Server):
        raise UsageError(
            f"A revision ({revision!r}) is chosen of a model on a server; here, download it into a "
            "folder and name that."
        )
    chosen = [name for name, value in own.items() if value is not None]
    if where != "local" and chosen:
        raise UsageError(
            "A server chooses precision, device and attention itself; leave out "
            f"--{chosen[0].replace('_', '-')} with the backend {backend!r}."
        )
    check_placing(own["device_map"], own["quantise"])
    if own["device"] is not None and own["device_map"] is not None:
        raise UsageError(
            f"--device {own['device']} puts a model on one device and --device-map spreads it; "
            "leave out one of them."
        )
    return where


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
