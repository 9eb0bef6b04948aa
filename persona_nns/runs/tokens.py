"""Whether a model has every token and every position that a plan asks it for."""

from collections.abc import Mapping
from typing import Any

from nnsight import TransformersModel

from persona_nns.declarations.plans import Plan
from persona_nns.declarations.record import ModelRecord
from persona_nns.declarations.sites import generated_index
from persona_nns.errors import UsageError


def check_tokens(
    plan: Plan, model: TransformersModel, record: ModelRecord, arguments: Mapping[str, Any]
) -> None:
    """See that a model has every token and every position that it is asked for.

    Raises:
        UsageError: a token beyond its vocabulary, a text that is too long for its positions, or
            a prompt that is longer than its sliding window where it must not be.
    """
    config = model.config.get_text_config()
    rows = [ids for of_key in plan.token_ids.values() for ids in of_key.values()]
    largest = max((max(ids, default=0) for ids in rows), default=0)
    if largest >= config.vocab_size:
        raise UsageError(
            f"A prompt holds the token {largest}, but the model {record.label!r} has "
            f"{config.vocab_size} tokens; use the model's own tokenizer."
        )
    prompt, window = max(map(len, rows), default=0), _sliding_window(config)
    if plan.within_window and window is not None and prompt > window:
        raise UsageError(
            f"The longest prompt has {prompt} tokens, but layers of the model {record.label!r} see "
            f"no more than the last {window}: what is grafted there would be out of their sight. "
            "Use shorter texts, or another model."
        )
    said = _said_after_a_prompt(arguments)
    longest = max(map(len, rows), default=0) + said
    what = f"The longest prompt and what is said after it have {longest} tokens"
    positions = getattr(config, "max_position_embeddings", None)
    rotary = getattr(config, "rope_parameters", None)
    if positions is not None and not rotary and longest > positions:
        raise UsageError(
            f"{what}, but the model {record.label!r} has {positions} positions; use shorter "
            "texts, or another model."
        )
    if (switch := _rotary_switch(config)) is not None and longest > switch:
        raise UsageError(
            f"{what}, and the rotary frequencies of {record.label!r} are others beyond {switch}: "
            "a number would depend on what else is in its batch. Use shorter texts."
        )


def _sliding_window(config: Any) -> int | None:
    """How many tokens the layers that forget see; None where there are none such."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return getattr(config, "sliding_window", None)


def _said_after_a_prompt(arguments: Mapping[str, Any]) -> int:
    """The most tokens that follow a prompt, by the options that ask for them."""
    window = int(arguments.get("n_eval", 0)) + max(
        map(generated_index, arguments.get("positions", ())), default=0
    )
    return max(window, *(int(arguments.get(name, 0)) for name in ("n_tokens", "max_new_tokens")))


def _rotary_switch(config: Any) -> int | None:
    """The length beyond which rotary frequencies are others; None where they never are."""
    rope = getattr(config, "rope_parameters", None) or {}
    per_type = [rope] if "rope_type" in rope else list(rope.values())
    switches = [
        parameters.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
        for parameters in per_type
        if parameters.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(switches, default=None)
