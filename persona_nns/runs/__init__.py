"""Who carries it out: request, identity and queue; this process, workers, or a server.

Knows: models, results, and all that they know. Touches: processes and the network.
"""

import lazy_loader

import persona_nns._anyio_first  # noqa: F401

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
