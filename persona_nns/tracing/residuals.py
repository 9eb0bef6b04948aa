"""How residuals are read and overwritten, at one site of each row or in some columns.

Columns are counted from the end where prompts of different length are alike: prompts that end in
the same template tail, and often in the same task, are aligned there when they are padded on the
left. All of this runs inside tracing contexts, and may run on a server: torch only.
"""

from collections.abc import Sequence

import torch
from nnsight import TransformersModel
from torch import Tensor

from persona_nns.prompts.positions import position_index
from persona_nns.prompts.render import Prompt, Span


def last_columns(values: Tensor, n_columns: int) -> Tensor:
    """The last columns of [..., column, value]; zeros stand before them where there are fewer."""
    missing = n_columns - values.shape[-2]
    if missing > 0:
        return torch.nn.functional.pad(values, (0, 0, missing, 0))
    return values[..., -missing:, :]


def span_columns(prompts: Sequence[Prompt], span: Span, width: int, n_after: int) -> Tensor:
    """Where a span stands among the last columns, [row, column].

    Args:
        prompts: the prompt of each row.
        span: its name.
        width: columns.
        n_after: how many of them follow the prompt.
    """
    columns = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        first = width - n_after - len(prompt)
        columns[row, [c + first for c in prompt.spans[span] if c + first >= 0]] = True
    return columns


def put(hidden: Tensor, where: Tensor, value: Tensor) -> Tensor:
    """A value in place of the residual in some columns.

    Args:
        hidden: [row, column, d_model]; not changed.
        where: [row, column], True where it is put.
        value: [row, column, d_model].
    """
    return torch.where(where[..., None].to(hidden.device), value.to(hidden), hidden)


def stack_layers(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """A tensor of each layer, stacked where the first is: a spread model has them on several."""
    return torch.stack([each.to(tensors[0].device) for each in tensors], dim)


def has_input_norms(model: TransformersModel) -> bool:
    """Whether every block normalises what it reads (those of OLMo2 do not)."""
    return all(hasattr(block, "input_norm") for block in model.layers)


def root_mean_square(hidden: Tensor) -> Tensor:
    """RMS of [..., d_model] over its last axis, in float32; [..., 1]."""
    return hidden.float().pow(2).mean(-1, keepdim=True).sqrt()


def take(hidden: Tensor, index: Tensor) -> Tensor:
    """Read the residual at each row's own positions.

    Args:
        hidden: [row, column, d_model].
        index: [row, position], columns.

    Returns:
        [row, position, d_model], a copy.
    """
    index = index.to(hidden.device)  # where a model is spread, blocks are on several
    return hidden.gather(1, index[:, :, None].expand(-1, -1, hidden.shape[-1]))


def substitute(hidden: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """Put a value in place of the residual at one position of each row.

    Args:
        hidden: [row, column, d_model]; not changed.
        index: [row], the column of each row.
        value: [row, d_model].

    Returns:
        [row, column, d_model] with ``value`` at the sites.
    """
    hidden = hidden.clone()
    row = torch.arange(len(index), device=hidden.device)
    hidden[row, index.to(hidden.device)] = value.to(hidden)
    return hidden


def index_sites(prompts: Sequence[Prompt], positions: Sequence[str]) -> Tensor:
    """Where the positions stand in each prompt followed by its continuation, [row, position]."""
    return torch.tensor(
        [[position_index(prompt, position) for position in positions] for prompt in prompts]
    )
