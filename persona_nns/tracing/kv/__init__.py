"""Key-value caches as values: read, cut, move, splice, overwrite.

`KVCache` holds the keys and values of left-padded rows with the positions that the keys were
computed at. `splice` lays spans of several caches side by side, at consecutive positions, and
rotates every key that comes to stand elsewhere (`Rotation`). Caches as labelled arrays are in
`persona_nns.results`, which no experiment's `measure` needs.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
