"""What is asked: grids, texts, token ids, spans and positions; markers in what comes back.

Knows: declarations. Touches: tokenizers, and the files that questions and personas come in; never
a weight.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
