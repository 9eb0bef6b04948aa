"""Parts of a grafted persona: some of its key-value heads, or some of its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from nnsight import TransformersModel, save
from torch import Tensor

from persona_nns.tracing.knockout import block_keys
from persona_nns.tracing.kv.cache import KVCache
from persona_nns.tracing.kv.grafts import GraftSources, graft_spans, host_with
from persona_nns.tracing.residuals import stack_layers
from persona_nns.tracing.window import Window, open_window


@dataclass(frozen=True)
class PersonaSlots:
    """Hosts whose persona slot takes either of the two persona spans.

    A slot is as long as the longer of them. Each holds the host's prefix and one of the spans,
    moved together so that the span ends where the slot does; the spare places come first.

    Attributes:
        window: p_last and what follows it, behind the host.
        host: with the baseline persona's span in every layer and head.
        persona: with the persona's. Either counts as held what only one of the two holds.
        host_lacks: [row, column], what the host's span leaves spare.
        persona_lacks: likewise.
        has_spare: whether either leaves any.
    """

    window: Window
    host: KVCache
    persona: KVCache
    host_lacks: Tensor
    persona_lacks: Tensor
    has_spare: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and key-value heads."""
        return self.host.n_layers, self.host.keys[0].shape[1]

    def choose(self, row: Tensor, mine: Tensor, lowest: int) -> tuple[Window, dict[int, Tensor]]:
        """Rows with the persona in some of their heads, the host in the others.

        Args:
            row: [row], which of the slots.
            mine: [row, layer, kv_head], where the persona's span is taken.
            lowest: the layer that the pass resumes at; nothing is taken below it.

        Returns:
            What is run, and the columns that a layer must not see, [row, kv_head, column] by layer:
            none where no slot has a spare place.
        """
        width = self.window.input_ids.shape[1]
        window = replace(self.window, prefix=None).rows(row, lowest, width)
        mixed = self.persona.rows(row).mixed_with(self.host.rows(row), mine)
        hidden: dict[int, Tensor] = {}
        if self.has_spare:
            lacks = self.persona_lacks[row, None], self.host_lacks[row, None]
            layers = range(lowest, self.host.n_layers)
            hidden = {layer: torch.where(mine[:, layer, :, None], *lacks) for layer in layers}
        return replace(window, prefix=mixed), hidden


def open_persona_slots(sources: GraftSources, forced: Tensor) -> PersonaSlots:
    """The hosts of every row with room for either persona, before the tokens that are forced."""
    slots = [
        len(of["BY"]["prefix"]) + max(len(of["XY"]["persona"]), len(of["BY"]["persona"]))
        for of in sources.spans
    ]
    (host_rows, host), (persona_rows, persona) = (
        graft_spans(sources, origins, slots) for origins in (host_with(), host_with(persona="XY"))
    )
    rows = [max(pair, key=len) for pair in zip(host_rows, persona_rows, strict=True)]
    window = open_window(rows, forced, host)
    is_taken = window.attention_mask[:, : host.width] > 0
    host_lacks, persona_lacks = (is_taken & (of.attention_mask == 0) for of in (host, persona))
    everywhere = range(host.n_layers)
    host, persona = host.only_in(everywhere, persona), persona.only_in(everywhere, host)
    return PersonaSlots(
        window=replace(window, prefix=host),
        host=host,
        persona=persona,
        host_lacks=host_lacks,
        persona_lacks=persona_lacks,
        has_spare=bool((host_lacks | persona_lacks).any()),
    )


def read_host(model: TransformersModel, slots: PersonaSlots) -> PersonaSlots:
    """The same slots, with the host's residuals for passes to go on from."""
    with model.trace(slots.window.inputs(), logits_to_keep=1):
        residual = save([])
        for block in model.layers:
            residual.append(block.input)
            block_keys(block.attn, None, slots.host_lacks)
    return replace(slots, window=replace(slots.window, clean=stack_layers(residual)))


