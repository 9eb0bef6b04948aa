"""Which tokens and caches a host is made of, once spans of other prompts are grafted into it."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from persona_nns.prompts.grids import Cell, PromptName
from persona_nns.prompts.render import Prompt, Span
from persona_nns.tracing.kv.cache import KVCache
from persona_nns.tracing.kv.rotation import Rotation
from persona_nns.tracing.kv.splice import Piece

#: Which prompt's cache each span is taken from, in the order of the spans.
Origins = Mapping[Span, PromptName]
#: Where the spans of each row stand, by prompt and name.
Spans = Sequence[Mapping[PromptName, Mapping[Span, range]]]


@dataclass(frozen=True)
class GraftSources:
    """What grafts are cut from: prompts without their p_last, which runs forward on the cache.

    Attributes:
        prompts: of each row, by name; the host is BY.
        spans: where their spans stand, without p_last.
        caches: of all rows, by prompt.
        rotation: of the model that the caches come from.
    """

    prompts: Sequence[Mapping[PromptName, Prompt]]
    spans: Spans
    caches: Mapping[PromptName, KVCache]
    rotation: Rotation


def spans_before_last(prompt: Prompt) -> dict[Span, range]:
    """The spans of a prompt without p_last."""
    last = len(prompt) - 1
    return {name: range(span.start, min(span.stop, last)) for name, span in prompt.spans.items()}


def tokens_of(origins: Origins, sources: GraftSources) -> list[list[int]]:
    """Token ids of the spliced rows, p_last included."""
    return [
        [
            *(
                token
                for span, name in origins.items()
                for token in prompt[name].ids[of[name][span].start : of[name][span].stop]
            ),
            prompt["BY"].ids[-1],
        ]
        for prompt, of in zip(sources.prompts, sources.spans, strict=True)
    ]


def pieces_of(
    origins: Origins, sources: GraftSources, slots: Sequence[int] | None = None
) -> list[Piece]:
    """The spans to splice; ``slots`` are the places that the persona takes."""
    return [
        Piece(
            sources.caches[name],
            [of[name][span] for of in sources.spans],
            slots if span == "persona" else None,
        )
        for span, name in origins.items()
    ]


def grafted_tokens(origins: Origins, sources: GraftSources) -> list[int]:
    """How many tokens of each row are not the host's."""
    return [
        sum(len(of[name][span]) for span, name in origins.items() if name != "BY")
        for of in sources.spans
    ]


def warn_about_prefixes(
    cells: Sequence[Cell], prompts: Sequence[Mapping[PromptName, Prompt]], spans: Spans
) -> None:
    """Warn of cells in which a token joins what stands before the persona with its first word.

    The prefix is the host's, so that there no graft, ``all`` included, gives the clean run.
    """
    joined = [
        cell.label
        for cell, prompt, of in zip(cells, prompts, spans, strict=True)
        if prompt["XY"].ids[: of["XY"]["prefix"].stop]
        != prompt["BY"].ids[: of["BY"]["prefix"].stop]
    ]
    if joined:
        warnings.warn(
            f"In {', '.join(joined)} the tokens before the persona are not the host's (one of "
            "them takes up a part of it): no graft can give the clean run.",
            stacklevel=3,
        )
