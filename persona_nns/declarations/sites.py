"""Sites by name: which layers, sets of layers and positions a request asks for.

Layer ``L`` is the residual stream *entering* decoder block ``L`` (``hidden_states[L]`` of
transformers; 0 is the embedding output), and layer ``n_layers`` is the stream after the final
norm, which can be read only.
"""

import re
from collections.abc import Sequence
from typing import Any

from persona_nns.errors import UsageError

# p_last, p_last-3, p_user_last, g1, g12
_POSITION = re.compile(r"p_user_last|p_last(?:-(?P<back>[1-9]\d*))?|g(?P<generated>[1-9]\d*)")


def parse_layers(spec: str | int | Sequence[int], n_layers: int) -> list[int]:
    """The layers that a request names, in ascending order.

    Args:
        spec: ``all`` (0 … n_layers-1), layers such as ``6,10,14``, depths such as
            ``0.25,0.40`` (times n_layers, rounded, the last block at most), a layer, or a
            sequence of them.
        n_layers: number of decoder blocks.

    Raises:
        UsageError: not a layer, or out of range.
    """
    if isinstance(spec, str) and spec.strip() == "all":
        return list(range(n_layers))
    if isinstance(spec, str):
        parts = spec.split(",")
    else:
        parts = [spec] if isinstance(spec, int) else list(spec)
    layers = sorted({_layer(str(part).strip(), n_layers) for part in parts})
    if not layers:
        raise UsageError("No layer was asked for; use 'all' or numbers such as 6,10,14.")
    return layers


def parse_layer_sets(
    spec: str | int | Sequence[int | Sequence[int]], n_layers: int
) -> list[list[int]]:
    """The sets of layers that a request names, in its order, each in ascending order.

    Args:
        spec: sets of layers or depths such as ``"14;10,12,14"``, or a sequence of sets.
        n_layers: number of decoder blocks.

    Raises:
        UsageError: not a layer, out of range, or a set given twice.
    """
    if isinstance(spec, str):
        sets: Sequence[Any] = [part for part in spec.split(";") if part.strip()]
    else:
        sets = [spec] if isinstance(spec, int) else list(spec)
    layer_sets = [parse_layers(layers, n_layers) for layers in sets]
    if not layer_sets:
        raise UsageError('No layer set was asked for; use sets such as "14;10,12,14".')
    for layers in layer_sets:
        if layer_sets.count(layers) > 1:
            raise UsageError(
                f"The layer set {label_layer_set(layers)} is given twice; name each one once."
            )
    return layer_sets


def label_layer_set(layers: Sequence[int]) -> str:
    """The label of a set of layers: ``10,12,14``."""
    return ",".join(map(str, layers))


def _layer(text: str, n_layers: int) -> int:
    if re.fullmatch(r"0?\.\d+", text):
        return min(round(float(text) * n_layers), n_layers - 1)
    if not re.fullmatch(r"-?\d+", text):
        raise UsageError(
            f"{text!r} is not a layer; use 'all', numbers such as 6,10,14, or depths such as 0.5."
        )
    layer = int(text)
    if not 0 <= layer < n_layers:
        raise UsageError(
            f"Layer {layer} is out of range: the model has layers 0 to {n_layers - 1}."
        )
    return layer


def parse_positions(spec: str | Sequence[str]) -> list[str]:
    """The position names that a request holds, in its order; ranges as the names in them.

    Args:
        spec: names such as ``p_last,g1``, and ranges such as ``p_last-12:p_last`` or ``g1:g3``,
            in which both ends are.

    Raises:
        UsageError: an unknown name, a range from a later position to an earlier one, or a
            position given twice.
    """
    asked = [name.strip() for name in (spec.split(",") if isinstance(spec, str) else spec)]
    if not asked:
        raise UsageError("No position was asked for; use names such as p_last,g1.")
    names = [name for part in asked for name in _positions_of(part)]
    known: set[str] = set()
    for name in names:
        if name in known:
            raise UsageError(f"The position {name!r} is given twice; name each one once.")
        known.add(name)
    return names


def _positions_of(part: str) -> list[str]:
    """The positions of a name, or of a range."""
    ends = [end.strip() for end in part.split(":", 1)]
    for name in ends:
        if not _POSITION.fullmatch(name):
            raise UsageError(
                f"Unknown position {name!r}; use p_last, p_user_last, p_last-1, p_last-2, … "
                "or g1, g2, … (generated tokens), or a range such as p_last-12:p_last."
            )
    if len(ends) == 1:
        return ends
    if "p_user_last" in ends:
        raise UsageError(
            f"The range {part!r} has p_user_last at an end, which is elsewhere in each template; "
            "use p_last-1, p_last-2, … or name it alone."
        )
    first, last = map(_from_last, ends)
    if first > last:
        raise UsageError(f"The range {part!r} runs backwards; put the earlier position first.")
    return [_named(place) for place in range(first, last + 1)]


def _from_last(position: str) -> int:
    """How many tokens a position is after p_last."""
    match = match_position(position)
    return int(match["generated"] or 0) - int(match["back"] or 0)


def _named(place: int) -> str:
    """The position so many tokens after p_last."""
    return f"g{place}" if place > 0 else f"p_last{place}" if place else "p_last"


def generated_index(position: str) -> int:
    """K for the K-th generated token ``gK``; 0 for a position inside the prompt."""
    return int(match_position(position)["generated"] or 0)


def match_position(position: str) -> re.Match[str]:
    """The parts of a position's name: ``back`` of ``p_last-3``, ``generated`` of ``g1``."""
    match = _POSITION.fullmatch(position)
    assert match is not None, position
    return match
