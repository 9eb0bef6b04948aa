"""Hosts with a slot where their persona stood, into which keys and values are put."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from persona_nns.tracing.kv.cache import KVCache
from persona_nns.tracing.kv.cartridge import Cartridge, Form
from persona_nns.tracing.kv.grafts import GraftSources
from persona_nns.tracing.kv.rotation import Rotation
from persona_nns.tracing.kv.splice import Piece, splice
from persona_nns.tracing.residuals import stack_layers
from persona_nns.tracing.window import Window, open_ragged_window, open_window


@dataclass(frozen=True)
class SlottedHosts:
    """Hosts with an empty slot, and what runs behind it.

    Attributes:
        empty: what runs; its prefix holds zeros in the slot.
        slot: [row, slot], columns of the prefix.
        predicting: [row, token], columns of the window that predict what is said: p_last first.
        rotation: of the model.
    """

    empty: Window
    slot: Tensor
    predicting: Tensor
    rotation: Rotation

    def with_cartridge(self, cartridge: Cartridge) -> Window:
        """The same with a cartridge of as many slots.

        Raises:
            UsageError: its layers and heads are not the model's.
        """
        held = self.empty.prefix
        assert held is not None
        cartridge.check_shape(held)
        keys, values = (each.to(held.keys[0].device) for each in (cartridge.keys, cartridge.values))
        return self.holding(keys, values, cartridge.start)

    def holding(self, keys: Tensor, values: Tensor, start: int) -> Window:
        """The same with keys and values in the slot; gradients go back to these.

        Args:
            keys: [layer, kv_head, slot, d_head], at positions from ``start`` on; turned where the
                slot stands elsewhere.
            values: [layer, kv_head, slot, d_head].
            start: position of the first key.
        """
        held = self.empty.prefix
        assert held is not None
        place = held.position_ids.gather(1, self.slot)
        distance = place - start - torch.arange(place.shape[1], device=place.device)
        turned = self.rotation.turning(distance)
        columns = self.slot[:, None, :, None]

        def lay(into: Tensor, given: Tensor) -> Tensor:
            return into.scatter(2, columns.to(into.device).expand_as(given), given)

        def of_rows(given: Tensor, layer: int) -> Tensor:
            return given.to(held.values[layer]).expand(len(place), -1, -1, -1)

        def moved(layer: int) -> Tensor:
            return turned(of_rows(keys[layer], layer), layer)

        layers = range(held.n_layers)
        filled = replace(
            held,
            keys=tuple(lay(held.keys[layer], moved(layer)) for layer in layers),
            values=tuple(
                lay(held.values[layer], of_rows(values[layer], layer)) for layer in layers
            ),
        )
        return replace(self.empty, prefix=filled)


def open_slots(sources: GraftSources, said: Tensor, slots: int, form: Form) -> SlottedHosts:
    """Hosts with a slot in place of their persona.

    Args:
        sources: hosts, BY; their caches without p_last.
        said: [row, token], what follows p_last.
        slots: places of the slot.
        form: ``graft`` keeps the host's cached task and tail, moved to stand behind the slot;
            ``prefix`` runs both again behind it.

    Raises:
        PersonaError: the model's keys cannot be moved.
    """
    host, spans = sources.caches["BY"], [of["BY"] for of in sources.spans]
    starts = [of["persona"].start for of in spans]
    cached = ("task", "tail") if form == "graft" else ()
    pieces = [
        Piece(host, [of["prefix"] for of in spans]),
        Piece(_nothing(host, starts, slots), [range(slots)] * len(spans)),
        *(Piece(host, [of[name] for of in spans]) for name in cached),
    ]
    prefix = splice(pieces, sources.rotation)
    device = said.device
    slot = prefix.padding + torch.tensor(starts, device=device)
    columns = slot[:, None] + torch.arange(slots, device=device)
    rows: list[list[int]] = []
    for prompt, of in zip(sources.prompts, spans, strict=True):
        ids, persona = prompt["BY"].ids, of["persona"]
        rows.append([*ids[: persona.start], *[0] * slots, *ids[persona.stop :]])
    n_said = said.shape[1] + 1
    if form == "graft":
        window = open_window(rows, said, prefix)
        predicting = torch.arange(n_said, device=device).expand(len(rows), -1)
        return SlottedHosts(window, columns, predicting, sources.rotation)
    whole = [[*row, *of_row] for row, of_row in zip(rows, said.tolist(), strict=True)]
    window = open_ragged_window(whole, prefix, device=device)
    last = torch.tensor([len(row) - 1 - window.start for row in rows], device=device)
    predicting = last[:, None] + torch.arange(n_said, device=device)
    return SlottedHosts(window, columns, predicting, sources.rotation)


def _nothing(like: KVCache, starts: Sequence[int], slots: int) -> KVCache:
    """A cache of zeros that stands where the slots do."""

    def zeros(held: Tensor) -> Tensor:
        return held.new_zeros(len(starts), held.shape[1], slots, held.shape[3])

    first = torch.tensor(starts, device=like.position_ids.device)
    position = first[:, None] + torch.arange(slots, device=first.device)
    keys, values = (tuple(map(zeros, each)) for each in (like.keys, like.values))
    return KVCache(keys, values, torch.ones_like(position), position)


def initial_slots(
    sources: GraftSources, weight: Tensor, slots: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Keys and values of the persona at the tokens with most weight, in order, as slots.

    They are those of XY, mean over rows, with keys turned to where the slots stand. Where there are
    more slots than tokens, those with most weight come again, and a hundredth of noise tells one
    from the other.

    Args:
        sources: with XY; rows that share a persona.
        weight: of each token of the persona, [token].
        slots: how many.
        seed: of the noise.

    Returns:
        Keys and values, [layer, kv_head, slot, d_head] each, in float32.

    Raises:
        PersonaError: the model's keys cannot be moved.
    """
    cache, device = sources.caches["XY"], weight.device
    ranked = weight.argsort(descending=True, stable=True)
    chosen = ranked.repeat(-(-slots // len(ranked)))[:slots].sort().values
    first, start = (
        torch.tensor([of[name]["persona"].start for of in sources.spans], device=device)[:, None]
        for name in ("XY", "BY")
    )
    columns = (cache.padding[:, None] + first + chosen)[:, None, :, None]
    distance = start + torch.arange(slots, device=device) - first - chosen

    def take(held: Tensor) -> Tensor:
        index = columns.expand(-1, held.shape[1], -1, held.shape[3])
        return held.gather(2, index.to(held.device))

    turned = sources.rotation.turning(distance)
    keys = stack_layers(
        [turned(take(held), layer).float().mean(0) for layer, held in enumerate(cache.keys)]
    )
    values = stack_layers([take(held).float().mean(0) for held in cache.values])
    again = torch.nn.functional.pad(chosen[1:] == chosen[:-1], (1, 0)).to(keys)
    draw = torch.Generator().manual_seed(seed)

    def tell_apart(given: Tensor) -> Tensor:
        noise = torch.randn(given.shape, generator=draw).to(given)
        return given + 0.01 * given.std() * noise * again[:, None]

    return tell_apart(keys), tell_apart(values)
