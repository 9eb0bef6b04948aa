"""What may stand inside a trace, here or on a server.

Batches, residuals, decomposition, metrics, steering, averages, sampling, continuations, windows,
knockout, patching, and key-value caches in `kv`. Knows: prompts and declarations. Touches: torch,
nnsight and transformers' caches, nothing else, because a server has nothing else.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