@dataclass(frozen=True)
class GraftedTokens:
    """Hosts into which the whole persona is grafted at its own length, and its tokens' columns.

    Attributes:
        window: p_last and what follows it, behind the graft.
        column: [row, token], where each token of the persona stands, as `persona_columns` gives it.
        exists: [row, token].
    """

    window: Window
    column: Tensor
    exists: Tensor

    def show(self, row: Tensor, kept: Tensor) -> Window:
        """Rows in which only some of the persona's tokens are seen; no position moves.

        Args:
            row: [row], which of the hosts.
            kept: [row, token], those that are seen.
        """
        window = self.window.rows(row, 0, self.window.input_ids.shape[1])
        seen = window.attention_mask.clone()
        lost = self.exists[row] & ~kept
        which, token = lost.nonzero(as_tuple=True)
        seen[which, self.column[row][which, token]] = 0
        return replace(window, attention_mask=seen)


def open_tokens(sources: GraftSources, forced: Tensor, n_longest: int) -> GraftedTokens:
    """The hosts of every row with the persona grafted, before the tokens that are forced."""
    rows, cache = graft_spans(sources, host_with(persona="XY"))
    window = open_window(rows, forced, cache)
    starts = [len(of["BY"]["prefix"]) for of in sources.spans]
    column, exists = persona_columns(sources, starts, window.padding, n_longest)
    return GraftedTokens(window, column, exists)


def persona_columns(
    sources: GraftSources, starts: Sequence[int], padding: Tensor, n_longest: int
) -> tuple[Tensor, Tensor]:
    """Columns of the tokens of each row's persona.

    Args:
        sources: whose persona is that of XY.
        starts: the place of its first token in each row.
        padding: [row], columns before the first token of the row.
        n_longest: tokens of the longest persona.

    Returns:
        The columns, and which of the tokens exist, [row, token]; those that do not have the first
        column.
    """
    device = padding.device
    length = torch.tensor([len(of["XY"]["persona"]) for of in sources.spans], device=device)
    token = torch.arange(n_longest, device=device)
    exists = token < length[:, None]
    first = torch.tensor(starts, device=device) + padding
    return torch.where(exists, first[:, None] + token, 0), exists


def weigh_parts(
    sources: GraftSources, weights: Tensor, n_longest: int
) -> dict[str, dict[str, Tensor]]:
    """How much is looked at each part of the persona, and how much of its values is taken.

    Of a key-value head of a layer: Σ over the persona's tokens of the weight, mean over the query
    heads that share it; and Σ of that weight × ‖v‖, v the token's value there. Of a token: the
    weight, and the weight × ‖v‖, mean over all layers and query heads.

    Args:
        sources: whose persona, and values, are those of XY.
        weights: of the clean run, [row, layer, head, column of the cache of XY].
        n_longest: tokens of the longest persona.

    Returns:
        By the unit, ``layer_head`` or ``token``: ``attention`` and ``attention_value``,
        [row, part]; 0 for a token that a row does not have.
    """
    cache = sources.caches["XY"]
    starts = [of["XY"]["persona"].start for of in sources.spans]
    column, exists = persona_columns(sources, starts, cache.padding, n_longest)
    norms = stack_layers([held.float().norm(dim=-1) for held in cache.values], dim=1)

    def of_persona(values: Tensor) -> Tensor:
        """[row, layer, kv_head, token]."""
        index = column[:, None, None].expand(*values.shape[:3], -1)
        return values.gather(-1, index).where(exists[:, None, None], 0.0)

    shared = of_persona(weights.unflatten(2, (norms.shape[2], -1)).mean(3))
    both = {"attention": shared, "attention_value": shared * of_persona(norms)}
    return {
        "layer_head": {name: of.sum(-1).flatten(1) for name, of in both.items()},
        "token": {name: of.mean((1, 2)) for name, of in both.items()},
    }
