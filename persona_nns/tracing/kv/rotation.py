"""Moving keys: rotary positions are relative, so a key that moves is rotated by the distance.

A key at position p is R(p)·k, with R(p) a rotation of pairs of dimensions by p times the model's
inverse frequencies. At position q it would be R(q)·k = R(q−p)·R(p)·k: what is cached is rotated by
the distance, and neither k nor p is needed. Values do not move. Under partial rotary only the first
dimensions turn; scaled rotary types ("llama3", "yarn") also stretch keys by a constant, which is in
the cached key already and is not applied again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from nnsight import TransformersModel, save
from torch import Tensor
from transformers import DynamicCache

from persona_nns.errors import PersonaError

# Types whose frequencies are the same at every length.
_MOVABLE = ("default", "linear", "llama3", "yarn")
# Distances at which every layer's rotation is checked, and how far off a key may be.
_PROBES = (0, 3, 50)
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.005}


@dataclass(frozen=True)
class Rotation:
    """How a model's keys are moved.

    Attributes:
        cos: of each layer, [distance, rotary dims], from ``-reach`` to ``reach``; nothing where
            keys cannot be moved.
        sin: likewise.
        reach: the largest distance.
        refusal: why this model's keys cannot be moved; empty where they can.
    """

    cos: tuple[Tensor, ...]
    sin: tuple[Tensor, ...]
    reach: int
    refusal: str = ""

    def move(self, keys: Tensor, distance: Tensor, layer: int) -> Tensor:
        """Rotate the keys of one layer; those with distance 0 stay as they are, bit for bit.

        Args:
            keys: [row, kv_head, column, d_head].
            distance: [row, column], new position minus old one.
            layer: whose rotary frequencies.

        Returns:
            [row, kv_head, column, d_head], in the precision of the keys; rotated in float32.

        Raises:
            PersonaError: this model's keys cannot be moved, or not that far.
        """
        return self.turning(distance)(keys, layer)

    def turning(self, distance: Tensor) -> Callable[[Tensor, int], Tensor]:
        """`move` by one distance for every layer, which is looked at once and not layer by layer.

        Raises:
            PersonaError: as `move`.
        """
        furthest = int(distance.abs().max()) if distance.numel() else 0
        if not furthest:
            return lambda keys, _layer: keys
        if self.refusal:
            raise PersonaError(self.refusal)
        if furthest > self.reach:
            raise PersonaError(
                f"A key cannot be moved by {furthest} positions: this rotation reaches "
                f"{self.reach}; read one that reaches further."
            )
        return partial(self._turn, distance)

    def _turn(self, distance: Tensor, keys: Tensor, layer: int) -> Tensor:
        distance = distance.to(keys.device)
        # [row, 1, column, rotary dims]
        cos = self.cos[layer].to(keys.device)[distance + self.reach][:, None]
        sin = self.sin[layer].to(keys.device)[distance + self.reach][:, None]
        n_rotary = cos.shape[-1]
        turning, rest = keys[..., :n_rotary].float(), keys[..., n_rotary:]
        first, second = turning.chunk(2, dim=-1)
        turned = turning * cos + torch.cat([-second, first], dim=-1) * sin
        moved = torch.cat([turned.to(keys.dtype), rest], dim=-1)
        return torch.where(distance[:, None, :, None] == 0, keys, moved)


def read_rotation(model: TransformersModel, reach: int) -> Rotation:
    """Read a model's own rotary frequencies, and see that they move its keys, at every layer.

    The model's rotary module is called, so no weight is read, and the key of a single token at
    one position, moved, has to be its key at the other. (A single token attends to itself alone,
    so nothing but the rotation tells its keys at two positions apart.)

    Args:
        model: from `load_model`.
        reach: the largest distance that keys will be moved by.

    Returns:
        The rotation; one that refuses to move anything for a model with learned positions, or
        whose frequencies depend on the length.

    Raises:
        PersonaError: rotating by the model's frequencies does not move its keys.
    """
    config = model.config.get_text_config()
    if refusal := _refusal(model):
        return Rotation((), (), 0, refusal)
    kinds = _kinds(config)
    n_layers, device = len(model.layers), model.device
    reach = max(reach, *_PROBES)
    distances = torch.arange(-reach, reach + 1, device=device)[None]
    single = torch.zeros(1, 1, device=device)  # float32, whatever the model's precision
    token = torch.full((len(_PROBES), 1), 7, device=device)
    tokens = {"input_ids": token, "attention_mask": torch.ones_like(token)}
    positions = torch.tensor(_PROBES, device=device)[:, None]
    with model.trace(
        tokens, position_ids=positions, past_key_values=DynamicCache(), use_cache=True
    ):
        tables = save(
            {kind: model.rotary_emb(single, distances, *kind.split()) for kind in set(kinds)}
        )
        keys = save([layer.keys for layer in model.output.past_key_values.layers])
    # Scaled types stretch cos and sin by one factor, which is in the cached keys already.
    cosines, sines = {}, {}
    for kind, (cos, sin) in tables.items():
        stretch = (cos[0] ** 2 + sin[0] ** 2).sqrt()
        cosines[kind], sines[kind] = cos[0] / stretch, sin[0] / stretch
    rotation = Rotation(
        tuple(cosines[kinds[k]] for k in range(n_layers)),
        tuple(sines[kinds[k]] for k in range(n_layers)),
        reach,
    )
    for layer, held in enumerate(keys):
        moved = rotation.move(held[:1].expand_as(held), positions, layer)
        off = float((moved.float() - held.float()).abs().max() / held.float().abs().max())
        if not off <= _TOLERANCE[held.dtype]:
            raise PersonaError(
                f"The keys of layer {layer} of {type(model._module).__name__} cannot be moved: "
                "rotated by its own frequencies, a key is not the one of the other position."
            )
    return rotation


def has_rotary_positions(model: TransformersModel) -> bool:
    """Whether a model learns of positions by rotation, so that tokens enter it alike anywhere."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None)
    return bool(rope) and hasattr(model, "rotary_emb")


def _refusal(model: TransformersModel) -> str:
    """Why the keys of a model cannot be moved; empty where they can."""
    config = model.config.get_text_config()
    if not has_rotary_positions(model):
        return (
            f"The keys of a {config.model_type} model cannot be moved to another position: its "
            "positions are learned, or it has no rotary module that they could be moved with."
        )
    rope: Mapping[str, Any] = config.rope_parameters
    per_type = [rope] if "rope_type" in rope else list(rope.values())
    for parameters in per_type:
        if parameters["rope_type"] not in _MOVABLE:
            return (
                f"The keys of this {config.model_type} model cannot be moved to another position: "
                f"its rotary type {parameters['rope_type']!r} is not one of "
                f"{', '.join(_MOVABLE)}, whose frequencies are the same at every length."
            )
    return ""


def _kinds(config: Any) -> list[str]:
    """For each layer, the layer type its frequencies go by; empty where all share them."""
    rope: Mapping[str, Any] = config.rope_parameters
    if "rope_type" in rope:
        return [""] * config.num_hidden_layers
    return list(config.layer_types)
