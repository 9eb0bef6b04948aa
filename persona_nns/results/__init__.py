"""Where it lands: Zarr groups, chunks, locations and claims; labelled arrays back.

Knows: declarations and the grids of prompts. Touches: Zarr and xarray; never torch, so that a
store can be read where there is no model.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
