"""The numbers published with the paper, and ours beside them.

A wing: knows figures, results and prompts. Touches: the stores that are compared.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
