"""Cartridges: a persona as a few trained keys and values, put where a host's persona stood."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from persona_nns.declarations.record import ModelRecord
from persona_nns.errors import UsageError
from persona_nns.prompts.grids import Cell
from persona_nns.tracing.kv.cache import KVCache

#: What stands behind the slot: the host's own cached task and tail, moved, or both computed anew.
Form = Literal["graft", "prefix"]
FORMS: tuple[Form, ...] = ("graft", "prefix")


@dataclass(frozen=True, eq=False)
class Cartridge:
    """Keys and values that stand for a persona, and what is known of them.

    Attributes:
        keys: [layer, kv_head, slot, d_head], rotary positions ``start``, ``start + 1``, … applied.
        values: [layer, kv_head, slot, d_head].
        model: label of the model that it was made for.
        model_version: digest or commit of its weights.
        precision: of the model, and of keys and values.
        persona: the persona's key.
        persona_text: what stands for it in words.
        form: what stood behind the slot in training.
        start: position of the first slot.
        tasks: keys of the tasks that it was trained on.
        seed: of its training.
        losses: of each training step, in nats.
    """

    keys: Tensor
    values: Tensor
    model: str
    model_version: str
    precision: str
    persona: str
    persona_text: str
    form: Form
    start: int
    tasks: tuple[str, ...] = ()
    seed: int = 0
    losses: tuple[float, ...] = ()

    @property
    def slots(self) -> int:
        """Places that it takes in a prompt."""
        return self.keys.shape[2]

    @property
    def n_bytes(self) -> int:
        """Size of its keys and values."""
        return (self.keys.numel() + self.values.numel()) * self.keys.element_size()

    def is_of(self, cell: Cell) -> bool:
        """Whether it stands for a cell's persona."""
        return (cell.persona, cell.persona_text) == (self.persona, self.persona_text)

    def check_model(self, record: ModelRecord) -> None:
        """See that it was made for a model.

        Raises:
            UsageError: it is for another, or for the model in another precision.
        """
        if (self.model_version, self.precision) != (record.version, record.precision):
            raise UsageError(
                f"The cartridge of {self.persona!r} is for the model {self.model!r} in "
                f"{self.precision}, not for {record.label!r} in {record.precision} (or for other "
                "weights); train one for this model."
            )

    def check_shape(self, like: KVCache) -> None:
        """See that its layers and heads are those of a cache of the model.

        Raises:
            UsageError: they are others.
        """
        held = [len(self.keys), self.keys.shape[1], self.keys.shape[3], self.values.shape[3]]
        wanted = [like.n_layers, *like.keys[0].shape[1::2], like.values[0].shape[3]]
        if held != wanted:
            raise UsageError(
                f"The cartridge of {self.persona!r} does not fit the model: (layers, key-value "
                f"heads, widths of a key and of a value) are {tuple(held)}, the model's "
                f"{tuple(wanted)}; train one for this model."
            )

    def row(self) -> KVCache:
        """It as a cache of one row, at the positions that its keys stand at.

        `splice` lays it between other spans, and turns its keys where they come to stand elsewhere.
        """
        position = torch.arange(self.start, self.start + self.slots, device=self.keys.device)[None]
        return KVCache(
            tuple(self.keys[:, None]),
            tuple(self.values[:, None]),
            torch.ones_like(position),
            position,
        )
