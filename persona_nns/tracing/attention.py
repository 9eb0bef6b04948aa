"""What an attention module sees, and where it looks, whichever way it is computed.

``eager`` is given a mask that is added to the logits, and returns its weights. ``sdpa`` is given a
boolean mask, or none where all that came before is seen, and returns no weights: they are computed
once more from the module's queries and keys. All of this runs inside tracing contexts, and may
run on a server: torch only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nnsight import TransformersModel, save
from torch import Tensor

from persona_nns.tracing.residuals import take
from persona_nns.tracing.sandbox import has_weights
from persona_nns.tracing.window import Window

#: The ways to compute attention whose masks can be changed.
MASKED = ("eager", "sdpa")

# What projects a residual to queries first (and, but for the first, to keys and values behind
# them). GPT-NeoX has the three of a head side by side.
_PROJECTIONS = ("q_proj", "qkv_proj", "c_attn", "query_key_value")


@dataclass(frozen=True)
class Told:
    """What an attention module is told of queries and keys.

    Attributes:
        mask: as `read_mask` gives it.
        rotation: cosines and sines, each [row or 1, column, feature]; None without a rotation.
    """

    mask: Tensor | None
    rotation: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Look:
    """What an attention module was told, and what it makes of some queries of each row.

    Attributes:
        told: what it was told.
        asking: [row, query], the columns of the queries.
        projected: [row, query, feature], the queries before they are normalised and rotated; None
            in a module of an unknown make.
        mixed: [row, query, head × d_head], what is mixed for them of the values.
        weights: [row, head, query, key], where the module returns them.
    """

    told: Told
    asking: Tensor
    projected: Tensor | None
    mixed: Tensor
    weights: Tensor | None


def read_mask(attention: Any, inputs: Any) -> Tensor | None:
    """Inside a trace, before a module is run: its mask, [row or 1, 1, query, key].

    Either additive or, True where a query sees a key, boolean; the module takes both. None where
    the model computes attention in a way that takes no such mask.

    Args:
        attention: the module.
        inputs: its positional and keyword arguments, as ``attention.inputs`` gives them.
    """
    if computed_by(attention) not in MASKED:
        return None
    positional, named = inputs
    if named["attention_mask"] is not None:
        return named["attention_mask"]
    # sdpa leaves out the mask where it is the causal one alone: there is no padding, and no key
    # has left a sliding window (transformers, masking_utils._ignore_causal_mask_sdpa).
    hidden = positional[0] if positional else named["hidden_states"]
    cache, n_queries = _cache_of(inputs), hidden.shape[1]
    n_before = 0 if cache is None else cache.get_seq_length(attention.layer_idx)
    seen = torch.ones(n_queries, n_before + n_queries, dtype=torch.bool, device=hidden.device)
    return seen.tril(n_before)[None, None]


def computed_by(attention: Any) -> str:
    """How an attention module is computed: ``eager``, ``sdpa``, or by another kernel."""
    return getattr(getattr(attention, "config", None), "_attn_implementation", MASKED[0])


def read_told(attention: Any) -> Told:
    """Inside a trace, before a module is run: what it is told."""
    inputs = attention.inputs
    return Told(read_mask(attention, inputs), inputs[1].get("position_embeddings"))


def tell(model: TransformersModel, window: Window) -> Sequence[Told | None]:
    """What the attention of each block is told in passes over a window, whatever is done in them.

    In a sandbox a pass of its own reads it: a module whose inputs are read in the pass that is
    looked at would write its keys and values to a copy of the cache. Else the pass that is looked
    at reads it itself: None for each block.
    """
    if has_weights(model):
        return [None] * len(model.layers)
    with model.trace(window.inputs(cached=True), logits_to_keep=1):
        told = save([read_told(block.attn) for block in model.layers])
    return told  # noqa: RET504 - there only once the trace has run


def look_at(
    attention: Any, asking: Tensor, told: Told | None = None
) -> tuple[Look, Tensor, Tensor]:
    """Inside a trace, while a module is run: what its weights are computed from.

    Args:
        attention: the module, in a pass that is given a cache.
        asking: [row, query], the columns whose queries are looked at.
        told: what it is told; by default it is read.

    Returns:
        The look, and of all tokens the output projection's input and output,
        [row, column, head × d_head] and [row, column, d_model].
    """
    told = told or read_told(attention)
    names = [each for each in _PROJECTIONS if hasattr(attention, each)]
    projected = take(getattr(attention, names[0]).output, asking) if names else None
    mixed, written = attention.o_proj.input, attention.o_proj.output
    weights = attention.output[1]
    if weights is not None:
        weights = _of_queries(weights, asking)
    return Look(told, asking, projected, take(mixed, asking), weights), mixed, written


def attention_to(attention: Any, look: Look, held: Any, identity: Tensor) -> Tensor:
    """Inside a trace: attention of the one query to the identity, [row, head, column].

    Args:
        attention: the module, which has run.
        look: at it.
        held: its layer of the cache that the pass has put out.
        identity: [row, column of the window].
    """
    weights = weights_of(attention, look, held)[:, :, 0]
    return weights[..., -identity.shape[1] :] * identity[:, None].to(weights.device)


def weights_of(attention: Any, look: Look, held: Any) -> Tensor:
    """Inside a trace: attention weights of the queries, [row, head, query, key].

    NaN where the module returns no weights and they cannot be computed from its queries and keys.

    Args:
        attention: the module, which has run.
        look: at it.
        held: its layer of the cache that the pass has put out.
    """
    weights = look.weights
    if weights is None:
        weights = compute_weights(attention, look, held)
    if weights is None:
        (n_rows, n_queries), n_heads = look.asking.shape, attention.config.num_attention_heads
        return look.mixed.new_full((n_rows, n_heads, n_queries, held.keys.shape[2]), torch.nan)
    return weights


def compute_weights(attention: Any, look: Look, held: Any) -> Tensor | None:
    """Inside a trace: attention weights of the queries, [row, head, query, key].

    softmax(scaling × query · key) over the keys that the mask leaves, as ``eager`` computes it.
    Weights are right if they mix the values into what the module has put into its output
    projection: a row of others is NaN.

    Args:
        attention: the module, which has run.
        look: at it.
        held: its layer of the cache that the pass has put out.

    Returns:
        The weights; None of a module of an unknown make.
    """
    if look.told.mask is None or look.projected is None:
        return None
    n_heads = look.mixed.shape[-1] // held.values.shape[-1]
    keys, values = (
        each.repeat_interleave(n_heads // each.shape[1], dim=1) for each in (held.keys, held.values)
    )
    query = _query(attention, look, look.projected, n_heads)
    if (query.shape[1], query.shape[-1]) != (n_heads, keys.shape[-1]):
        return None
    scores = (query @ keys.to(query.dtype).mT).float()
    scores = scores * getattr(attention, "scaling", keys.shape[-1] ** -0.5)
    cap = getattr(attention, "attn_logit_softcapping", None)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    mask = _of_queries(look.told.mask.expand(len(scores), -1, -1, -1), look.asking)
    if mask.dtype is torch.bool:
        mask = torch.where(mask, 0.0, -torch.inf)
    weights = (scores + mask).softmax(-1)
    right = _mixes_to(look.mixed, weights, values)
    return torch.where(right[:, None, :, None], weights, torch.nan).to(values.dtype)


def _mixes_to(mixed: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """Whether values are mixed to what a module put into its output projection, [row, query]."""
    ours = (weights @ values.float()).transpose(1, 2).flatten(2)
    tolerance = max(1e-4, 4 * torch.finfo(values.dtype).eps)
    return (ours - mixed.float()).abs().amax(-1) <= tolerance * mixed.float().abs().amax(-1)


def _query(attention: Any, look: Look, projected: Tensor, n_heads: int) -> Tensor:
    """The queries that meet the keys, [row, head, query, d_head]."""
    width = look.mixed.shape[-1]
    if hasattr(attention, "query_key_value"):
        query = projected.unflatten(-1, (n_heads, -1))[..., : width // n_heads]
    else:
        query = projected[..., :width]
        if hasattr(attention, "q_norm"):
            # OLMo2 normalises all heads as one.
            whole = attention.q_norm.weight.shape[0] == width
            query = attention.q_norm(query if whole else query.unflatten(-1, (n_heads, -1)))
        query = query.reshape(*query.shape[:2], n_heads, -1)
    query = query.transpose(1, 2)
    rotation = look.told.rotation
    if rotation is None:
        return query
    cos, sin = (take(each.expand(len(query), -1, -1), look.asking)[:, None] for each in rotation)
    turned, rest = query.tensor_split([cos.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1)


def _of_queries(every: Tensor, asking: Tensor) -> Tensor:
    """Of [row, head, column, key], what belongs to some columns: [row, head, query, key]."""
    index = asking[:, None, :, None].expand(-1, every.shape[1], -1, every.shape[3])
    return every.gather(2, index.to(every.device))


def _cache_of(inputs: Any) -> Any:
    """The cache among the arguments of an attention module, whatever it is called."""
    positional, named = inputs
    arguments = (*positional, *named.values())
    return next((each for each in arguments if hasattr(each, "get_seq_length")), None)
