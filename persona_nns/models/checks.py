"""Checks that a model is what the experiments take it for, at every layer, before any of them.

A hook that silently touches nothing gives numbers that look right. So a model is loaded only if,
at each layer, what is read equals transformers' own hidden states, writing back what was read
changes nothing, and writing something else changes the output.
"""

import torch
from nnsight import TransformersModel, save
from nnsight.intervention.interleaver import OutOfOrderError

from persona_nns.errors import PersonaError
from persona_nns.tracing.batches import keep_last, left_pad
from persona_nns.tracing.residuals import substitute
from persona_nns.tracing.sandbox import entry

_NAMES = ("layers", "embed", "final_norm", "lm_head")
_BLOCK_NAMES = ("attn", "mlp")


def check_model(model: TransformersModel, shown: str) -> None:
    """Check names, reading and overwriting at every layer.

    Args:
        model: a loaded model with standard names.
        shown: how to call it in a message.

    Raises:
        PersonaError: the model fails a check; the message says which, and at what layer.
    """
    check_names(model, shown)
    n_layers = len(model.layers)
    device = model.device
    # Two tokens, of which the last is overwritten and says what comes of it: no others would move.
    row = [7, 3]
    probe = left_pad([row], device=device)
    plainly = {"use_cache": False, "logits_to_keep": keep_last(1)}

    try:
        with model.trace(
            probe.tokens, position_ids=probe.position_ids, output_hidden_states=True, **plainly
        ):
            embedded = save(entry(model, 0).output.clone())
            seen = [(layer.input.clone(), layer.output) for layer in model.layers]
            read = save([entering for entering, _ in seen])
            are_tensors = save([isinstance(leaving, torch.Tensor) for _, leaving in seen])
            normed = save(model.final_norm.output)
            expected = save(model.output.hidden_states)
            clean = save(model.output.logits)
    except OutOfOrderError as error:
        raise PersonaError(
            f"The model {shown!r} is not supported: not every block of it is run, in order."
        ) from error

    if not all(are_tensors):
        raise PersonaError(
            f"The model {shown!r} is not supported: its block {are_tensors.index(False)} returns "
            "more than the residual stream, so that no run can go on from there."
        )
    if not torch.equal(embedded, read[0]):
        raise PersonaError(
            f"The model {shown!r} is not supported: what enters its first block is not what its "
            "embedding puts out, so that it cannot be overwritten there."
        )
    for layer, (ours, theirs) in enumerate(zip([*read, normed], expected, strict=True)):
        if not torch.isfinite(theirs).all():
            raise PersonaError(
                f"The residual stream of {shown!r} is not finite at layer {layer}; its precision "
                "may be too small for it (use bfloat16 or float32), or its weights are damaged."
            )
        if not torch.equal(ours.to(theirs.device), theirs):
            raise PersonaError(
                f"The model {shown!r} is not supported: the residual read at layer {layer} is not "
                f"transformers' hidden_states[{layer}]."
            )

    # Row L of the batch is overwritten at layer L only: one pass checks every layer.
    rows = left_pad([row] * n_layers, device=device)
    site = torch.full((1,), 1, device=device)
    with model.trace(rows.tokens, position_ids=rows.position_ids, **plainly):
        for layer, block in enumerate(model.layers):
            hidden = block.input.clone()
            own = hidden[layer : layer + 1]
            hidden[layer : layer + 1] = substitute(own, site, own[:, 1] * 0.5 + 1.0)
            block.input = hidden
        changed = save(model.output.logits)
    with model.trace(rows.tokens, position_ids=rows.position_ids, **plainly):
        for layer, block in enumerate(model.layers):
            hidden = block.input.clone()
            own = hidden[layer : layer + 1]
            hidden[layer : layer + 1] = substitute(own, site, own[:, 1])
            block.input = hidden
        unchanged = save(model.output.logits)

    # Rows of a batch and a single row may round differently; an overwrite is far above that.
    tolerance = 1e-3 * float(clean.abs().max()) + 1e-6
    if changed.dtype is not torch.float32:
        tolerance *= 30
    for layer in range(n_layers):
        if not float((unchanged[layer] - clean[0]).abs().max()) <= tolerance:
            raise PersonaError(
                f"The model {shown!r} is not supported: writing back the residual of layer "
                f"{layer} changes its output (or the output is not finite)."
            )
        if not float((changed[layer] - unchanged[layer]).abs().max()) > 0:
            raise PersonaError(
                f"The model {shown!r} is not supported: overwriting the residual of layer "
                f"{layer} does not change its output."
            )


def check_names(model: TransformersModel, shown: str) -> None:
    """Check that every module answers to its standard name; this needs no weights.

    Raises:
        PersonaError: one does not.
    """
    missing = [name for name in _NAMES if not hasattr(model, name)]
    if not missing:
        missing = [
            f"layers[{index}].{name}"
            for index, block in enumerate(model.layers)
            for name in _BLOCK_NAMES
            if not hasattr(block, name)
        ]
    if missing:
        raise PersonaError(
            f"The model {shown!r} ({type(model._module).__name__}) is not supported: it has no "
            f"module that answers to {', '.join(missing[:3])}."
        )
