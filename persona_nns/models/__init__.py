"""On which model: files, loading, standard names, checks at every layer, memory; servers.

Knows: tracing, prompts, declarations, and the bundled models. Touches: weights and the hub.
"""

import lazy_loader

import persona_nns._anyio_first  # noqa: F401

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
