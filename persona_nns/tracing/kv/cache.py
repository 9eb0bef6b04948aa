"""A key-value cache as a value: the keys and values of left-padded rows, layer by layer."""

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from nnsight import TransformersModel
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from persona_nns.errors import PersonaError


@dataclass(frozen=True)
class KVCache:
    """Keys and values of left-padded rows.

    Nothing changes one: a pass is given a copy (`cache`), and what cuts or splices makes another.

    Attributes:
        keys: of each layer, [row, kv_head, column, d_head], rotary positions applied.
        values: of each layer, [row, kv_head, column, d_head].
        attention_mask: [row, column], 0 on padding and on spare places.
        position_ids: [row, column], the position that each key stands at (0 on padding).

    Raises:
        PersonaError: a layer does not hold every column, or layers differ in type.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    attention_mask: Tensor
    position_ids: Tensor

    def __post_init__(self) -> None:
        n_rows, width = self.attention_mask.shape
        for layer, held in enumerate(self.keys):
            if held.shape[2] < width:
                raise PersonaError(
                    f"Layer {layer} holds {held.shape[2]} of {width} columns: its sliding window "
                    "has forgotten the rest. Fill a DynamicCache() without a configuration, "
                    "which keeps them all."
                )
        for layer, held in enumerate((*self.keys, *self.values)):
            if held.shape[0] != n_rows or held.shape[2] != width:
                raise PersonaError(
                    f"Layer {layer % len(self.keys)} holds {held.shape[0]} rows of "
                    f"{held.shape[2]} columns; the mask has {n_rows} rows of {width}."
                )
        if len({held.dtype for held in (*self.keys, *self.values)}) != 1:
            raise PersonaError("The layers of a cache have to be of one precision.")

    @property
    def width(self) -> int:
        """Columns."""
        return self.attention_mask.shape[1]

    @property
    def n_layers(self) -> int:
        """Decoder blocks."""
        return len(self.keys)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of keys and values."""
        return self.keys[0].dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in one layer."""
        _, kv_heads, _, d_head = self.keys[0].shape
        return kv_heads * (d_head + self.values[0].shape[3]) * self.dtype.itemsize

    @property
    def padding(self) -> Tensor:
        """Columns before the first token of each row, [row]."""
        return self.attention_mask.long().argmax(1)

    def by_position(self) -> Tensor:
        """Every key and value where it stands; NaN where a row holds nothing.

        Returns:
            [row, layer, 2, kv_head, position, d_head] in float32 on the CPU, keys first.
        """
        held = self.attention_mask > 0
        n_positions = int(self.position_ids[held].max()) + 1
        _, heads, _, d_head = self.keys[0].shape
        shape = (held.shape[0], self.n_layers, 2, heads, n_positions, d_head)
        data = torch.full(shape, torch.nan)
        for row, columns in enumerate(held):
            columns, position = columns.cpu(), self.position_ids[row, columns].cpu()
            for layer, pair in enumerate(zip(self.keys, self.values, strict=True)):
                for kv, tensor in enumerate(pair):
                    data[row, layer, kv, :, position] = tensor[row].cpu()[:, columns].float()
        return data

    def rows(self, index: Tensor | slice) -> "KVCache":
        """Some of the rows, or some of them several times; as wide as the longest of them."""
        attention_mask = self.attention_mask[index]
        first = int(attention_mask.any(0).long().argmax())
        return KVCache(
            tuple(_of_rows(keys, index)[:, :, first:] for keys in self.keys),
            tuple(_of_rows(values, index)[:, :, first:] for values in self.values),
            attention_mask[:, first:],
            self.position_ids[index][:, first:],
        )

    def times(self, n_rows: int) -> "KVCache":
        """Its one row so many times; views."""
        return KVCache(
            tuple(keys.expand(n_rows, -1, -1, -1) for keys in self.keys),
            tuple(values.expand(n_rows, -1, -1, -1) for values in self.values),
            self.attention_mask.expand(n_rows, -1),
            self.position_ids.expand(n_rows, -1),
        )

    def begin(self, index: Tensor, length: Tensor) -> "KVCache":
        """The first tokens of some of the rows, right-aligned.

        Args:
            index: [row], which row of this cache.
            length: [row], how many of its tokens, at most all; none where it is not positive.
        """
        width = int(length.max())
        token = torch.arange(width, device=length.device) - (width - length[:, None])
        column = (self.padding[index][:, None] + token).clamp(0, self.width - 1)

        def moved(tensor: Tensor) -> Tensor:
            rows = _of_rows(tensor, index)
            at = column[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3])
            return rows.gather(2, at.to(rows.device))

        held = (token >= 0).long()
        return KVCache(
            tuple(map(moved, self.keys)),
            tuple(map(moved, self.values)),
            held,
            self.position_ids[index].gather(1, column) * held,
        )

    def until(self, column: int) -> "KVCache":
        """The columns before ``column``; a view."""
        if not 0 <= column <= self.width:
            raise PersonaError(f"There is no column {column}: the cache has {self.width}.")
        return KVCache(
            tuple(keys[:, :, :column] for keys in self.keys),
            tuple(values[:, :, :column] for values in self.values),
            self.attention_mask[:, :column],
            self.position_ids[:, :column],
        )

    def only_in(self, band: Container[int], other: "KVCache") -> "KVCache":
        """This cache in the layers of a band, another one of the same width in the rest.

        What only one of the two holds (a spare place of the other) counts as held: a pass has to
        hide it in the layers that lack it, through their own attention masks (`block_keys`).
        """
        check_alike([self, other])
        if self.width != other.width:
            raise PersonaError(f"Caches of {self.width} and {other.width} columns do not mix.")
        mine = [layer in band for layer in range(self.n_layers)]
        held = self.attention_mask | other.attention_mask
        positions = torch.where(self.attention_mask > 0, self.position_ids, other.position_ids)
        return KVCache(
            tuple((self if mine[k] else other).keys[k] for k in range(self.n_layers)),
            tuple((self if mine[k] else other).values[k] for k in range(self.n_layers)),
            held,
            positions,
        )

    def mixed_with(self, other: "KVCache", mine: Tensor) -> "KVCache":
        """This cache in some of the heads of each row, another one of the same columns elsewhere.

        Args:
            other: for the other heads.
            mine: [row, layer, kv_head], True where a head's keys and values are this cache's.
        """
        check_alike([self, other])
        if not torch.equal(self.attention_mask, other.attention_mask):
            raise PersonaError("Only caches that hold the same columns can be mixed head by head.")
        layers = zip(mine[..., None, None].unbind(1), self.keys, strict=True)
        own = [of_layer.to(keys.device) for of_layer, keys in layers]
        return replace(
            self,
            keys=tuple(map(torch.where, own, self.keys, other.keys)),
            values=tuple(map(torch.where, own, self.values, other.values)),
        )

    def plus(self, more: "KVCache", less: "KVCache") -> "KVCache":
        """This cache + more − less, in float32: what differs between two others, added.

        All three hold the same positions; where ``more`` and ``less`` hold the same, nothing is
        changed.
        """
        check_alike([self, more, less])
        for other in (more, less):
            if not torch.equal(other.position_ids, self.position_ids):
                raise PersonaError("Only caches that hold the same positions can be added.")

        def combine(own: Tensor, plus: Tensor, minus: Tensor) -> Tensor:
            return (own.float() + (plus.float() - minus.float())).to(own.dtype)

        return replace(
            self,
            keys=tuple(map(combine, self.keys, more.keys, less.keys)),
            values=tuple(map(combine, self.values, more.values, less.values)),
        )

    def cache(self) -> DynamicCache:
        """A cache for one pass, which may grow it: a later pass needs another.

        It is built without the model's configuration, so that layers with a sliding window keep
        every column (one that has forgotten columns cannot be cut back) and the model's masks do
        the windowing.
        """
        cache = DynamicCache()
        for keys, values in zip(self.keys, self.values, strict=True):
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values  # not copied: what grows them makes others
            cache.layers.append(layer)
        return cache

    def write_into(self, cache: Cache) -> None:
        """Inside a trace: overwrite the whole cache that a pass has been given.

        Call it before the first block runs, on `running_cache(model)`.

        Raises:
            PersonaError: the cache is of another shape or precision.
        """
        layers: Any = cache.layers
        if len(layers) != self.n_layers:
            raise PersonaError(
                f"A cache of {self.n_layers} layers cannot overwrite one of {len(layers)}."
            )
        for k, layer in enumerate(layers):
            shape, wanted = tuple(self.keys[k].shape), tuple(layer.keys.shape)
            if shape != wanted or self.dtype != layer.keys.dtype:
                raise PersonaError(
                    f"In layer {k}, keys of shape {shape} in {self.dtype} cannot overwrite keys "
                    f"of shape {wanted} in {layer.keys.dtype}."
                )
        for k, layer in enumerate(layers):
            layer.keys, layer.values = self.keys[k], self.values[k]


def _of_rows(held: Tensor, index: Tensor | slice) -> Tensor:
    """Some rows of a layer, wherever that is: of a spread model, layers are on several devices."""
    return held[index.to(held.device) if isinstance(index, Tensor) else index]


def check_alike(caches: Sequence[KVCache]) -> None:
    """See that caches can come from one model and one batch.

    Raises:
        PersonaError: they differ in layers, heads, widths, precision, or in their rows.
    """
    kinds = {
        (
            cache.n_layers,
            cache.keys[0].shape[1],
            cache.keys[0].shape[3],
            str(cache.dtype).removeprefix("torch."),
            cache.attention_mask.shape[0],
        )
        for cache in caches
    }
    if len(kinds) > 1:
        found = "; ".join(str(kind) for kind in sorted(kinds))
        raise PersonaError(
            "Caches of different models, precisions or batches do not mix: (layers, key-value "
            f"heads, width of a head, precision, rows) are {found}."
        )


def read_cache(cache: Cache, attention_mask: Tensor, position_ids: Tensor | None = None) -> KVCache:
    """The content of a cache after a pass, inside a trace or after it.

    Args:
        cache: the model's own.
        attention_mask: [row, column], of the pass; columns that were not run are left out.
        position_ids: [row, column]; by default counted from the first token of each row.

    Raises:
        PersonaError: a layer with a sliding window has forgotten columns.
    """
    layers: Any = cache.layers
    width = cache.get_seq_length()  # what was run, whether or not it is still held
    if position_ids is None:
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return KVCache(
        tuple(layer.keys for layer in layers),
        tuple(layer.values for layer in layers),
        attention_mask[:, :width],
        position_ids[:, :width],
    )


def running_cache(model: TransformersModel) -> Cache:
    """Inside a trace: the cache that the pass has been given, before the first block runs.

    Raises:
        PersonaError: the pass runs without one.
    """
    arguments, named = model.layers[0].inputs
    for value in (*arguments, *named.values()):
        if isinstance(value, Cache):
            return value
    raise PersonaError("This pass runs without a cache; give the trace past_key_values.")


def stack(caches: Sequence[KVCache]) -> KVCache:
    """The rows of several caches, padded on the left to the widest.

    Raises:
        PersonaError: they are caches of different models.
    """
    check_alike([cache.rows(slice(0, 1)) for cache in caches])
    width = max(cache.width for cache in caches)

    def join(tensors: Sequence[Tensor]) -> Tensor:  # [row, kv_head, column, d_head]
        pad = torch.nn.functional.pad
        return torch.cat([pad(t, (0, 0, width - t.shape[2], 0)) for t in tensors])

    def join_flat(tensors: Sequence[Tensor]) -> Tensor:  # [row, column]
        pad = torch.nn.functional.pad
        return torch.cat([pad(t, (width - t.shape[1], 0)) for t in tensors])

    n_layers = caches[0].n_layers
    return KVCache(
        tuple(join([cache.keys[k] for cache in caches]) for k in range(n_layers)),
        tuple(join([cache.values[k] for cache in caches]) for k in range(n_layers)),
        join_flat([cache.attention_mask for cache in caches]),
        join_flat([cache.position_ids for cache in caches]),
    )
