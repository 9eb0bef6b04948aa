"""What is written down about a model when it is loaded."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from nnsight import TransformersModel

from persona_nns.declarations.record import ModelRecord
from persona_nns.errors import UsageError
from persona_nns.models.adapters import Adapter, base_of
from persona_nns.models.checkpoints import adapter_digest, version_with
from persona_nns.models.gguf import provenance_of, warn_of_origin
from persona_nns.models.placement import quantised_version

#: Precision of a model on somebody's server, until its first job has told; its version begins so.
HOSTED = "hosted"

_RECORDS: WeakKeyDictionary[TransformersModel, ModelRecord] = WeakKeyDictionary()


def write_record(
    model: TransformersModel,
    label: str,
    source: str,
    version: str,
    precision: str,
    origin: Mapping[str, Any],
    adapter: Adapter | None = None,
    quantise: str | None = None,
) -> None:
    """Write down what determines the numbers of a model, for `record_of`.

    Args:
        model: the model, or the client of a hosted one.
        label: its ``model`` coordinate.
        source: what it was loaded from.
        version: without the adapter.
        precision: that it is loaded in.
        origin: as `origin_of` gives it.
        adapter: that is put on it.
        quantise: how its weights are kept in fewer bits.
    """
    beside: Mapping[str, str] = {}
    if adapter is not None:
        digest = adapter_digest(adapter.folder)
        beside = {"source": adapter.asked, "digest": digest, "base_version": version}
        known = version.removeprefix(f"{HOSTED} ")
        version = version.removesuffix(known) + version_with(known, adapter.folder)
    held: Mapping[str, str] = {}
    if quantise is not None:
        held = {"kind": quantise, "base_version": version}
        version = quantised_version(version, quantise)
    text_config = model.config.get_text_config()
    _RECORDS[model] = ModelRecord(
        label=label,
        source=source,
        version=version,
        architecture=type(model._module).__name__,
        precision=precision,
        attn_implementation=model.config._attn_implementation,
        n_layers=len(model.layers),
        d_model=text_config.hidden_size,
        n_heads=text_config.num_attention_heads,
        n_kv_heads=getattr(text_config, "num_key_value_heads", None)
        or text_config.num_attention_heads,
        provenance=origin,
        adapter=beside,
        quantisation=held,
    )


def record_of(model: TransformersModel) -> ModelRecord:
    """What `load_model` wrote down about a model.

    Raises:
        UsageError: the model was not loaded by `load_model`.
    """
    if model not in _RECORDS:
        raise UsageError("This model was not loaded by persona_nns; load it with pn.load_model.")
    return _RECORDS[model]


def origin_of(model: TransformersModel, source: str, shown: str) -> Mapping[str, Any]:
    """Where the weights of a model (of an adapter, its base model's) come from; warns of it."""
    origin = provenance_of(base_of(source) or source)
    warn_of_origin(origin, model.tokenizer, shown)
    return origin
