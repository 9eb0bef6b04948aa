"""The two architectures, at a size that two cores train in minutes."""

from typing import Any, cast

from torch.nn import Module, ModuleList
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from persona_nns.organism.tokenizer import END_ID, PAD_ID

LAYERS = 8
HEADS = 4
KEY_VALUE_HEADS = 2
WIDTH = 128
HEAD_WIDTH = WIDTH // HEADS
FEED_FORWARD = 384
POSITIONS = 512
SLIDING_WINDOW = 48
"""Shorter than every prompt of the long grid, so that sliding-window traps show."""


def build(name: str, vocabulary: int) -> PreTrainedModel:
    """A freshly initialised bundled model (float32); seed torch before the call.

    Raises:
        KeyError: a name that is not a bundled model's.
    """
    return {"organism-qwen2": _qwen2, "organism-gemma2": _gemma2}[name](vocabulary)


def decoder_blocks(model: PreTrainedModel) -> list[Module]:
    """The decoder blocks of a model in order."""
    return list(cast(ModuleList, model.get_decoder().layers))


def _shared(vocabulary: int) -> dict[str, Any]:
    """What the configurations of both models have in common."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": True,
        "initializer_range": 0.04,
        "pad_token_id": PAD_ID,
        "eos_token_id": END_ID,
        "bos_token_id": None,
    }


def _qwen2(vocabulary: int) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**_shared(vocabulary), use_sliding_window=False))


def _gemma2(vocabulary: int) -> PreTrainedModel:
    config = Gemma2Config(
        **_shared(vocabulary),
        head_dim=HEAD_WIDTH,
        query_pre_attn_scalar=HEAD_WIDTH,
        sliding_window=SLIDING_WINDOW,
    )
    return Gemma2ForCausalLM(config)
