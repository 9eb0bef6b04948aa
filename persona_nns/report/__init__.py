"""How it is shared: a store as one page that a browser opens from disk.

A wing: knows figures, results, prompts and, for tokenizers, models. Touches: plotly, of which only
its script is used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
