"""What an experiment says: variables, plans and units, labels of layers and positions, its file.

Knows: errors. Touches: the experiment's own file.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
