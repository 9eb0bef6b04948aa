"""Traits: files, answers, vectors, judges; what is trained: students and cartridges.

A wing: knows tracing, models, results and the bundled models. Touches: an OpenAI-compatible
endpoint, and peft.
"""

import lazy_loader

import persona_nns._anyio_first  # noqa: F401

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
