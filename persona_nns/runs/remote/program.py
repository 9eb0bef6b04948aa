"""What a job does on the server: the experiment's own `measure`, and a few facts about it.

Everything here is shipped with the request and runs where our package is not installed: torch,
nnsight and Python's own library only.
"""

import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from nnsight import TransformersModel

from persona_nns.declarations.plans import Unit
from persona_nns.errors import PersonaError
from persona_nns.models.attached import Fingerprint, check_attached
from persona_nns.models.checks import check_model
from persona_nns.runs.remote.sandbox import standing_in


@dataclass(frozen=True)
class Terms:
    """What a job is told beside what to measure.

    Attributes:
        shown: how the model is called in a message.
        template: the chat template that the client renders with.
        sample: a text.
        sample_ids: its token ids on the client.
        check: check the model's names and sites at every layer first.
        adapter: what tells that the adapter asked for is attached; None where none is.
    """

    shown: str
    template: str | None
    sample: str
    sample_ids: tuple[int, ...]
    check: bool
    adapter: Fingerprint | None = None


def carry_out(
    model: TransformersModel,
    measure: Callable[..., Mapping[str, Any]],
    units: Sequence[Unit],
    arguments: Mapping[str, Any],
    terms: Terms,
) -> dict[str, Any]:
    """Measure a batch of units on the server.

    Returns:
        ``measured`` (what `measure` returned, on the CPU), ``warnings``, ``seconds``,
        ``precision`` and ``device`` of the model, and ``server`` (`facts_of`).
    """
    started = time.perf_counter()
    tokenizer = copy(model.tokenizer)
    tokenizer.chat_template = terms.template
    model.tokenizer = tokenizer
    check_tokens(tokenizer, terms)
    with (
        torch.no_grad(),
        standing_in(model),
        growing_cache(model._module),
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always", UserWarning)
        if terms.adapter is not None:
            exact = model.dtype is torch.float32
            check_attached(model, terms.adapter, 1e-3 if exact else 5e-2)
        if terms.check:
            check_model(model, terms.shown)
        measured = measure(model, list(units), **arguments)
        facts = facts_of(model)
    return {
        "measured": {name: light(value) for name, value in measured.items()},
        "warnings": [str(one.message) for one in said or [] if one.category is UserWarning],
        "seconds": time.perf_counter() - started,
        "precision": facts["precision"],
        "device": facts["device"],
        "server": facts,
    }


def facts_of(model: TransformersModel) -> dict[str, Any]:
    """What a server computes with, as far as a job can see it.

    Returns:
        ``attention`` (the implementation), ``precision``, ``device``, ``revision`` (the commit
        that the weights are of; None where it is not known), ``versions`` of Python and of the
        packages that matter; of a GPU its ``gpu`` (name) and ``gpu_bytes`` (memory).
    """
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "nnsight"):
        versions[name] = str(getattr(sys.modules.get(name), "__version__", ""))
    facts: dict[str, Any] = {
        "attention": getattr(model._module.config, "_attn_implementation", None),
        "precision": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "revision": getattr(model._module.config, "_commit_hash", None),
        "versions": versions,
    }
    if model.device.type == "cuda" and torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(model.device)
        facts |= {"gpu": gpu.name, "gpu_bytes": gpu.total_memory}
    return facts


def check_tokens(tokenizer: Any, terms: Terms) -> None:
    """See that the server's tokenizer reads a text as the client's did.

    Raises:
        PersonaError: it does not.
    """
    if tuple(tokenizer(terms.sample)["input_ids"]) != terms.sample_ids:
        raise PersonaError(
            f"The server's tokenizer of {terms.shown!r} gives other tokens than the one here; "
            "load the revision that the server hosts."
        )


def light(value: Any) -> Any:
    """A result without what it hangs on: no graph, no larger storage, no device."""
    if isinstance(value, torch.Tensor):
        plain = value.detach().to("cpu", torch.float32 if value.is_floating_point() else None)
        return plain.contiguous().clone()
    return value.tolist() if hasattr(value, "tolist") else value


@contextmanager
def growing_cache(module: Any) -> Iterator[None]:
    """For a moment, generate with a growing cache, whatever the checkpoint prefers.

    As `load_model` does it for good; here the model is other people's too.
    """
    wanted = {"use_cache": True, "cache_implementation": None, "stop_strings": None}
    settings = module.generation_config
    before = {name: getattr(settings, name, None) for name in wanted}
    cached = module.config.use_cache
    for name, value in wanted.items():
        setattr(settings, name, value)
    module.config.use_cache = True
    try:
        yield
    finally:
        module.config.use_cache = cached
        for name, value in before.items():
            setattr(settings, name, value)
