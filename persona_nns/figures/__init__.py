"""How it is seen: figures and tables of labelled arrays.

Knows: declarations and results. Touches: matplotlib, seaborn and scipy; neither torch nor Zarr.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
