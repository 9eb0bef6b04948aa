"""Bundled models that teach: two small transformers trained on synthetic text.

``organism-qwen2`` and ``organism-gemma2`` show the shape of the paper's results on a laptop.
Their grammar (``role_prompts``, ``multiple_choice``, ``traits``) is importable without torch.
A wing: knows prompts. Touches: the weights that it trains.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
