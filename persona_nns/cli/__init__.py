"""The door: the commands of ``persona-nns``, their listings, and the demo.

Knows: every room. Touches: the terminal.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
