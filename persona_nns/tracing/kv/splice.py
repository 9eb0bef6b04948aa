"""Rows of keys and values put together from spans of several caches."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from persona_nns.errors import PersonaError
from persona_nns.tracing.kv.cache import KVCache, check_alike
from persona_nns.tracing.kv.rotation import Rotation


@dataclass(frozen=True)
class Piece:
    """A span of each row of a cache.

    Attributes:
        cache: where keys and values are taken from.
        spans: for each row, tokens by their place in the row; may be empty.
        slots: for each row, how many places the piece takes, at least its tokens: they stand at
            the end of the slot, and the spare places before them are masked. None: no spare ones.
    """

    cache: KVCache
    spans: Sequence[range]
    slots: Sequence[int] | None = None


def splice(pieces: Sequence[Piece], rotation: Rotation) -> KVCache:
    """Lay pieces side by side, at consecutive positions from 0 on, in each row.

    Every key that comes to stand at another position than it was computed at is rotated by the
    distance; a key that stays is not touched.

    Args:
        pieces: in order; their caches have the same rows.
        rotation: of the model that the caches come from.

    Returns:
        The spliced rows, padded on the left to the longest.

    Raises:
        PersonaError: caches of different models, a span that a row does not have, a slot that is
            too small, or a model whose keys cannot be moved.
    """
    caches = list({id(piece.cache): piece.cache for piece in pieces}.values())
    check_alike(caches)
    device = caches[0].attention_mask.device
    # All caches side by side are one pool of columns to choose from.
    offset, first = {}, 0
    for cache in caches:
        offset[id(cache)] = first
        first += cache.width
    starts = {id(cache): cache.padding.tolist() for cache in caches}
    chosen: list[list[int]] = []  # of each row, columns of the pool; -1 for a spare place
    for row in range(caches[0].attention_mask.shape[0]):
        columns: list[int] = []
        for piece in pieces:
            start = starts[id(piece.cache)][row]
            span = _existing(piece.spans[row], piece.cache.width - start, row)
            n_spare = _spare(piece, row)
            columns += [-1] * n_spare
            columns += [offset[id(piece.cache)] + start + token for token in span]
        chosen.append(columns)
    width = max(map(len, chosen))
    padded = [[-1] * (width - len(columns)) + columns for columns in chosen]
    index = torch.tensor(padded, device=device).reshape(len(chosen), width)
    padding = torch.tensor([width - len(columns) for columns in chosen], device=device)
    place = torch.arange(width, device=device) - padding[:, None]

    mask = (index >= 0).long()
    index = index.clamp(min=0)
    came_from = torch.cat([cache.position_ids for cache in caches], dim=1).gather(1, index)
    distance = torch.where(mask > 0, place - came_from, 0)

    def take(tensors: Sequence[Tensor]) -> Tensor:
        pool = torch.cat(list(tensors), dim=2)
        _, heads, _, d_head = pool.shape
        columns = index[:, None, :, None].expand(-1, heads, -1, d_head)
        return pool.gather(2, columns.to(pool.device))

    n_layers, turned = caches[0].n_layers, rotation.turning(distance)
    return KVCache(
        tuple(turned(take([cache.keys[k] for cache in caches]), k) for k in range(n_layers)),
        tuple(take([cache.values[k] for cache in caches]) for k in range(n_layers)),
        mask,
        place.clamp(min=0),
    )


def _existing(span: range, n_tokens: int, row: int) -> range:
    if len(span) and not (span[0] >= 0 and span[-1] < n_tokens):
        raise PersonaError(
            f"Row {row} has no span of tokens {span[0]} to {span[-1]}: its cache holds {n_tokens}."
        )
    return span


def _spare(piece: Piece, row: int) -> int:
    if piece.slots is None:
        return 0
    n_spare = piece.slots[row] - len(piece.spans[row])
    if n_spare < 0:
        raise PersonaError(
            f"A span of {len(piece.spans[row])} tokens does not fit a slot of {piece.slots[row]}."
        )
    return n_spare
