"""Key-value caches as values: read, cut, move, splice, overwrite.

`KVCache` holds the keys and values of left-padded rows with the positions that the keys were
computed at. `splice` lays spans of several caches side by side, at consecutive positions, and
rotates every key that comes to stand elsewhere (`Rotation`). Everything here runs in sessions:
torch and transformers' own caches. Caches as labelled arrays are in `persona_nns.kv.labelled`,
which no experiment's `measure` needs.
"""

from persona_nns.kv.cache import KVCache, read_cache, running_cache, stack
from persona_nns.kv.masks import hide
from persona_nns.kv.rotation import Rotation, read_rotation
from persona_nns.kv.splice import Piece, splice

__all__ = [
    "KVCache",
    "Piece",
    "Rotation",
    "hide",
    "read_cache",
    "read_rotation",
    "running_cache",
    "splice",
    "stack",
]
