"""Attribution beside the exact sweep of patches: the same places and metric, to first order."""

from dataclasses import replace

import torch
from nnsight import TransformersModel
from torch import Tensor

from persona_nns.prompts.identities import Pair
from persona_nns.tracing.attribution import Part, attribute
from persona_nns.tracing.patching import Unpatched, cut_passes, logit_difference


def attribute_pair(
    model: TransformersModel, run: Unpatched, pair: Pair, layers: list[int]
) -> dict[str, Tensor]:
    """Estimates of LD_patched − LD_corrupt for every component and head of some blocks.

    An output projection is linear in its heads, so that theirs add up to that of its output.

    Args:
        model: from `load_model`.
        run: the unpatched runs.
        pair: whose questions they are.
        layers: the blocks.

    Returns:
        ``attribution``, [question, component (mlp, attn), layer, position set], and
        ``head_attribution``, [question, layer, head, position set], in logits.
    """
    heads = _attribute(model, run, pair, "head")[:, :, layers]
    mlp = _attribute(model, run, pair, "mlp")[:, :, layers]
    components = torch.stack([mlp, heads.sum(-1)])  # [component, position set, question, layer]
    return {
        "attribution": components.permute(2, 0, 3, 1),
        "head_attribution": heads.permute(1, 2, 3, 0),
    }


def _attribute(model: TransformersModel, run: Unpatched, pair: Pair, part: Part) -> Tensor:
    """[position set, question, layer, …]; questions are cut into passes as the sweep's are."""
    rows, n = run.rows, len(run.rows.source)
    answers = torch.tensor([asked.answer for asked in pair.asked_clean], device=model.device)
    window = replace(rows.window, clean=None)
    parts: list[Tensor] = []
    for questions, _ in cut_passes(run, n, 1):
        corrupt = n + questions
        letters, answer = rows.letters[corrupt], answers[questions]

        def difference(
            logits: Tensor, letters: Tensor = letters, answer: Tensor = answer
        ) -> Tensor:
            return logit_difference(logits[:, 0].gather(1, letters).float(), answer)

        of = attribute(
            model,
            window.rows(questions, 0, window.input_ids.shape[1]),
            window.rows(corrupt, 0, window.input_ids.shape[1]),
            difference,
            part,
            places=rows.patched[:, questions],
            source=rows.source[questions],
            asked=rows.last[corrupt],
        )
        parts.append(of)
    return torch.cat(parts, dim=1)
