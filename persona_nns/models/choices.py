"""In which precision, with which attention and on which device a model is loaded."""

from pathlib import Path

import torch
from transformers import PreTrainedConfig

from persona_nns.errors import UsageError, one_line
from persona_nns.models.checkpoints import DTYPES, find_checkpoint, read_config, version_of
from persona_nns.tracing.attention import MASKED


def choose_dtype(
    shown: str, config: PreTrainedConfig, dtype: str | None, *, allow_float16: bool = False
) -> str:
    """The precision that a model is loaded in.

    Raises:
        UsageError: no such precision, or float16 without being forced.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"Unknown dtype {dtype!r}; use {', '.join(DTYPES)}.")
    if dtype == "float16" and not allow_float16:
        raise UsageError(
            f"float16 overflows in the residual stream and gives NaN, so {shown!r} is not loaded "
            "in it; use bfloat16 or float32 (or force it with --allow-float16)."
        )
    if dtype is not None:
        return dtype
    own = str(config.dtype).removeprefix("torch.")
    # Gemma-2 is published in bfloat16 and was measured in float32.
    return "float32" if config.model_type == "gemma2" or own != "bfloat16" else "bfloat16"


def version_and_precision(name: str | Path) -> tuple[str, str]:
    """What determines the numbers of a model beside its prompts, without loading its weights.

    Returns:
        The digest of its files, or ``org/name@commit`` for one on the hub; and the precision that
        `load_model` chooses for it.

    Raises:
        UsageError: unknown model.
        PersonaError: its version cannot be told.
    """
    source, shown = find_checkpoint(str(name))
    config = read_config(source, shown, trust_remote_code=False)
    version = version_of(source, config)
    on_hub = not Path(source).is_dir()
    return f"{source}@{version}" if on_hub else version, choose_dtype(shown, config, None)


def choose_attention(shown: str, config: PreTrainedConfig, attention: str | None) -> str:
    """How a model's attention is computed.

    Raises:
        UsageError: no such way, or none of this model.
    """
    if attention not in (None, *MASKED):
        raise UsageError(f"Unknown attention {attention!r}; use {' or '.join(MASKED)}.")
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    if attention == "sdpa" and capped:
        raise UsageError(
            f"The model {shown!r} caps its attention logits, which sdpa cannot; leave out "
            "--attention."
        )
    return attention or MASKED[0]


def choose_device(device: str | None) -> torch.device:
    """Where a model is loaded.

    Raises:
        UsageError: no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"The device {device!r} cannot be used: {one_line(error)}") from error
    return place
