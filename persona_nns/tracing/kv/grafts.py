"""Hosts into whose caches spans of other prompts have been grafted."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from nnsight import TransformersModel

from persona_nns.prompts.grids import Cell, PromptName
from persona_nns.prompts.render import ROLE_PROMPTS, Prompt, Span, render_cell
from persona_nns.tracing.kv.cache import KVCache
from persona_nns.tracing.kv.rotation import Rotation, read_rotation
from persona_nns.tracing.kv.splice import Piece, splice
from persona_nns.tracing.prefixes import fill_cache

#: Which prompt's cache each span is taken from, in the order of the spans.
Origins = Mapping[Span, PromptName]
#: Where the spans of each row stand, by prompt and name.
Spans = Sequence[Mapping[str, Mapping[Span, range]]]


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
    caches: Mapping[str, KVCache]
    rotation: Rotation

    def some(self, rows: Sequence[int]) -> "GraftSources":
        """Some of the rows."""
        which = torch.tensor(rows)
        return replace(
            self,
            prompts=[self.prompts[row] for row in rows],
            spans=[self.spans[row] for row in rows],
            caches={name: cache.rows(which) for name, cache in self.caches.items()},
        )


def host_with(**grafted: PromptName) -> Origins:
    """Which prompt's cache each span is taken from: the host's, but for those that are named."""
    origins: dict[Span, PromptName] = dict.fromkeys(("prefix", "persona", "task", "tail"), "BY")
    return {**origins, **grafted}  # type: ignore[dict-item]


def spans_before_last(prompt: Prompt) -> dict[Span, range]:
    """The spans of a prompt without p_last."""
    last = len(prompt) - 1
    return {name: range(span.start, min(span.stop, last)) for name, span in prompt.spans.items()}


def fill_sources(
    model: TransformersModel, cells: Sequence[Cell], names: Sequence[PromptName] = ROLE_PROMPTS
) -> GraftSources:
    """Run everything before p_last of each prompt, once; and see how this model's keys are moved.

    Args:
        model: from `load_model`.
        cells: the rows.
        names: of the prompts; BY, the host, and XY among them.
    """
    prompts = [render_cell(model.tokenizer, cell, names) for cell in cells]
    spans = [{name: spans_before_last(prompt[name]) for name in names} for prompt in prompts]
    warn_about_prefixes(cells, prompts, spans)
    caches = {
        name: fill_cache(model, [prompt[name].ids[:-1] for prompt in prompts]) for name in names
    }
    reach = max(cache.width for cache in caches.values())
    return GraftSources(prompts, spans, caches, read_rotation(model, reach))


def graft_spans(
    sources: GraftSources, origins: Origins, slots: Sequence[int] | None = None
) -> tuple[list[list[int]], KVCache]:
    """The host with spans of other prompts, spliced at their own length.

    Args:
        sources: where they are cut from.
        origins: the prompt that each span is taken from.
        slots: of each row, how many places prefix and persona take together; they stand at the end
            of them. None takes no spare places.

    Returns:
        Token ids of its rows, p_last included, and their cache.
    """
    pieces = [
        Piece(sources.caches[name], [of[name][span] for of in sources.spans])
        for span, name in origins.items()
    ]
    if slots is not None:  # all spare places come first, so that nothing stands between the spans
        prefix, persona, *_ = pieces
        room = [slot - len(span) for slot, span in zip(slots, persona.spans, strict=True)]
        pieces[0] = replace(prefix, slots=room)
    rows: list[list[int]] = []
    for prompt, of in zip(sources.prompts, sources.spans, strict=True):
        row = [prompt[name].ids[k] for span, name in origins.items() for k in of[name][span]]
        rows.append([*row, prompt["BY"].ids[-1]])
    return rows, splice(pieces, sources.rotation)


def grafted_tokens(sources: GraftSources, origins: Origins) -> list[int]:
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
