"""What a layer must not attend to, through its own attention mask."""

import torch
from torch import Tensor


def hide(attention_mask: Tensor, columns: Tensor) -> Tensor:
    """Inside a trace: an attention mask in which columns of the cache are hidden from all queries.

    Args:
        attention_mask: [row or 1, 1, query, key], 0 where a key is seen; not changed. One object
            may serve all layers, which is why it is copied.
        columns: [row, column], True where the key of that column is hidden; columns from its
            width on (those that the pass runs) stay as they are.

    Returns:
        [row, 1, query, key].
    """
    rest = attention_mask.shape[-1] - columns.shape[1]
    hidden = torch.nn.functional.pad(columns, (0, rest))[:, None, None]
    return attention_mask.masked_fill(hidden, torch.finfo(attention_mask.dtype).min)
