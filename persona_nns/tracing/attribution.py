"""Attribution: what the clean output of each part would do to a metric, to first order.

Patching a part puts its clean output in place of its output in another run, the host's, and sees
what becomes of a metric: a pass a part. Attribution patching (Nanda 2023; Syed, Rager and Conmy
2023) estimates that for all parts at once, from one backward pass: Σ (clean − host) · ∂metric/∂host
at the unpatched host, where the derivative is the total one, through everything that follows.

A user's own metric, here how much likelier a token becomes at the end of a prompt:

    from persona_nns import left_pad
    from persona_nns.tracing import attribute, open_batch

    clean, host = (open_batch(left_pad([ids]), None) for ids in (clean_ids, host_ids))
    scores = attribute(model, clean, host, lambda logits: logits[:, -1, token], "neuron")
    scores[0].flatten().topk(10)  # of [layer, neuron]
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from nnsight import TransformersModel, save
from torch import Tensor

from persona_nns.errors import PersonaError, UsageError
from persona_nns.tracing.residuals import stack_layers, take
from persona_nns.tracing.sandbox import has_weights
from persona_nns.tracing.window import Window

Part = Literal["head", "mlp", "neuron"]

# What projects an MLP's neurons back to the residual stream.
_DOWN = ("down_proj", "c_proj", "dense_4h_to_h")


def attribute(
    model: TransformersModel,
    clean: Window,
    host: Window,
    metric: Callable[[Tensor], Tensor],
    part: Part = "head",
    *,
    places: Tensor | None = None,
    source: Tensor | None = None,
    asked: Tensor | None = None,
) -> Tensor:
    """What the clean run's output of each part would add to a metric of the host's run.

    A first-order estimate: Σ over places and features of (clean − host) · ∂metric/∂host, with the
    total derivative at the unpatched host. Local only.

    Args:
        model: from `load_model`.
        clean: what the outputs are taken from.
        host: what they would be put into; as many rows.
        metric: of the host's logits, [row, column, vocabulary]; a number a row, or their sum. No
            row's may depend on another.
        part: ``head``, its slice of the output projection's input; ``mlp``, an MLP's output;
            ``neuron``, one of the features that an MLP projects back to the residual stream.
        places: [..., row, column of the host], True where a part is patched, several choices of
            places at once if there are dimensions in front; by default everywhere.
        source: [row, column of the host], the column of the clean window that each takes its value
            from; by default columns are aligned from the end, and those without one left out.
        asked: [row, column], the columns of the host whose logits the metric is given; by default
            all, which takes the room of as many distributions.

    Returns:
        [..., row, layer, head], [..., row, layer] or [..., row, layer, neuron], in float32.

    Raises:
        UsageError: the model gives no gradients here, or has no such parts.
        PersonaError: the metric does not depend on the logits.
    """
    check_attributable(model, part)
    outputs = _read_outputs(model, clean, part)
    if source is None:
        source = _from_the_end(clean, host)
    if places is None:
        places = (source >= 0) & (host.attention_mask[:, host.start :] > 0)
    outputs = [take(each, source.clamp(min=0)) for each in outputs]
    held, slopes = _differentiate(model, host, outputs, metric, part, asked)
    scores: list[Tensor] = []
    for output, own, slope in zip(outputs, held, slopes, strict=True):
        each = (output - own).float() * slope.float()
        each = each.unflatten(-1, (_count(model, part, each.shape[-1]), -1)).sum(-1)
        scores.append(torch.einsum("...rc,rcp->...rp", places.to(each), each))
    stacked = stack_layers(scores, dim=-2)
    return stacked[..., 0] if part == "mlp" else stacked


def check_attributable(model: TransformersModel, part: Part) -> None:
    """See that a model gives gradients here, and has the parts.

    Raises:
        UsageError: it does not.
    """
    if part not in get_args(Part):
        raise UsageError(f"There is no part {part!r}; use {', '.join(get_args(Part))}.")
    if not has_weights(model):
        raise UsageError(
            "Attribution takes gradients, which a server does not give; load the model here."
        )
    missing = [
        layer for layer, block in enumerate(model.layers) if part == "neuron" and not _down(block)
    ]
    if missing:
        raise UsageError(
            f"The neurons of {type(model._module).__name__} are not known: the MLP of block "
            f"{missing[0]} has none of {', '.join(_DOWN)}; use 'head' or 'mlp'."
        )


def _read_outputs(model: TransformersModel, window: Window, part: Part) -> list[Tensor]:
    """What the parts of each block put out, [row, column, feature]."""
    with model.trace(window.inputs(), logits_to_keep=1):
        outputs = save([_output_of(block, part) for block in model.layers])
    return [output.detach() for output in outputs]


def _differentiate(
    model: TransformersModel,
    window: Window,
    like: Sequence[Tensor],
    metric: Callable[[Tensor], Tensor],
    part: Part,
    asked: Tensor | None,
) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Of each block, what its parts put out, and the metric's derivative with respect to it.

    Nothing is added to the outputs, with a gradient of its own: the weights need none. Each
    derivative goes through all that follows, other blocks' outputs among it.
    """
    with torch.inference_mode(mode=False), torch.enable_grad():
        nothing = [torch.zeros_like(each, requires_grad=True) for each in like]
        with model.trace(window.inputs()):
            held = save([])
            for block, added in zip(model.layers, nothing, strict=True):
                output = _output_of(block, part)
                held.append(output)
                _put_out(block, part, output + added)
            if asked is not None:
                model.lm_head.input = take(model.lm_head.input, asked)
            logits = save(model.output.logits)
        value = metric(logits).sum()
        if not value.requires_grad:
            raise PersonaError("The metric does not depend on the logits that it is given.")
        slopes = torch.autograd.grad(value, nothing)
    return [output.detach() for output in held], slopes


def _output_of(block: Any, part: Part) -> Any:
    """Inside a trace: what the parts of a block put out, side by side."""
    if part == "mlp":
        return block.mlp.output
    return (block.attn.o_proj if part == "head" else _down(block)).input


def _put_out(block: Any, part: Part, value: Tensor) -> None:
    """Inside a trace: something in place of `_output_of`."""
    if part == "mlp":
        block.mlp.output = value
    elif part == "head":
        block.attn.o_proj.input = value
    else:
        _down(block).input = value


def _down(block: Any) -> Any:
    """What projects a block's neurons back to the residual stream; None of an unknown make."""
    return next((getattr(block.mlp, each) for each in _DOWN if hasattr(block.mlp, each)), None)


def _count(model: TransformersModel, part: Part, width: int) -> int:
    """How many parts share the features of a block."""
    if part == "head":
        return model.config.get_text_config().num_attention_heads
    return 1 if part == "mlp" else width


def _from_the_end(clean: Window, host: Window) -> Tensor:
    """The column of the clean window as far from the end as each of the host, [row, column].

    Negative where the clean window has none, or padding.
    """
    n_rows, width = host.input_ids.shape
    shift = clean.input_ids.shape[1] - width
    column = torch.arange(width, device=host.input_ids.device) + shift
    is_token = torch.nn.functional.pad(clean.attention_mask[:, clean.start :], (-shift, 0)) > 0
    return torch.where(is_token, column.expand(n_rows, -1), -1)
