"""What determines the numbers that a model gives, as a value."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelRecord:
    """What determines the numbers a loaded model gives, and the name they are stored under.

    Attributes:
        label: the ``model`` coordinate.
        source: bundled name, folder or hub id it was loaded from.
        version: commit of the hub repository, or digest of the folder's weights and configs, or of
            the GGUF file; with an adapter, digest of that and of the adapter's files; of quantised
            weights, digest of that and of how they are.
        architecture: its model class.
        precision: ``float32``, ``bfloat16`` or ``float16``.
        attn_implementation: how attention is computed.
        n_layers: number of decoder blocks.
        d_model: width of the residual stream.
        n_heads: number of attention heads of a block.
        n_kv_heads: number of its heads that have keys and values of their own.
        provenance: where the weights come from, where that is a package or a GGUF file.
        adapter: where there is one beside the model, its ``source``, its files' ``digest``, and
            ``base_version``, the model's version without it.
        quantisation: of weights that are kept in fewer bits, the ``kind``, and ``base_version``,
            the model's version with whole ones.
    """

    label: str
    source: str
    version: str
    architecture: str
    precision: str
    attn_implementation: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any], compare=False)
    adapter: Mapping[str, str] = field(default_factory=dict[str, str], compare=False)
    quantisation: Mapping[str, str] = field(default_factory=dict[str, str], compare=False)
